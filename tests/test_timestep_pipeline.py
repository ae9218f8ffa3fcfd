"""Laws of the timestep pipeline: it equals the sequential schedule, in ticks that are counted, on any devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax import solvers
from diffusion_jax.denoisers import analytic, gaussian_mixture
from diffusion_jax.distributed import NOTHING, make_mesh, sequential, timestep_pipeline
from diffusion_jax.errors import InvalidInput
from diffusion_jax.pipelined import (
    blocks_of,
    caching_stage,
    clip_of,
    decoding_stage,
    denoising_stage,
    noise_blocks,
)
from diffusion_jax.sampling import sample
from diffusion_jax.timesteps import linspace
from tests import shipped
from tests.models.shared import changed
from tests.portraits import BLOCKS, DENOISER, FLOW, KEY, LEVELS, portrait

PLACES = ("one by one", "batched", "mesh")


def placed(stage, levels, place):
    mesh = make_mesh(data=1, pipe=levels, devices=jax.devices()[:levels]) if place == "mesh" else None
    return timestep_pipeline(stage, levels, mesh=mesh, batched=place == "batched")


def mixing(params, carry, x, level, cond, index):
    """What comes out tells which levels were passed in which order, with what kept there and which condition."""
    carry = {"sum": 0.5 * carry["sum"] + x.sum(), "count": carry["count"] + 1}
    return params * jnp.sin(x * (level + 1) + carry["sum"] + cond) + 0.1 * index, carry


def numbers(levels, blocks):
    """Parameters, what the levels keep before the first block, blocks, conditions."""
    x = np.random.default_rng(3).standard_normal((blocks, 5)).astype(np.float32)
    empty = {"sum": np.zeros(levels, np.float32), "count": np.zeros(levels, np.int32)}
    return np.float32(1.5), empty, x, np.arange(blocks, dtype=np.float32)


@functools.cache
def mixed_in_sequence(levels, blocks):
    return jax.device_get(shipped.jit(sequential(mixing, levels))(*numbers(levels, blocks), 2))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("levels", "blocks"), [(1, 2), (3, 1), (3, 2), (3, 6), (4, 6)])
def test_a_pipeline_is_the_sequential_schedule(levels, blocks, place):
    there, kept = mixed_in_sequence(levels, blocks)
    out, carry = shipped.jit(placed(mixing, levels, place).run)(*numbers(levels, blocks), 2)
    np.testing.assert_allclose(out, there, atol=1e-6)
    np.testing.assert_allclose(carry["sum"], kept["sum"], atol=1e-6)
    # In a bubble nothing is kept: every level has seen every block once.
    np.testing.assert_array_equal(carry["count"], blocks)


@pytest.mark.parametrize("place", PLACES)
def test_one_block_enters_and_one_leaves_at_each_tick(place):
    levels, blocks = 3, 5
    params, empty, x, cond = numbers(levels, blocks + levels - 1)
    pipeline = placed(mixing, levels, place)
    assert pipeline.ticks(blocks) == blocks + levels - 1 == 7
    index = np.array([0, 1, 2, 3, 4, NOTHING, NOTHING], np.int32)
    advance = shipped.jit(pipeline.advance)
    start = jax.jit(pipeline.init)(empty, x[0], cond[0])
    flight, out, left = advance(params, start, x, cond, index)
    np.testing.assert_array_equal(left, [NOTHING, NOTHING, 0, 1, 2, 3, 4])
    whole, _ = shipped.jit(pipeline.run)(params, empty, x[:blocks], cond[:blocks])
    np.testing.assert_array_equal(np.asarray(out)[levels - 1 :], whole)
    # A stream goes on from what is in flight.
    made = []
    state = start
    for tick in range(7):
        now = slice(tick, tick + 1)
        state, one, _ = advance(params, state, x[now], cond[now], index[now])
        made.append(one)
    np.testing.assert_array_equal(np.concatenate(made), out)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(flight), strict=True):
        np.testing.assert_array_equal(a, b)


MIXTURE = jax.device_get(gaussian_mixture(np.array([[-1.0, 0.0], [1.0, 0.5]]), 0.1))
ORACLE = analytic(FLOW)
SOLVERS = {"ddim": solvers.ddim(), "dpm_solver_pp": solvers.dpm_solver_pp(), "lcm": solvers.lcm()}


def noise_of(solver, grid, shape, count):
    """Blocks for the analytic denoiser, as they enter."""
    return jax.jit(lambda: noise_blocks(KEY, ORACLE, MIXTURE, solver, grid, shape=shape, blocks=count, cached=False))()


@functools.cache
def alone(solver):
    """Five blocks, each the sample of its own run."""
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))
    run = jax.vmap(lambda key: sample(key, ORACLE, MIXTURE, SOLVERS[solver], linspace(4), shape=(3, 2)).x)
    return jax.device_get(jax.jit(lambda: run(keys(jnp.arange(5))))())


@pytest.mark.parametrize(
    ("solver", "place"),
    [("ddim", "one by one"), ("lcm", "mesh"), *[("dpm_solver_pp", place) for place in PLACES]],
)
def test_blocks_of_a_plain_denoiser_are_samples(solver, place):
    levels, grid = 4, linspace(4)
    blocks = noise_of(SOLVERS[solver], grid, (3, 2), 5)
    pipeline = placed(denoising_stage(ORACLE, SOLVERS[solver], grid), levels, place)
    made, _ = jax.jit(pipeline.run)(MIXTURE, (), blocks)
    np.testing.assert_allclose(made.run.x, alone(solver), atol=1e-5)
    np.testing.assert_array_equal(made.run.cost.evaluations, 4.0)


STAGE = caching_stage(DENOISER, solvers.flow_euler(), linspace(LEVELS))


@functools.cache
def flown(place):
    """`(params, carry, noise, cond) -> (run, carry)` of the stream in one of the places, or in sequence."""
    schedule = sequential(STAGE, LEVELS) if place == "in sequence" else placed(STAGE, LEVELS, place).run

    @jax.jit
    def program(*inputs):
        block, carry = schedule(*inputs)
        return block.run, carry

    return lambda *inputs: jax.device_get(program(*inputs))


@pytest.mark.parametrize("place", PLACES)
def test_a_stream_of_blocks_is_the_same_in_sequence_and_in_flight(place):
    there, kept = flown("in sequence")(*portrait())
    made, caches = flown(place)(*portrait())
    # Another batch size may round otherwise; the same program on other devices may not.
    atol = 1e-5 if place == "batched" else 0.0
    np.testing.assert_allclose(made.x, there.x, rtol=0, atol=atol)
    for a, b in zip(jax.tree.leaves(caches), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)
    np.testing.assert_array_equal(caches.count, BLOCKS)
    np.testing.assert_array_equal(made.cost.evaluations, LEVELS)


def test_later_noise_and_audio_do_not_reach_earlier_blocks():
    params, empty, noise, cond = portrait()

    def run(x, audio):
        block = noise._replace(run=noise.run._replace(x=x))
        return flown("one by one")(params, empty, block, {"audio": audio})[0].x

    x, audio = np.asarray(noise.run.x), cond["audio"]
    there, other, heard = run(x, audio), run(changed(x, 3, x[3] + 1), audio), run(x, changed(audio, 3, audio[3] + 1))
    for again in (other, heard):
        np.testing.assert_array_equal(again[:3], there[:3])
        assert np.abs(again[3] - there[3]).max() > 1e-4
    # The past does reach later blocks: caches are at work.
    assert np.abs(other[4] - there[4]).max() > 1e-5


def test_a_batch_may_be_sharded_beside_the_levels():
    grid, levels = linspace(4), 4
    mesh = make_mesh(data=2, pipe=4)
    stage = denoising_stage(ORACLE, solvers.ddim(), grid)
    blocks = noise_of(solvers.ddim(), grid, (4, 2), 3)
    there, _ = jax.jit(sequential(stage, levels))(MIXTURE, (), blocks)
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    x = jax.device_put(blocks.run.x, split)
    blocks = blocks._replace(run=blocks.run._replace(x=x))
    made, _ = jax.jit(timestep_pipeline(stage, levels, mesh=mesh).run)(MIXTURE, (), blocks)
    np.testing.assert_allclose(made.run.x, there.run.x, atol=1e-6)
    assert made.run.x.sharding.shard_shape(made.run.x.shape)[1] == 2


def test_pipelines_that_cannot_be():
    with pytest.raises(InvalidInput, match="one device a level is needed, 3"):
        timestep_pipeline(mixing, 3, mesh=make_mesh(data=2, pipe=4))
    with pytest.raises(InvalidInput, match="did you mean 'pipe'"):
        timestep_pipeline(mixing, 4, mesh=make_mesh(data=2, pipe=4), axis="pip")
    with pytest.raises(InvalidInput, match="at least 1"):
        timestep_pipeline(mixing, 0)


def test_a_last_device_decodes_what_the_others_have_made():
    levels, blocks = 2, 3

    def decode(x):
        return jnp.tanh(x).sum(-1)

    grid = linspace(levels)
    noise = noise_of(solvers.ddim(), grid, (3, 2), blocks)
    stage = denoising_stage(ORACLE, solvers.ddim(), grid)
    plain, _ = jax.jit(sequential(stage, levels))(MIXTURE, (), noise)
    pipeline = placed(decoding_stage(stage, levels, decode), levels + 1, "mesh")
    assert pipeline.ticks(blocks) == blocks + levels
    (made, shown), _ = jax.jit(pipeline.run)(MIXTURE, (), (noise, np.full((blocks, 3), np.nan, np.float32)))
    np.testing.assert_array_equal(made.run.x, plain.run.x)
    np.testing.assert_allclose(shown, np.tanh(np.asarray(plain.run.x)).sum(-1), rtol=1e-6)


def test_clips_are_cut_into_blocks_and_put_together():
    clip = np.arange(2 * 6 * 3.0, dtype=np.float32).reshape(2, 6, 3)
    blocks, whole = jax.jit(lambda clip: (blocks_of(clip, 2), clip_of(blocks_of(clip, 2))))(clip)
    assert blocks.shape == (3, 2, 2, 3)
    np.testing.assert_array_equal(blocks[1], clip[:, 2:4])
    np.testing.assert_array_equal(whole, clip)
