"""Residual MLP for low-dimensional data: vectors `[B, D]`, with one time per sample or per dimension."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models.anatomy import transformer_anatomy
from diffusion_jax.models.layers.branches import MlpBranch, Stack, modulated_output
from diffusion_jax.models.layers.conditioning import ConditionEncoder, ConditionStream, check_streams
from diffusion_jax.models.network import check_dtype, check_fields, network
from diffusion_jax.time_axes import fill
from diffusion_jax.typing import Network


class Mlp(nn.Module):
    """Blocks of one `mlp` branch over `x [B, D]`, modulated by the times `[B]` or `[B, D]` and by `cond`.

    Every dimension's time is embedded, one time for all dimensions being the case of equal ones, so parameters and
    outputs do not depend on how the time was given. conditions: see `layers.conditioning`.
    """

    width: int = 128
    depth: int = 3
    ratio: float = 2.0
    conditions: tuple[ConditionStream, ...] = ()
    scan: bool = True
    dtype: str = "float32"

    takes = ("vector", "channels", "layers", "time")

    @nn.compact
    def __call__(self, x, t, cond, train):
        if x.ndim != 2:
            raise invalid("x.shape", x.shape, "vectors [B, D] are needed")
        dtype = jnp.dtype(self.dtype)
        t = jnp.broadcast_to(fill(t, x).reshape(x.shape[0], -1), x.shape)
        conditioned = ConditionEncoder(self.width, self.conditions, self.depth, dtype, name="condition")(
            t, cond, x.shape
        )
        c = nn.DenseGeneral(self.width, axis=(-2, -1), dtype=dtype, name="dimensions")(conditioned.vector)
        h = nn.Dense(self.width, dtype=dtype, name="embed")(conditioned.join_channels(x.astype(dtype)))
        branches = conditioned.block_branches((("mlp", partial(MlpBranch, self.ratio, dtype=dtype)),))
        h = Stack(branches, self.depth, scan=self.scan, name="blocks")(h, c, conditioned.side(h))
        y = modulated_output(h, c, x.shape[-1], dtype)
        return y.astype(jnp.float32), {}


def mlp(
    width: int = 128,
    depth: int = 3,
    ratio: float = 2.0,
    conditions: tuple[ConditionStream, ...] = (),
    scan: bool = True,
    dtype: str = "float32",
) -> Network:
    """A residual MLP for vectors `[B, D]`; see `Mlp`. Raises InvalidInput for sizes that are not positive."""
    for name, value in (("width", width), ("depth", depth)):
        if not isinstance(value, int) or value < 1:
            raise invalid(name, value, "it must be a positive integer")
    if ratio <= 0:
        raise invalid("ratio", ratio, "it must be positive")
    check_dtype(dtype)
    check_fields("mlp", Mlp, {"width": width, "depth": depth})
    module = Mlp(width, depth, ratio, check_streams("mlp", conditions, Mlp.takes), scan, dtype)
    return network(module, transformer_anatomy(module, axes=2, entrance="embed"))
