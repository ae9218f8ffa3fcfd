"""Further channels at the entrance of a trained network: the usual way to tell it of given frames or pixels."""

from typing import Any

import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models.anatomy import anatomy_of, module_params, required, with_module_params
from diffusion_jax.models.paths import at_path, replaced_at
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Network, Params


def with_channels(network: Network, params: Params, extra: int) -> Params:
    """The parameters with which the entrance reads `extra` more channels behind those of x, which count for nothing.

    They fit the same network with the condition `models.concat()`; its answer is that of `network` at first, whatever
    `cond["concat"]` holds. The entrance is a convolution, or a dense layer that reads patches.
    Raises InvalidInput where the network's anatomy names no entrance, and unless `extra` is a positive integer.
    """
    if isinstance(extra, bool) or not isinstance(extra, int) or extra < 1:
        raise invalid("extra", extra, "it must be a positive integer")
    entrance = f"{required(network, 'entrance', 'with_channels')}/kernel"
    inner = module_params(network, params)
    kernel = at_path(inner, entrance)
    if kernel.ndim == 2:
        patches = kernel.reshape(anatomy_of(network).patch ** 2, -1, kernel.shape[-1])
        wider = jnp.pad(patches, [(0, 0), (0, extra), (0, 0)]).reshape(-1, kernel.shape[-1])
    else:
        wider = jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 2) + [(0, extra), (0, 0)])
    return with_module_params(network, params, replaced_at(inner, entrance, wider))


def masked_channels(x: Any, given: Any) -> Any:
    """What mask-and-concat shows a network, `[*x.shape[:-1], C + 1]`: x where it is `given`, zeros elsewhere, the mask.

    x: `[B, ..., C]`. given: bool or 0 and 1, of a prefix shape of x (`[B, F]` frames, `[B, H, W]` pixels); axes of size
    1 broadcast. The task is to make up the rest (Ho et al. 2022; Liu et al. 2025 compare with it).
    """
    x = jnp.asarray(x)
    mask = jnp.broadcast_to(expand(jnp.asarray(given, x.dtype), x), (*x.shape[:-1], 1))
    return jnp.concatenate([x * mask, mask], axis=-1)
