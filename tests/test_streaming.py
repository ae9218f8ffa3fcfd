"""Laws of rolling buffers: bookkeeping, equal runs, statistics of the steady state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax import processes, solvers, timesteps
from diffusion_jax.denoisers import analytic, gaussian_clip, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.randomness import fold, sample_keys
from diffusion_jax.sampling import sample
from diffusion_jax.streaming import rolling
from diffusion_jax.timesteps import linspace
from diffusion_jax.typing import Cost, Denoiser, Solver
from tests.models.shared import now

KEY = jax.random.key(6)
FLOW = processes.rectified_flow()
ORACLE = analytic(FLOW)
INDEX = np.arange(3)


def calls(buffer, params, stream, count):
    """The stream after `count` calls, and what they gave: [count, B, chunk, ...]; in a compiled program."""
    return jax.lax.scan(lambda s, _: buffer.advance(params, s), stream, None, count)


def counting():
    """A solver whose x is the number of steps that an entry has made since it was noise."""

    def step(process, denoise, carry, state, x, step, key):
        _, carry = denoise(carry, x, step)
        return jnp.where(step.t[..., None] == 1, 0.0, x) + 1.0, state, carry

    return Solver(lambda process, x, grid: (), step)


def unmoved():
    """A denoiser that takes what it is shown for clean."""

    def apply(params, carry, x, step, cond):
        prediction = FLOW.from_x0(x, x, jnp.broadcast_to(step.t, x.shape[:2]))
        return prediction._replace(cost=Cost(jnp.float32(1), jnp.float32(1))), carry

    return Denoiser(lambda params, x, cond: (), apply, FLOW)


@pytest.mark.parametrize(
    ("steps", "entries", "chunk", "past", "given_past"),
    [
        *[(12, 12, 3, 0, False), (12, 8, 2, 1, False), (12, 8, 2, 1, True), (10, 11, 3, 1, False)],
        *[(10, 11, 3, 1, True), (4, 4, 4, 0, False), (7, 7, 2, 2, False), (7, 7, 2, 2, True)],
    ],
)
def test_every_entry_makes_all_its_steps_before_it_leaves(steps, entries, chunk, past, given_past):
    chunks = (entries - past) // chunk

    def made():
        buffer = rolling(
            unmoved(), counting(), linspace(steps), entries=entries, chunk=chunk, past=past, given_past=given_past
        )
        stream = buffer.prime(KEY, jnp.zeros((2, entries, 1)))
        stream, out = calls(buffer, None, stream, chunks + 3)
        return stream.run, stream.calls, out, buffer.plan

    run, number, out, plan = now(made)
    np.testing.assert_array_equal(out[chunks:], float(steps))
    assert out.shape == (chunks + 3, 2, chunk, 1)
    evaluations = plan.shape[0] - 1
    assert evaluations == -(-steps // chunks)
    assert float(run.cost.evaluations) == evaluations * (chunks + 3) and int(number) == chunks + 3
    # At rest each entry has made the steps that its level says.
    made = run.x[0, past:, 0]
    left = np.round(steps * plan[0, 0, past:])
    moving = left < steps
    np.testing.assert_array_equal(made[moving], (steps - left)[moving])


@pytest.mark.parametrize("solver", [solvers.ddim(1.0), solvers.unipc(3)], ids=["ddim", "unipc"])
def test_one_chunk_is_full_sampling_of_each(solver):
    def made():
        clip, grid = gaussian_clip(4), linspace(6)
        buffer = rolling(ORACLE, solver, grid, entries=4, chunk=4)
        _, out = calls(buffer, clip, buffer.prime(KEY, jnp.ones((3, 4, 1))), 3)
        plan = timesteps.synchronous(grid, 4)

        def alone(number):
            return sample(jax.random.fold_in(KEY, number), ORACLE, clip, solver, plan, shape=(3, 4, 1)).x

        return out, jax.lax.map(alone, jnp.arange(3))

    out, alone = now(made)
    np.testing.assert_allclose(out, alone, atol=2e-6)


@pytest.mark.parametrize(
    "solver", [solvers.dpm_solver_pp(2), solvers.unipc(3), solvers.heun()], ids=["dpm", "unipc", "heun"]
)
def test_what_a_solver_remembers_moves_with_the_entries(solver):
    """Entries that know nothing of each other make the run that each would make alone."""
    pushed_at_the_end_of = 2

    def made():
        grid, apart = linspace(8), gaussian_mixture(np.full((1, 8, 1), 0.3), 0.7)
        buffer = rolling(ORACLE, solver, grid, entries=8, chunk=2)
        _, out = calls(buffer, apart, buffer.prime(KEY, jnp.zeros((3, 8, 1)), index=INDEX), 7)
        keys = fold(sample_keys(fold(KEY, pushed_at_the_end_of + 1), jnp.asarray(INDEX)), 0)
        short = gaussian_mixture(np.full((1, 2, 1), 0.3), 0.7)
        return out, sample(KEY, ORACLE, short, solver, grid, x_init=FLOW.prior(keys, (3, 2, 1))).x

    out, alone = now(made)
    np.testing.assert_allclose(out[pushed_at_the_end_of + 4], alone, atol=1e-5)


def chunk_errors(out, size=3):
    target = 0.9 ** np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    return [np.abs(np.cov(np.asarray(one[..., 0]).T) - target).max() for one in out]


def boundary(out):
    """The correlation between the last entry of a chunk and the first of the next."""
    return np.corrcoef(np.asarray(out[-2, :, -1, 0]), np.asarray(out[-1, :, 0, 0]))[0, 1]


def test_the_steady_state_of_a_stream_of_gaussian_actions():
    """Chunks of 3, four in the buffer, 100 steps: the figures computed for SDP."""
    clip, grid, size = jax.device_get(gaussian_clip(12)), linspace(100), 10_000
    buffer = rolling(ORACLE, solvers.ddim(), grid, entries=12, chunk=3)
    assert buffer.plan.shape == (26, 1, 12)
    advance, prime = jax.jit(partial(buffer.advance, clip)), jax.jit(partial(buffer.prime, KEY))

    def called(advance, stream, count):
        out = []
        for _ in range(count):
            stream, chunk = advance(stream)
            out.append(np.asarray(chunk))
        return np.stack(out)

    out = called(advance, prime(np.zeros((size, 12, 1), np.float32)), 10)
    errors = chunk_errors(out)
    assert errors[0] == pytest.approx(0.94, abs=0.04) and errors[3] == pytest.approx(0.33, abs=0.05)
    assert errors[-1] < 0.08
    assert boundary(out) == pytest.approx(0.84, abs=0.02)
    # A primer that is a whole sample is right from the first call.
    whole = now(lambda: sample(jax.random.key(1), ORACLE, clip, solvers.ddim(), grid, shape=(size, 12, 1)).x)
    out = called(advance, prime(whole), 3)
    assert max(chunk_errors(out)) < 0.08
    # An entry that stays, clean, tells the rest where it was left.
    longer = jax.device_get(gaussian_clip(13))
    with_past = rolling(ORACLE, solvers.ddim(), grid, entries=13, chunk=3, past=1, given_past=True)
    known = np.concatenate([whole[:, :1], whole], axis=1)
    out = called(jax.jit(partial(with_past.advance, longer)), jax.jit(partial(with_past.prime, KEY))(known), 8)
    assert boundary(out) == pytest.approx(0.90, abs=0.01) and chunk_errors(out)[-1] < 0.08


def test_a_past_that_joins_the_first_chunk_is_noised_again():
    def made(size, count, given_past):
        def run():
            clip, grid = gaussian_clip(9), linspace(8)
            buffer = rolling(ORACLE, solvers.dpm_solver_pp(2), grid, entries=9, chunk=2, past=1, given_past=given_past)
            stream, out = calls(buffer, clip, buffer.prime(KEY, jnp.zeros((size, 9, 1))), count)
            return stream.run.x, out, buffer.plan[0, 0, 0]

        return now(run)

    x, out, level = made(4000, 8, False)
    past, left = x[:, 0, 0], out[-1, :, -1, 0]
    residual = past - (1 - level) * left
    assert level == 0.25 and residual.std() == pytest.approx(level, rel=0.05)
    assert abs(np.corrcoef(residual, left)[0, 1]) < 0.05
    x, out, _ = made(5, 3, True)
    np.testing.assert_array_equal(x[:, 0], out[-1, :, -1])


def told():
    """A denoiser that says its condition."""

    def apply(params, carry, x, step, cond):
        x0 = jnp.broadcast_to(cond["pose"][:, None, None], x.shape)
        return FLOW.from_x0(x0, x, jnp.broadcast_to(step.t, x.shape[:2])), carry

    return Denoiser(lambda params, x, cond: (), apply, FLOW)


def test_a_control_loop_is_one_program_of_the_latest_observation_on_eight_devices():
    traces = []

    def counted(params, carry, x, step, cond):
        traces.append(1)
        return told().apply(params, carry, x, step, cond)

    buffer = rolling(told()._replace(apply=counted), solvers.ddim(), linspace(8), entries=8, chunk=2)
    poses = np.arange(80, dtype=np.float32).reshape(5, 16)
    stream = jax.jit(buffer.prime)(KEY, np.zeros((16, 8, 1), np.float32))
    advance = jax.jit(buffer.advance)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, rows if leaf.shape[:1] == (16,) else whole), stream)
    one, eight = stream, placed
    for pose in poses:
        one, here = advance(None, one, {"pose": pose})
        eight, there = advance(None, eight, {"pose": jax.device_put(pose, rows)})
        np.testing.assert_array_equal(np.asarray(here)[..., 0], np.repeat(pose[:, None], 2, axis=1))
        np.testing.assert_allclose(there, here, atol=1e-6)
    assert there.sharding.spec[0] == "data"
    before = len(traces)
    advance(None, one, {"pose": poses[0] + 1})
    assert len(traces) == before
    loop = jax.jit(lambda *args: jax.lax.scan(lambda s, pose: buffer.advance(None, s, {"pose": pose}), *args))
    looped, chunks = jax.device_get(loop(stream, poses))
    np.testing.assert_allclose(looped.run.x, one.run.x, atol=1e-6)
    np.testing.assert_array_equal(chunks[-1], here)


def test_sample_i_of_a_stream_is_the_same_in_any_batch():
    clip = jax.device_get(gaussian_clip(6))
    buffer = rolling(ORACLE, solvers.ddpm(), linspace(6), entries=6, chunk=2)
    index = np.arange(5)

    def batch(index):
        stream = buffer.prime(KEY, jnp.ones((len(index), 6, 1)), index=index)
        return calls(buffer, clip, stream, 4)[1]

    many, few = now(lambda: (batch(index), batch(index[3:])))
    np.testing.assert_allclose(few, many[:, 3:], atol=1e-5)
    # One stream an environment, any of which may begin anew without the others.
    begun = jax.jit(jax.vmap(lambda i: buffer.prime(KEY, jnp.ones((1, 6, 1)), index=i[None])))(index)
    advance = jax.jit(jax.vmap(lambda stream: buffer.advance(clip, stream)))
    alone, out = begun, []
    for _ in range(4):
        alone, chunk = advance(alone)
        out.append(np.asarray(chunk))
    np.testing.assert_allclose(np.stack(out)[:, :, 0], many, atol=1e-5)
    mixed = jax.jit(lambda new, old: jax.tree.map(lambda new, old: old.at[2].set(new[0]), new, old))(begun, alone)
    np.testing.assert_allclose(np.asarray(advance(mixed)[1])[2, 0], many[0, 0], atol=1e-5)


def test_a_stream_of_several_modalities():
    process = processes.JointProcess({"action": FLOW, "sound": processes.cosine()})

    def made():
        world = gaussian_mixture({"action": np.zeros((1, 6, 1)), "sound": np.ones((1, 6, 2))}, 0.5)
        buffer = rolling(analytic(process), solvers.unipc(2), linspace(6), entries=6, chunk=2, past=1)
        known = {"action": jnp.zeros((3, 6, 1)), "sound": jnp.ones((3, 6, 2))}
        stream, out = calls(buffer, world, buffer.prime(KEY, known), 4)
        return stream.run.x, out

    x, out = now(made)
    assert out["action"].shape == (4, 3, 2, 1) and out["sound"].shape == (4, 3, 2, 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((x, out)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rolling(ORACLE, solvers.ddim(), linspace(4)[:-1], entries=4, chunk=2), "must end at 0"),
        (lambda: rolling(ORACLE, solvers.ddim(), linspace(4), entries=4, chunk=5), "must fit into the 4 entries"),
        (
            lambda: rolling(ORACLE, solvers.ddim(), linspace(4), entries=4, chunk=2).prime(KEY, np.zeros((2, 3, 1))
            ),
            "a buffer of 4 entries",
        ),
    ],
)  # fmt: skip
def test_wrong_values_are_named(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
