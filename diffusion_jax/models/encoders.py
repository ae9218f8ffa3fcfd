"""What text and vision encoders have in common: their interface, their stack of blocks, and the checks of their fields.

The encoders are in `text_encoders` and `vision_encoders`. The residual stream is float32 whatever the compute dtype:
trained encoders have channels a thousand times as large as the others, which bfloat16 would carry at three digits.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid, unknown
from diffusion_jax.models.layers.branches import REMAT, Side, Stack
from diffusion_jax.models.layers.mlp import ACTIVATIONS
from diffusion_jax.models.layers.prenorm import PreNormAttention, PreNormMlp, affine_norm
from diffusion_jax.models.network import check_dtype, chosen, make_module, network
from diffusion_jax.typing import Anatomy, Network


class Encoded(NamedTuple):
    """The output of an encoder, float32.

    hidden: `[B, N, D]`, after the last norm where the architecture has one. pooled: `[B, P]`, the whole input in one
    vector, projected where there is a projection; None where the architecture has none.
    hidden_states: `[L + 1, B, N, D]`, the residual stream before the first block and after each, never normed: [-2] is
    the penultimate layer. Inside jit what is not used costs nothing.
    """

    hidden: Any
    pooled: Any
    hidden_states: Any


class Encoder(NamedTuple):
    """An encoder as pure functions; `module` is the linen module behind them, for interception.

    init:  (key, inputs) -> params
    apply: (params, inputs, mask=None) -> Encoded     inputs: tokens `int [B, N]`, or images `[B, H, W, C]`;
           mask: `[B, N]`, true (or 1) where a token, or a patch in row-major order, may be seen
    final_norm: (params, h) -> h     the last norm, for an entry of `hidden_states`; of the last it makes what an
           architecture norms last ("clip skip" takes an earlier one)
    """

    init: Callable[..., Any]
    apply: Callable[..., Encoded]
    final_norm: Callable[..., Any]
    module: Any = None


def encoder(module: nn.Module) -> Encoder:
    """The pure functions of a module called as `module(inputs, mask)`; `init` compiles as one program."""

    def init(key, inputs):
        return jax.jit(lambda *given: module.init(*given, None)["params"])(key, jnp.asarray(inputs))

    def apply(params, inputs, mask=None) -> Any:
        return module.apply({"params": params}, jnp.asarray(inputs), None if mask is None else jnp.asarray(mask) != 0)

    def final_norm(params, h):
        kind = "layer" if "bias" in params["norm"] else "rms"
        return affine_norm(kind, module.eps).apply({"params": params["norm"]}, h)

    return Encoder(init, apply, final_norm, module)


class _Called(nn.Module):
    """An encoder under the calling convention of networks, with its own parameters at their own paths."""

    encoder: nn.Module

    def setup(self):
        nn.share_scope(self, self.encoder)

    def __call__(self, x, t, cond, train):
        mask = (cond or {}).get("mask")
        return self.encoder(x, None if mask is None else jnp.asarray(mask) != 0), {}


def as_network(encoder: Encoder) -> Network:
    """An encoder as a `Network` with the same parameters, for interception and adapters.

    Called as `apply(params, inputs, t, {"mask": mask} or None)`, which ignores t; the output is `Encoded`.
    Its stack also returns every hidden state, so it cannot be cut, and it has no time for routers to read.
    """
    return network(_Called(encoder.module), Anatomy(enters={"mask": "blocks"}))


def prenorm_stack(
    module: Any, h: Any, side: Side, attention: Mapping[str, Any], mlp: Mapping[str, Any]
) -> tuple[Any, Any]:
    """The stream after the blocks of the calling `module`, and before the first and after each, `[L + 1, B, N, D]`.

    attention, mlp: the fields of the branches that are not those of `module`.
    """
    shared = {"eps": module.eps, "dtype": jnp.dtype(module.dtype)}
    branches = (
        ("attention", partial(PreNormAttention, heads=module.heads, **shared, **attention)),
        ("mlp", partial(PreNormMlp, hidden=module.mlp_width, activation=module.activation, **shared, **mlp)),
    )
    h = h.astype(jnp.float32)
    stack = Stack(branches, module.depth, module.remat, module.scan, keep=True, name="blocks")
    last, every = stack(h, None, side)
    return last, jnp.concatenate([h[None], every])


def make_encoder(make: type[nn.Module], presets: Mapping[str, Mapping], preset: str, fields: Mapping, name: str):
    """The encoder `make(**presets[preset], **fields)`. Raises InvalidInput for what does not exist or does not fit."""
    module = make_module(make, name, chosen(preset, presets), fields)
    for field in ("width", "depth", "heads", "mlp_width", "vocab_size", "positions", "buckets", "image_size", "patch"):
        value = getattr(module, field, 1)
        if not isinstance(value, int) or value < 1:
            raise invalid(field, value, "it must be a positive integer")
    if not getattr(module, "head_dim", 0) and module.width % module.heads:
        raise invalid("width", module.width, f"it must divide by the number of heads, {module.heads}")
    if module.activation not in ACTIVATIONS:
        raise unknown("activation", module.activation, ACTIVATIONS)
    if module.remat not in REMAT:
        raise unknown("remat", module.remat, REMAT)
    check_dtype(module.dtype)
    return encoder(module)


def check_mask(mask: Any, shape: tuple[int, int]) -> None:
    """Raises InvalidInput unless the mask is that of `shape`, `(B, N)`."""
    if mask is not None and mask.shape != shape:
        raise invalid("mask.shape", mask.shape, f"{shape} is needed")
