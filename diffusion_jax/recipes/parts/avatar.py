"""A causal video network that talks: trained on its own rollouts, streamed, and shared by several devices.

Each noise level keeps the keys and values of past blocks as they were at that level; who is shown is a sink that stands
equally far from every block. See `live_avatar` for the system and its comparisons.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion_jax import models, solvers
from diffusion_jax.config import build
from diffusion_jax.distributed import NOTHING, make_mesh, sequential, timestep_pipeline
from diffusion_jax.models import LatentSpace
from diffusion_jax.pipelined import (
    at_each_level,
    blocks_of,
    caching_stage,
    clip_of,
    decoding_stage,
    kv_cached,
    noise_blocks,
    rollout,
)
from diffusion_jax.randomness import split
from diffusion_jax.typing import Params


class Avatar(NamedTuple):
    """A causal network and how it streams. grid: `[T + 1]`. block: in frames. sink_at: None lets the sink fall back.

    history: None, what each level saw; or the time at which one cache for all is shown blocks, see `pipelined.rollout`.
    adaptive: whether the first frame that is made takes the place of the picture.
    """

    network: Any
    process: Any
    grid: Any
    block: int
    sink_at: Any
    history: float | None = None
    adaptive: bool = True

    @property
    def levels(self) -> int:
        return len(self.grid) - 1

    def denoiser(self) -> Any:
        return kv_cached(models.incremental(self.network), self.process, self.sink_at)

    def begun(self, params, x, picture, sound) -> Any:
        """What is remembered before the first block: the picture, by each level or in the one cache."""
        carry = self.denoiser().init(params, x, {"audio": sound, "reference": picture})
        return at_each_level(carry, self.levels) if self.history is None else carry


def avatar_of(config: ConfigDict) -> Avatar:
    """The system of the paper, as the config has it."""
    network, process = build(config.student.model), build(config.student.process)
    return Avatar(network, process, np.asarray(build(config.grid)), network.anatomy.causal.block, config.sink_at)


def self_rollout(avatar: Avatar) -> Callable[..., Any]:
    """`generate` of `objectives.distribution_matching`: the student's own clips, left at a random level."""

    def generate(params, batch, key):
        exit_key, sink_key, noise_key = split(key, 3)
        frozen, cond, frames = jax.lax.stop_gradient(params), batch["cond"], batch["x0"].shape[1]
        sound, x = blocks_of(cond["audio"], avatar.block), batch["x0"][:, : avatar.block]
        # The sink stands anywhere within the distances that the teacher knows.
        own = avatar._replace(sink_at=jax.random.uniform(sink_key, (), minval=avatar.block, maxval=frames))
        denoiser, solver = own.denoiser(), solvers.lcm()
        noise = noise_blocks(
            noise_key, denoiser, frozen, solver, avatar.grid,
            shape=x.shape, blocks=len(sound), index=batch["index"],
        )  # fmt: skip
        carry = own.begun(frozen, x, cond["reference"], sound[0])
        run = rollout(denoiser, solver, avatar.grid, avatar.history)
        exit = jax.random.randint(exit_key, (), 0, avatar.levels)
        return clip_of(run(params, carry, noise, {"audio": sound}, exit)[0])

    return generate


def streaming(avatar: Avatar, schedule: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """`(params, key, picture [B, 1, 1, K], audio [B, F, 16]) -> latents [B, F, 1, 1, K]`, of any length.

    schedule: how blocks are made, `(params, carry, blocks, cond) -> (x, carry)`; None: `rollout` through all levels.
    """
    denoiser, solver = avatar.denoiser(), solvers.flow_euler()
    run = rollout(denoiser, solver, avatar.grid, avatar.history) if schedule is None else schedule

    def stream(params, key, picture, audio):
        sound = blocks_of(audio, avatar.block)
        x = jnp.zeros((picture.shape[0], avatar.block, *picture.shape[1:]))
        noise = noise_blocks(key, denoiser, params, solver, avatar.grid, shape=x.shape, blocks=len(sound))
        blocks = noise, {"audio": sound}
        first, rest = jax.tree.map(lambda leaf: leaf[:1], blocks), jax.tree.map(lambda leaf: leaf[1:], blocks)
        begin, carry = run(params, avatar.begun(params, x, picture, sound[0]), *first)
        if avatar.adaptive:
            carry = carry._replace(sink=avatar.begun(params, x, begin[0][:, 0], sound[0]).sink)
        return clip_of(jnp.concatenate([begin, run(params, carry, *rest)[0]]))

    return jax.jit(stream)


def in_flight(config: ConfigDict, params: Params, space: LatentSpace, picture: Any, audio: Any) -> dict[str, float]:
    """The adaptive stream on T + 1 devices, of which the last decodes, and one block after another: their difference,
    and what was counted: ticks until the first block is out, until the other blocks are, and together; ticks from block
    to block; evaluations of a block at a device."""
    avatar = avatar_of(config)
    denoiser, solver, levels = avatar.denoiser(), solvers.flow_euler(), avatar.levels
    step = caching_stage(denoiser, solver, avatar.grid)
    stage = decoding_stage(step, levels, space.decode)
    mesh = make_mesh(data=1, pipe=levels + 1, devices=jax.devices()[: levels + 1])
    pipeline = timestep_pipeline(stage, levels + 1, mesh=mesh)
    sound = blocks_of(audio, avatar.block)
    count, shape = len(sound), (len(picture), avatar.block, *picture.shape[1:])
    enters = partial(noise_blocks, denoiser=denoiser, params=params, solver=solver, grid=avatar.grid, shape=shape)
    noise = jax.jit(partial(enters, blocks=count))(jax.random.key(0))
    blocks = noise, jnp.zeros((count, *space.decode(jnp.zeros(shape)).shape))
    advance = jax.jit(pipeline.advance)

    @jax.jit
    def begun(params, picture):
        carry = denoiser.init(params, jnp.zeros(shape), {"audio": sound[0], "reference": picture})
        return at_each_level(carry, levels + 1)

    def enter(flight, first, last):
        """Blocks first .. last - 1 enter; `(flight, (block, frames) as they leave, tick at which each leaves)`."""
        order = first + np.arange(count + levels)
        entering = jax.tree.map(lambda leaf: leaf[np.minimum(order, count - 1)], (blocks, {"audio": sound}))
        # Both times from the same place, so that one program serves.
        flight = jax.device_put(flight, NamedSharding(mesh, PartitionSpec()))
        flight, left, index = advance(params, flight, *entering, np.where(order < last, order, NOTHING))
        ticks = np.flatnonzero(np.asarray(index) != NOTHING)
        return flight, jax.tree.map(lambda leaf: leaf[ticks], left), ticks + 1

    empty = pipeline.init(begun(params, picture), *jax.tree.map(lambda leaf: leaf[0], (blocks, {"audio": sound})))
    flight, begin, drain = enter(empty, 0, 1)
    own = begun(params, np.asarray(begin[0].run.x[0][:, 0]))
    flight = flight._replace(carry=flight.carry._replace(sink=own.sink))
    flight, rest, ticks = enter(flight, 1, count)
    shown = clip_of(jnp.concatenate([begin[1], rest[1]]))

    def one_by_one(params, carry, x, cond):
        made, carry = sequential(step, levels)(params, carry, x, cond)
        return made.run.x, carry

    latents = streaming(avatar, one_by_one)(params, jax.random.key(0), picture, audio)
    return {
        "difference": float(np.abs(shown - space.decode(latents)).max()),
        "ticks": float(ticks[-1]),
        "adaptive ticks": float(drain[-1] + ticks[-1]),
        "first": float(drain[0]),
        "every": float(np.diff(ticks).mean()),
        "evaluations": float((flight.carry.count[:levels] / count).mean()),
        "blocks": float(count),
        "levels": float(levels),
    }
