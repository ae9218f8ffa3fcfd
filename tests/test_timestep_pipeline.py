"""Laws of the timestep pipeline: it equals the sequential schedule, in ticks that are counted, on any devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax import models, processes, solvers
from diffusion_jax.denoisers import analytic, gaussian_mixture
from diffusion_jax.distributed import NOTHING, make_mesh, sequential, timestep_pipeline
from diffusion_jax.errors import InvalidInput
from diffusion_jax.pipelined import (
    at_each_level,
    blocks_of,
    cached,
    caching_stage,
    clip_of,
    decoding_stage,
    denoising_stage,
    noise_blocks,
    rollout,
)
from diffusion_jax.sampling import sample
from diffusion_jax.timesteps import linspace
from tests.models.shared import scramble

FLOW = processes.rectified_flow()
KEY = jax.random.key(3)
REFERENCE = jax.random.normal(jax.random.key(5), (2, 4, 4, 3))
PLACES = ("one by one", "batched", "mesh")


def placed(stage, levels, place):
    mesh = make_mesh(data=1, pipe=levels, devices=jax.devices()[:levels]) if place == "mesh" else None
    return timestep_pipeline(stage, levels, mesh=mesh, batched=place == "batched")


def mixing(params, carry, x, level, cond, index):
    """What comes out tells which levels were passed in which order, with what kept there and which condition."""
    carry = {"sum": 0.5 * carry["sum"] + x.sum(), "count": carry["count"] + 1}
    return params * jnp.sin(x * (level + 1) + carry["sum"] + cond) + 0.1 * index, carry


def numbers(blocks):
    x, cond = jax.random.normal(KEY, (blocks, 5)), jnp.arange(float(blocks))
    return jnp.float32(1.5), x, cond


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("levels", [1, 3, 4])
def test_a_pipeline_is_the_sequential_schedule(levels, place):
    for blocks in (1, 2, 6):
        params, x, cond = numbers(blocks)
        empty = {"sum": jnp.zeros(levels), "count": jnp.zeros(levels, jnp.int32)}
        there, kept = jax.jit(sequential(mixing, levels))(params, empty, x, cond)
        pipeline = placed(mixing, levels, place)
        out, carry = jax.jit(pipeline.run)(params, empty, x, cond)
        np.testing.assert_allclose(out, there, atol=1e-6)
        np.testing.assert_allclose(carry["sum"], kept["sum"], atol=1e-6)
        # In a bubble nothing is kept: every level has seen every block once.
        np.testing.assert_array_equal(carry["count"], blocks)


@pytest.mark.parametrize("place", PLACES)
def test_one_block_enters_and_one_leaves_at_each_tick(place):
    levels, blocks = 3, 5
    params, x, cond = numbers(blocks + levels - 1)
    empty = {"sum": jnp.zeros(levels), "count": jnp.zeros(levels, jnp.int32)}
    pipeline = placed(mixing, levels, place)
    assert pipeline.ticks(blocks) == blocks + levels - 1 == 7
    index = jnp.array([0, 1, 2, 3, 4, NOTHING, NOTHING], jnp.int32)
    advance = jax.jit(pipeline.advance)
    start = pipeline.init(empty, x[0], cond[0])
    flight, out, left = advance(params, start, x, cond, index)
    np.testing.assert_array_equal(left, [NOTHING, NOTHING, 0, 1, 2, 3, 4])
    whole, _ = jax.jit(pipeline.run)(params, empty, x[:blocks], cond[:blocks])
    np.testing.assert_array_equal(out[levels - 1 :], whole)
    # A stream goes on from what is in flight.
    made = []
    state = start
    for tick in range(7):
        now = slice(tick, tick + 1)
        state, one, _ = advance(params, state, x[now], cond[now], index[now])
        made.append(one)
    np.testing.assert_array_equal(jnp.concatenate(made), out)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(flight), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_pp", "lcm"])
def test_blocks_of_a_plain_denoiser_are_samples(solver, place):
    solver = {"ddim": solvers.ddim, "dpm_solver_pp": solvers.dpm_solver_pp, "lcm": solvers.lcm}[solver]()
    denoiser, grid, levels = analytic(FLOW), linspace(4), 4
    mixture = gaussian_mixture(jnp.array([[-1.0, 0.0], [1.0, 0.5]]), 0.1)
    blocks = noise_blocks(KEY, denoiser, mixture, solver, grid, shape=(3, 2), blocks=5, cached=False)
    pipeline = placed(denoising_stage(denoiser, solver, grid), levels, place)
    made, _ = jax.jit(pipeline.run)(mixture, (), blocks)
    run = jax.jit(lambda key: sample(key, denoiser, mixture, solver, grid, shape=(3, 2)).x)
    for i in range(5):
        np.testing.assert_allclose(made.run.x[i], run(jax.random.fold_in(KEY, i)), atol=1e-5)
    np.testing.assert_array_equal(made.run.cost.evaluations, 4.0)


AVATAR = {"preset": "S/2", "width": 16, "depth": 2, "heads": 2, "block": 2, "window": 2} | {
    "temporal_positions": "rotary",
    "reference": True,
    "audio": True,
}


@functools.cache
def avatar():
    """A causal network with audio and a sink, its weights, and a denoiser that keeps keys and values."""
    network = models.video_dit(**AVATAR)
    x, cond = jnp.ones((2, 2, 4, 4, 3)), {"audio": jnp.ones((2, 2, 5)), "reference": jnp.ones((2, 4, 4, 3))}
    params = jax.jit(lambda key: scramble(network.init(key, x, jnp.ones(2), cond)))(jax.random.key(0))
    return params, cached(models.incremental(network), FLOW, sink_at=3.0)


def portrait(levels, blocks=5):
    """The sequential run of a stage, and what went into it."""
    params, denoiser = avatar()
    grid, shape = linspace(levels), (2, 2, 4, 4, 3)
    audio = jax.random.normal(jax.random.key(6), (blocks, 2, 2, 5))
    begin = {"audio": audio[0], "reference": REFERENCE}
    empty = at_each_level(jax.jit(denoiser.init)(params, jnp.zeros(shape), begin), levels)
    stage = caching_stage(denoiser, solvers.flow_euler(), grid)
    noise = noise_blocks(KEY, denoiser, params, solvers.flow_euler(), grid, shape=shape, blocks=blocks)
    return stage, (params, empty, noise, {"audio": audio})


@pytest.mark.parametrize("levels, place", [(1, "mesh"), (3, "one by one"), (3, "batched"), (4, "mesh")])
def test_a_stream_of_blocks_is_the_same_in_sequence_and_in_flight(levels, place):
    stage, inputs = portrait(levels)
    there, kept = jax.jit(sequential(stage, levels))(*inputs)
    made, caches = jax.jit(placed(stage, levels, place).run)(*inputs)
    # Another batch size may round otherwise; the same program on other devices may not.
    atol = 1e-5 if place == "batched" else 0.0
    np.testing.assert_allclose(made.run.x, there.run.x, rtol=0, atol=atol)
    for a, b in zip(jax.tree.leaves(caches), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)
    np.testing.assert_array_equal(caches.count, 5)
    np.testing.assert_array_equal(made.run.cost.evaluations, levels)


def test_later_noise_and_audio_do_not_reach_earlier_blocks():
    stage, (params, empty, noise, cond) = portrait(3)
    run = jax.jit(timestep_pipeline(stage, 3).run)
    there, _ = run(params, empty, noise, cond)
    other = noise._replace(run=noise.run._replace(x=noise.run.x.at[3].add(1.0)))
    for x, c in ((other, cond), (noise, {"audio": cond["audio"].at[3].add(1.0)})):
        again, _ = run(params, empty, x, c)
        np.testing.assert_array_equal(again.run.x[:3], there.run.x[:3])
        assert float(jnp.abs(again.run.x[3] - there.run.x[3]).max()) > 1e-4
    # The past does reach later blocks: caches are at work.
    assert float(jnp.abs(run(params, empty, other, cond)[0].run.x[4] - there.run.x[4]).max()) > 1e-5


def test_the_first_block_may_change_the_sink_of_the_others():
    """An adaptive sink: the first block runs alone, then its first frame is what all levels look at."""
    levels = 3
    stage, (params, empty, noise, cond) = portrait(levels)
    _, denoiser = avatar()

    def adapted(run):
        def head_and_tail(params, empty, noise, cond):
            head, tail = (jax.tree.map(part, (noise, cond)) for part in (lambda leaf: leaf[:1], lambda leaf: leaf[1:]))
            first, caches = run(params, empty, *head)
            x = first.run.x[0]
            fresh = denoiser.init(params, x, {"audio": cond["audio"][0], "reference": x[:, 0]}).sink
            rest, _ = run(params, caches._replace(sink=at_each_level(fresh, levels)), *tail, start=1)
            return jnp.concatenate([first.run.x, rest.run.x])

        return jax.jit(head_and_tail)

    pipeline = placed(stage, levels, "mesh")
    inputs = (params, empty, noise, cond)
    out = adapted(pipeline.run)(*inputs)
    np.testing.assert_allclose(out, adapted(sequential(stage, levels))(*inputs), atol=1e-5)
    plain = jax.jit(pipeline.run)(*inputs)[0].run.x
    np.testing.assert_allclose(out[0], plain[0], atol=1e-5)
    assert float(jnp.abs(out[1] - plain[1]).max()) > 1e-4
    assert pipeline.ticks(1) + pipeline.ticks(4) == 5 + 2 * (levels - 1)


def test_a_batch_may_be_sharded_beside_the_levels():
    denoiser, grid, levels = analytic(FLOW), linspace(4), 4
    mixture = gaussian_mixture(jnp.array([[-1.0, 0.0], [1.0, 0.5]]), 0.1)
    mesh = make_mesh(data=2, pipe=4)
    stage = denoising_stage(denoiser, solvers.ddim(), grid)
    blocks = noise_blocks(KEY, denoiser, mixture, solvers.ddim(), grid, shape=(4, 2), blocks=3, cached=False)
    there, _ = jax.jit(sequential(stage, levels))(mixture, (), blocks)
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    x = jax.device_put(blocks.run.x, split)
    blocks = blocks._replace(run=blocks.run._replace(x=x))
    made, _ = jax.jit(timestep_pipeline(stage, levels, mesh=mesh).run)(mixture, (), blocks)
    np.testing.assert_allclose(made.run.x, there.run.x, atol=1e-6)
    assert made.run.x.sharding.shard_shape(made.run.x.shape)[1] == 2


def test_pipelines_that_cannot_be():
    with pytest.raises(InvalidInput, match="one device a level is needed, 3"):
        timestep_pipeline(mixing, 3, mesh=make_mesh(data=2, pipe=4))
    with pytest.raises(InvalidInput, match="did you mean 'pipe'"):
        timestep_pipeline(mixing, 4, mesh=make_mesh(data=2, pipe=4), axis="pip")
    with pytest.raises(InvalidInput, match="at least 1"):
        timestep_pipeline(mixing, 0)


@functools.cache
def rolled_out(levels, history=None):
    """The jitted rollout of the avatar over a grid, and its carry before the first block."""
    denoiser = avatar()[1]
    _, (_, empty, _, _) = portrait(levels)
    if history is not None:
        empty = jax.tree.map(lambda leaf: leaf[0], empty)
    return jax.jit(rollout(denoiser, solvers.flow_euler(), linspace(levels), history)), empty


def test_a_rollout_through_all_levels_is_the_stream():
    stage, (params, empty, noise, cond) = portrait(3)
    there, kept = jax.jit(sequential(stage, 3))(params, empty, noise, cond)
    run, _ = rolled_out(3)
    x0, caches = run(params, empty, noise, cond)
    np.testing.assert_allclose(x0, there.run.x, atol=1e-5)
    for a, b in zip(jax.tree.leaves(caches), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # Left early, only the levels before have seen anything.
    _, caches = run(params, empty, noise, cond, jnp.int32(1))
    np.testing.assert_array_equal(caches.count, [5, 5, 0])


@pytest.mark.parametrize("history", [None, 0.0])
def test_gradients_reach_one_evaluation_of_each_block_and_not_the_history(history):
    _, (params, _, noise, cond) = portrait(3)
    run, empty = rolled_out(3, history)
    exit = jnp.int32(1)

    def second(params, carry, skip):
        x0, _ = run(params, carry, *jax.tree.map(lambda leaf: leaf[skip:2], (noise, cond)), exit)
        return (x0[-1] ** 2).sum()

    whole = jax.jit(jax.grad(second), static_argnums=2)(params, empty, 0)
    _, given = run(params, empty, *jax.tree.map(lambda leaf: leaf[:1], (noise, cond)), exit)
    alone = jax.jit(jax.grad(second), static_argnums=2)(params, given, 1)
    norm = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(alone))
    assert norm > 0
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * norm)


def test_one_level_with_a_clean_history_is_plain_autoregression():
    _, (params, empty, noise, cond) = portrait(1)
    network = models.video_dit(**AVATAR)
    run = jax.jit(rollout(cached(models.incremental(network), FLOW), solvers.flow_euler(), linspace(1), 0.0))
    # Three blocks, of which the last sees both others: the window is not felt.
    noise, audio = jax.tree.map(lambda leaf: leaf[:3], (noise, cond["audio"]))
    x0, _ = run(params, jax.tree.map(lambda leaf: leaf[0], empty), noise, {"audio": audio})
    for i in range(3):
        # The whole clip at once: clean blocks at time 0, the next one at time 1.
        x = jnp.concatenate([*x0[:i], noise.run.x[i]], axis=1)
        t = jnp.tile((jnp.arange(2 * i + 2) >= 2 * i).astype(jnp.float32), (2, 1))
        told = {"audio": jnp.concatenate([*audio[: i + 1]], axis=1), "reference": REFERENCE}
        output, _ = jax.jit(network.apply)(params, x, FLOW.network_time(t), told)
        np.testing.assert_allclose(x0[i], x[:, -2:] - output[:, -2:], atol=2e-5)


def test_a_history_is_a_time():
    with pytest.raises(InvalidInput, match="history"):
        rollout(avatar()[1], solvers.flow_euler(), linspace(2), 1.5)


def test_a_last_device_decodes_what_the_others_have_made():
    levels, blocks = 2, 3

    def decode(x):
        return jnp.tanh(x).sum(-1)

    denoiser, grid = analytic(FLOW), linspace(levels)
    mixture = gaussian_mixture(jnp.array([[-1.0, 0.0], [1.0, 0.5]]), 0.1)
    noise = noise_blocks(KEY, denoiser, mixture, solvers.ddim(), grid, shape=(3, 2), blocks=blocks, cached=False)
    stage = denoising_stage(denoiser, solvers.ddim(), grid)
    plain, _ = jax.jit(sequential(stage, levels))(mixture, (), noise)
    pipeline = placed(decoding_stage(stage, levels, decode), levels + 1, "mesh")
    assert pipeline.ticks(blocks) == blocks + levels
    (made, shown), _ = jax.jit(pipeline.run)(mixture, (), (noise, jnp.full((blocks, 3), jnp.nan)))
    np.testing.assert_array_equal(made.run.x, plain.run.x)
    np.testing.assert_allclose(shown, jax.vmap(decode)(plain.run.x), rtol=1e-6)


def test_clips_are_cut_into_blocks_and_put_together():
    clip = jnp.arange(2 * 6 * 3.0).reshape(2, 6, 3)
    blocks = blocks_of(clip, 2)
    assert blocks.shape == (3, 2, 2, 3)
    np.testing.assert_array_equal(blocks[1], clip[:, 2:4])
    np.testing.assert_array_equal(clip_of(blocks), clip)
