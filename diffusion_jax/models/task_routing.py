"""Task routing: every timestep sees its own channels of each block (Park et al. 2024, DTR).

Denoising at one noise level is a task, and distant tasks disagree. A window of constant width slides over the channels
with the time, so neighbouring tasks share nearly all of them and distant ones fewer:

    m_tau[c] = 1  if  start <= c < start + C_b,  else 0;      C_b = int(ratio C),
    start    = round((C - C_b) tau^exponent),                 tau in [0, 1], 1 the most noise                  (1)

A residual block F reads the channels of its task and leaves the others as they are,

    z' = F(m o z) + (1 - m) o z     of a transformer: attention and feed-forward layer together                (2)
    z' = shortcut(z) + f(m o z)     of a U-Net, f the residual branch                                          (3)

Nothing is learned and nothing is rescaled: the parameters are those of the network, and so is the compute. It has to
be trained in this way. The mask is a function of the network's time alone, so a run of fewer steps, guidance, averages,
caches of blocks and adapters need no case of their own.

Source: Park et al. 2024, "Denoising Task Routing for Diffusion Models", and its code, which counts t from 0.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models.anatomy import anatomy_of
from diffusion_jax.models.edits import of_condition
from diffusion_jax.models.interception import ByAnatomy, Edit, Site, wrapped
from diffusion_jax.models.layers.branches import Block
from diffusion_jax.models.layers.convolution import ResidualBranch
from diffusion_jax.models.layers.patches import times_of_patches
from diffusion_jax.models.layers.spatial import SpatialAttention
from diffusion_jax.typing import Network, Number

ChannelMask = Callable[[Float[Array, "*prefix"], int], Bool[Array, "*prefix C"]]
"""`(tau, C) -> mask`: which of a block's C channels the task tau in [0, 1] sees."""


def channel_window(ratio: Number = 0.8, exponent: Number = 4.0) -> ChannelMask:
    """Equation (1).

    ratio: share of the channels that each task sees; with 1 the network is the one without routing. exponent: above 1
    the window moves fast where noise is strong, below 1 where it is weak; 1 moves it evenly.
    Raises InvalidInput for a ratio outside (0, 1] or an exponent that is not positive.
    """
    _check_ratio(ratio)
    if not exponent > 0:
        raise invalid("exponent", exponent, "it must be positive")

    def mask(tau, channels):
        width = _width(ratio, channels)
        start = jnp.round((channels - width) * tau**exponent)[..., None]
        place = jnp.arange(channels)
        return (start <= place) & (place < start + width)

    return mask


def random_channels(ratio: Number = 0.8, tasks: int = 1000, seed: int = 0) -> ChannelMask:
    """What a window has to beat (R-TR): each of `tasks` equal tasks sees int(ratio C) channels drawn at random, so that
    neighbours share no more than others do. All blocks of the same C share the draw.

    Raises InvalidInput for a ratio outside (0, 1] or less than two tasks.
    """
    _check_ratio(ratio)
    if tasks < 2:
        raise invalid("tasks", tasks, "two tasks at least are needed")

    def mask(tau, channels):
        order = np.random.default_rng(seed).permuted(np.tile(np.arange(channels), (tasks, 1)), axis=1)
        return jnp.asarray(order < _width(ratio, channels))[jnp.round(tau * (tasks - 1)).astype(jnp.int32)]

    return mask


def task_routed(
    network: Network,
    span: tuple[Number, Number],
    mask: ChannelMask | None = None,
    clock: Callable[[Any], Any] = lambda t: t,
) -> Network:
    """The network whose blocks see the channels of their task, equations (2) and (3), with the same parameters.

    Routed are the blocks of stacks, and in U-Nets the residual branches; what embeds patches, time and conditions, the
    output layer and attention over a U-Net's pixels see everything.

    span: the network's times of the least and of the most noise, tau = 0 and 1; in between tau is linear in the
        network's time. (0, 999) for an index k of 1000 steps, as published; (0, 1) for a flow that is told t. What
        `mask`'s exponent does depends on it.
    mask: `channel_window()` where none is given. clock: the times that the masks read, of the network's times:
        `lambda t: t["image"]`. Times per token, row or pixel give each its own mask, in a block of fewer positions
        that of the mean of its times.

    Raises InvalidInput for a span of no length, for a network without a module, and, when it runs, where the times do
    not fit the positions of a block.
    """
    first, last = span
    if first == last:
        raise invalid("span", span, "two different times of the network are needed")
    if network.inside is None:
        raise InvalidInput("task_routed needs a network made from a module: network.module is missing.")
    mask = channel_window() if mask is None else mask
    patch = anatomy_of(network).patch

    def around(inner, params, x, t, cond, train, key):
        t = clock(t)
        if isinstance(t, Mapping):
            raise InvalidInput("Task routing reads one array of times: make it of this network's times with clock=.")
        tau = jnp.clip((jnp.asarray(t, jnp.float32) - first) / (last - first), 0.0, 1.0)
        size = () if isinstance(x, Mapping) else x.shape[1:-1]
        # Derivatives of a decision are 0, and those of a root would be infinite.
        told = partial(_at_positions, jnp.atleast_1d(jax.lax.stop_gradient(tau)), patch, size)
        return inner(params, x, t, cond, train, key, edits=(Edit(routed_blocks, partial(_routed, mask, told)),))

    return wrapped(network, around)


@ByAnatomy
def routed_blocks(module: nn.Module, anatomy: Any) -> bool:
    """Selects the blocks of the residual stream: those of transformers, and residual branches of convolutions."""
    if isinstance(module, ResidualBranch):
        return True
    if not isinstance(module, Block) or of_condition(module, anatomy):
        return False
    # Blocks of attention over the pixels of a U-Net stand between its residual branches, which are routed.
    return all(getattr(make, "func", make) is not SpatialAttention for _, make in module.branches)


def _routed(mask: ChannelMask, told: Callable[..., Any], site: Site, h: Any, c: Any, side: Any) -> Any:
    seen = mask(told(h), h.shape[-1])
    seen = seen.reshape(*seen.shape[:-1], *(1,) * (h.ndim - seen.ndim), h.shape[-1])
    # Selected, not multiplied: what is not finite in one channel stays there.
    out = site.run(jnp.where(seen, h, 0), c, side)
    return out if isinstance(site.module, ResidualBranch) else out + jnp.where(seen, 0, h)


def _at_positions(tau: Any, patch: int, size: tuple[int, ...], h: Any) -> Any:
    """The times of h's positions, of a shape that is a prefix of h's; means where a position stands for several."""
    positions = h.shape[:-1]
    if tau.ndim == 1:
        return tau
    if len(size) == 2 and h.ndim == 3:
        tokens = times_of_patches(tau, (patch, patch), size)
        if tokens.shape[1:] == positions[1:]:
            return tokens
    elif len(size) == 2 and h.ndim == 4:
        # A level of a U-Net; a row's time is that of all its pixels.
        tau = jnp.broadcast_to(tau if tau.ndim == 3 else tau[..., None], (tau.shape[0], *size))
        rows, columns = positions[1:]
        if not (size[0] % rows or size[1] % columns):
            return tau.reshape(-1, rows, size[0] // rows, columns, size[1] // columns).mean(axis=(2, 4))
    elif tau.ndim <= len(positions) and all(a in (1, b) for a, b in zip(tau.shape, positions, strict=False)):
        return tau
    raise invalid("t.shape", tau.shape, f"times of a block with the positions {positions} cannot be made of it")


def _check_ratio(ratio: Number) -> None:
    if not 0 < ratio <= 1:
        raise invalid("ratio", ratio, "a share of the channels above 0, at most 1, is needed")


def _width(ratio: Number, channels: int) -> int:
    width = int(ratio * channels)
    if not width:
        raise invalid("ratio", ratio, f"it leaves none of {channels} channels")
    return width
