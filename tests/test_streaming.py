"""Laws of streams: bookkeeping, equal runs, statistics of the steady state, windows and chains against `sample`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax import models, processes, solvers, timesteps
from diffusion_jax.denoisers import analytic, denoiser, gaussian_clip, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.randomness import fold, sample_keys
from diffusion_jax.sampling import sample
from diffusion_jax.streaming import rolling, sample_autoregressive, sample_chained, sample_windowed
from diffusion_jax.timesteps import linspace
from diffusion_jax.typing import Denoiser, Solver
from tests.denoisers.tiny import remembering
from tests.models.shared import scramble

KEY = jax.random.key(6)
FLOW = processes.rectified_flow()
ORACLE = analytic(FLOW)
INDEX = jnp.arange(3)


def calls(buffer, params, stream, count):
    """The stream after `count` calls, and what they gave: [count, B, chunk, ...]."""
    return jax.jit(lambda stream: jax.lax.scan(lambda s, _: buffer.advance(params, s), stream, None, count))(stream)


def counting():
    """A solver whose x is the number of steps that an entry has made since it was noise."""

    def step(process, denoise, carry, state, x, step, key):
        _, carry = denoise(carry, x, step)
        return jnp.where(step.t[..., None] == 1, 0.0, x) + 1.0, state, carry

    return Solver(lambda process, x, grid: (), step)


@pytest.mark.parametrize("given_past", [False, True])
@pytest.mark.parametrize(
    ("steps", "entries", "chunk", "past"), [(12, 12, 3, 0), (12, 8, 2, 1), (10, 11, 3, 1), (4, 4, 4, 0), (7, 7, 2, 2)]
)
def test_every_entry_makes_all_its_steps_before_it_leaves(steps, entries, chunk, past, given_past):
    buffer = rolling(
        ORACLE, counting(), linspace(steps), entries=entries, chunk=chunk, past=past, given_past=given_past
    )
    chunks = (entries - past) // chunk
    clip = gaussian_clip(entries)
    stream = buffer.prime(KEY, jnp.zeros((2, entries, 1)))
    stream, out = calls(buffer, clip, stream, chunks + 3)
    np.testing.assert_array_equal(out[chunks:], float(steps))
    assert out.shape == (chunks + 3, 2, chunk, 1)
    evaluations = buffer.plan.shape[0] - 1
    assert evaluations == -(-steps // chunks)
    assert float(stream.run.cost.evaluations) == evaluations * (chunks + 3) and int(stream.calls) == chunks + 3
    # At rest each entry has made the steps that its level says.
    made = np.asarray(stream.run.x)[0, past:, 0]
    left = np.round(steps * np.asarray(buffer.plan[0, 0, past:]))
    moving = left < steps
    np.testing.assert_array_equal(made[moving], (steps - left)[moving])


@pytest.mark.parametrize("solver", [solvers.ddim(1.0), solvers.unipc(3)], ids=["ddim", "unipc"])
def test_one_chunk_is_full_sampling_of_each(solver):
    clip, grid = gaussian_clip(4), linspace(6)
    buffer = rolling(ORACLE, solver, grid, entries=4, chunk=4)
    _, out = calls(buffer, clip, buffer.prime(KEY, jnp.ones((3, 4, 1))), 3)
    for number in range(3):
        plan = timesteps.synchronous(grid, 4)
        alone = sample(jax.random.fold_in(KEY, number), ORACLE, clip, solver, plan, shape=(3, 4, 1))
        np.testing.assert_allclose(out[number], alone.x, atol=2e-6)


@pytest.mark.parametrize(
    "solver", [solvers.dpm_solver_pp(2), solvers.unipc(3), solvers.heun()], ids=["dpm", "unipc", "heun"]
)
def test_what_a_solver_remembers_moves_with_the_entries(solver):
    """Entries that know nothing of each other make the run that each would make alone."""
    grid, apart = linspace(8), gaussian_mixture(np.full((1, 8, 1), 0.3), 0.7)
    buffer = rolling(ORACLE, solver, grid, entries=8, chunk=2)
    _, out = calls(buffer, apart, buffer.prime(KEY, jnp.zeros((3, 8, 1)), index=INDEX), 7)
    pushed_at_the_end_of = 2
    keys = fold(sample_keys(fold(KEY, pushed_at_the_end_of + 1), INDEX), 0)
    short = gaussian_mixture(np.full((1, 2, 1), 0.3), 0.7)
    alone = sample(KEY, ORACLE, short, solver, grid, x_init=FLOW.prior(keys, (3, 2, 1))).x
    np.testing.assert_allclose(out[pushed_at_the_end_of + 4], alone, atol=1e-5)


def chunk_errors(out, size=3):
    target = 0.9 ** np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    return [np.abs(np.cov(np.asarray(one[..., 0]).T) - target).max() for one in out]


def boundary(out):
    """The correlation between the last entry of a chunk and the first of the next."""
    return np.corrcoef(np.asarray(out[-2, :, -1, 0]), np.asarray(out[-1, :, 0, 0]))[0, 1]


def test_the_steady_state_of_a_stream_of_gaussian_actions():
    """Chunks of 3, four in the buffer, 100 steps: the figures computed for SDP."""
    clip, grid, size = gaussian_clip(12), linspace(100), 10_000
    buffer = rolling(ORACLE, solvers.ddim(), grid, entries=12, chunk=3)
    assert buffer.plan.shape == (26, 1, 12)
    _, out = calls(buffer, clip, buffer.prime(KEY, jnp.zeros((size, 12, 1))), 10)
    errors = chunk_errors(out)
    assert errors[0] == pytest.approx(0.94, abs=0.04) and errors[3] == pytest.approx(0.33, abs=0.05)
    assert errors[-1] < 0.08
    assert boundary(out) == pytest.approx(0.84, abs=0.02)
    # A primer that is a whole sample is right from the first call.
    whole = jax.jit(lambda: sample(jax.random.key(1), ORACLE, clip, solvers.ddim(), grid, shape=(size, 12, 1)).x)()
    _, out = calls(buffer, clip, buffer.prime(KEY, whole), 3)
    assert max(chunk_errors(out)) < 0.08
    # An entry that stays, clean, tells the rest where it was left.
    longer = gaussian_clip(13)
    with_past = rolling(ORACLE, solvers.ddim(), grid, entries=13, chunk=3, past=1, given_past=True)
    known = jnp.concatenate([whole[:, :1], whole], axis=1)
    _, out = calls(with_past, longer, with_past.prime(KEY, known), 8)
    assert boundary(out) == pytest.approx(0.90, abs=0.01) and chunk_errors(out)[-1] < 0.08


def test_a_past_that_joins_the_first_chunk_is_noised_again():
    clip, grid = gaussian_clip(9), linspace(8)
    buffer = rolling(ORACLE, solvers.dpm_solver_pp(2), grid, entries=9, chunk=2, past=1)
    stream = buffer.prime(KEY, jnp.zeros((4000, 9, 1)))
    stream, out = calls(buffer, clip, stream, 8)
    past, left = np.asarray(stream.run.x[:, 0, 0]), np.asarray(out[-1, :, -1, 0])
    level = float(buffer.plan[0, 0, 0])
    residual = past - (1 - level) * left
    assert level == 0.25 and residual.std() == pytest.approx(level, rel=0.05)
    assert abs(np.corrcoef(residual, left)[0, 1]) < 0.05
    kept = rolling(ORACLE, solvers.dpm_solver_pp(2), grid, entries=9, chunk=2, past=1, given_past=True)
    stream, out = calls(kept, clip, kept.prime(KEY, jnp.zeros((5, 9, 1))), 3)
    np.testing.assert_array_equal(stream.run.x[:, 0], out[-1, :, -1])


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
    poses = jnp.arange(80.0).reshape(5, 16)
    stream = buffer.prime(KEY, jnp.zeros((16, 8, 1)))
    advance = jax.jit(buffer.advance)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, rows if leaf.shape[:1] == (16,) else whole), stream)
    one, eight = stream, placed
    for pose in poses:
        one, here = advance(None, one, {"pose": pose})
        eight, there = advance(None, eight, {"pose": jax.device_put(pose, rows)})
        np.testing.assert_array_equal(here[..., 0], np.repeat(pose[:, None], 2, axis=1))
        np.testing.assert_allclose(there, here, atol=1e-6)
    assert there.sharding.spec[0] == "data"
    before = len(traces)
    advance(None, one, {"pose": poses[0] + 1})
    assert len(traces) == before
    looped, chunks = jax.lax.scan(lambda s, pose: buffer.advance(None, s, {"pose": pose}), stream, poses)
    np.testing.assert_allclose(looped.run.x, one.run.x, atol=1e-6)
    np.testing.assert_array_equal(chunks[-1], here)


def test_sample_i_of_a_stream_is_the_same_in_any_batch():
    clip = gaussian_clip(6)
    buffer = rolling(ORACLE, solvers.ddpm(), linspace(6), entries=6, chunk=2)
    index = jnp.arange(5)
    _, many = calls(buffer, clip, buffer.prime(KEY, jnp.ones((5, 6, 1)), index=index), 4)
    _, few = calls(buffer, clip, buffer.prime(KEY, jnp.ones((2, 6, 1)), index=index[3:]), 4)
    np.testing.assert_allclose(few, many[:, 3:], atol=1e-5)
    # One stream an environment, any of which may begin anew without the others.
    alone = jax.vmap(lambda i: buffer.prime(KEY, jnp.ones((1, 6, 1)), index=i[None]))(index)
    alone, out = jax.jit(
        lambda s: jax.lax.scan(lambda s, _: jax.vmap(lambda s: buffer.advance(clip, s))(s), s, None, 4)
    )(alone)
    np.testing.assert_allclose(out[:, :, 0], many, atol=1e-5)
    begun = buffer.prime(KEY, jnp.ones((1, 6, 1)), index=index[:1])
    mixed = jax.tree.map(lambda new, old: old.at[2].set(new) if isinstance(old, jax.Array) else old, begun, alone)
    again = jax.vmap(lambda s: buffer.advance(clip, s))(mixed)[1]
    np.testing.assert_allclose(again[2, 0], many[0, 0], atol=1e-5)


def test_a_stream_of_several_modalities():
    process = processes.JointProcess({"action": FLOW, "sound": processes.cosine()})
    world = gaussian_mixture({"action": np.zeros((1, 6, 1)), "sound": np.ones((1, 6, 2))}, 0.5)
    buffer = rolling(analytic(process), solvers.unipc(2), linspace(6), entries=6, chunk=2, past=1)
    known = {"action": jnp.zeros((3, 6, 1)), "sound": jnp.ones((3, 6, 2))}
    stream, out = calls(buffer, world, buffer.prime(KEY, known), 4)
    assert out["action"].shape == (4, 3, 2, 1) and out["sound"].shape == (4, 3, 2, 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((stream.run.x, out)))


@pytest.mark.parametrize("solver", [solvers.ddim(1.0), solvers.unipc(3)], ids=["ddim", "unipc"])
def test_a_window_over_everything_is_the_plain_run(solver):
    clip, plan = gaussian_clip(5), timesteps.staircase(linspace(6), 5, 2)
    x = FLOW.prior(KEY, (3, 5, 1))
    made = remembering(ORACLE)
    whole = sample(KEY, made, clip, solver, plan, x_init=x)
    seen = sample_windowed(KEY, made, clip, solver, plan, 5, x_init=x)
    np.testing.assert_allclose(seen.x, whole.x, atol=2e-6)
    assert float(seen.cost.evaluations) == float(whole.cost.evaluations) == 6 + 4 * 2


@pytest.mark.parametrize("solver", [solvers.ddim(), solvers.dpm_solver_pp(2)], ids=["ddim", "dpm"])
def test_a_window_that_shows_the_last_done_frame_loses_nothing_of_a_markov_clip(solver):
    """What it hides is either pure noise or shielded by a clean frame. Twelve frames through a window of five."""
    steps, width, window = 8, 2, 5
    clip = gaussian_clip(window)
    plan = timesteps.staircase(linspace(steps), 12, width)
    x = FLOW.prior(KEY, (3, 12, 1))
    whole = sample(KEY, ORACLE, gaussian_clip(12), solver, plan, x_init=x).x
    seen = sample_windowed(KEY, ORACLE, clip, solver, plan, window, x_init=x)
    np.testing.assert_allclose(seen.x, whole, atol=2e-5)
    assert float(seen.cost.evaluations) == steps + 11 * width
    # Starts are data: a jitted driver takes them and the plan as arguments.
    starts = timesteps.windows(plan, window)
    driver = jax.jit(
        lambda plan, starts: sample_windowed(KEY, ORACLE, clip, solver, plan, window, x_init=x, starts=starts).x
    )
    np.testing.assert_allclose(driver(plan, starts), seen.x, atol=1e-5)


def test_frames_outside_of_the_window_are_not_touched_and_conditions_follow_it():
    plan = timesteps.staircase(linspace(4), 9, 2)
    x = FLOW.prior(KEY, (2, 9, 1))
    poses = jnp.arange(9.0)

    def apply(params, carry, x, step, cond):
        return FLOW.from_x0(
            jnp.broadcast_to(cond[None, :, None], x.shape), x, jnp.broadcast_to(step.t, x.shape[:2])
        ), carry

    made = Denoiser(lambda params, x, cond: (), apply, FLOW)
    out = sample_windowed(
        KEY,
        made,
        None,
        solvers.ddim(),
        plan,
        3,
        x_init=x,
        cond=lambda start: jax.lax.dynamic_slice(poses, (start,), (3,)),
    ).x
    np.testing.assert_array_equal(out[..., 0], np.broadcast_to(poses, (2, 9)))


def test_a_chain_of_chunks_is_a_long_clip():
    frames, overlap, chunks, grid = 4, 1, 4, linspace(200)
    clip = gaussian_clip(frames)
    run = jax.jit(
        lambda: sample_chained(
            KEY, ORACLE, clip, solvers.ddim(), grid, shape=(8000, frames, 1), chunks=chunks, overlap=overlap
        )
    )()
    assert run.x.shape == (8000, 13, 1) and float(run.cost.evaluations) == 800
    target = 0.9 ** np.abs(np.subtract.outer(np.arange(13), np.arange(13)))
    np.testing.assert_allclose(np.cov(np.asarray(run.x[..., 0]).T), target, atol=0.06)
    first = sample(jax.random.fold_in(KEY, 0), ORACLE, clip, solvers.ddim(), grid, shape=(8000, frames, 1)).x
    np.testing.assert_allclose(run.x[:, :frames], first, atol=1e-4)


def test_a_chain_by_replacement_keeps_what_it_replaces():
    """The first chunk is the plain run; a model that sees no level but its own needs no other."""
    clip, grid, shape = gaussian_clip(4), linspace(50), (4000, 4, 1)
    options = {"shape": shape, "overlap": 2, "replaced": True}
    run = jax.jit(lambda: sample_chained(KEY, ORACLE, clip, solvers.ddim(), grid, chunks=3, **options))()
    first = sample(jax.random.fold_in(KEY, 0), ORACLE, clip, solvers.ddim(), grid, shape=shape).x
    np.testing.assert_allclose(run.x[:, :4], first, atol=1e-4)
    assert run.x.shape == (4000, 8, 1) and float(run.cost.evaluations) == 150
    # New frames follow the old ones, though less closely than they do in the data (0.9).
    correlation = np.corrcoef(np.asarray(run.x[..., 0]).T)
    assert 0.5 < correlation[3, 4] < 0.9 and 0.5 < correlation[5, 6] < 0.9
    context = first[:, 2:]
    long = sample_chained(KEY, ORACLE, clip, solvers.ddim(), grid, chunks=1, context=context, **options).x
    np.testing.assert_array_equal(long[:, :2], context)
    assert np.corrcoef(np.asarray(long[:, 1:3, 0]).T)[0, 1] > 0.5


def test_a_chain_goes_on_from_its_context():
    clip, grid = gaussian_clip(4), linspace(6)
    context = jax.random.normal(KEY, (3, 2, 1))
    args = (KEY, ORACLE, clip, solvers.dpm_solver_pp(2), grid)
    options = {"shape": (3, 4, 1), "overlap": 2, "context": context}
    long = sample_chained(*args, **options, chunks=3).x
    assert long.shape == (3, 8, 1)
    np.testing.assert_array_equal(long[:, :2], context)
    plan = timesteps.frames(grid, 4, range(2))
    known = jnp.zeros((3, 4, 1)).at[:, :2].set(context)
    x_init = timesteps.noised_start(jax.random.fold_in(KEY, 0), FLOW, plan, known)
    one = sample(jax.random.fold_in(KEY, 0), ORACLE, clip, solvers.dpm_solver_pp(2), plan, x_init=x_init).x
    np.testing.assert_allclose(long[:, :4], one, atol=1e-5)
    soft = sample_chained(*args, **options, chunks=2, level=0.2).x
    assert soft.shape == (3, 6, 1) and np.isfinite(soft).all()


@pytest.mark.parametrize(("attention", "block"), [("joint", 1), ("factorised", 2)])
def test_kept_keys_are_the_staircase_of_full_width(attention, block):
    """AR-Diffusion at s = S: each frame runs alone on the clean ones before it, which need not be evaluated again."""
    steps, frames = 3, 4
    network = models.video_dit(
        "S/2", width=16, depth=2, heads=2, attention=attention, block=block, temporal_positions="rotary"
    )
    process = processes.cosine(prediction="x0")
    x = process.prior(KEY, (2, frames, 4, 4, 2))
    params = jax.jit(lambda key: scramble(network.init(key, x, jnp.zeros(2), None)))(KEY)
    plan = timesteps.staircase(linspace(steps), frames, steps, block)
    run = jax.jit(lambda params, x: sample(KEY, denoiser(network, process), params, solvers.ddim(), plan, x_init=x))
    whole = run(params, x)
    kept = models.incremental(network, window=frames // block)
    alone = jax.jit(
        lambda params, x: sample_autoregressive(
            KEY, kept, process, params, solvers.ddim(), linspace(steps), x_init=x, block=block
        )
    )(params, x)
    np.testing.assert_allclose(alone.x, whole.x, atol=2e-5 * float(jnp.abs(whole.x).max()))
    assert float(whole.cost.evaluations) == steps * frames // block
    assert float(alone.cost.evaluations) == (steps + 1) * frames // block
    # What comes later is not seen.
    other = run(params, x.at[:, block:].add(1.0)).x
    changed = np.abs(np.asarray(other - whole.x)).max(axis=(0, 2, 3, 4))
    assert (changed[:block] == 0).all() and (changed[block:] > 1e-4).all()
    with pytest.raises(InvalidInput, match="must divide the 4 frames"):
        sample_autoregressive(KEY, kept, process, params, solvers.ddim(), linspace(steps), x_init=x, block=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rolling(ORACLE, solvers.ddim(), linspace(4)[:-1], entries=4, chunk=2), "must end at 0"),
        (lambda: rolling(ORACLE, solvers.ddim(), linspace(4), entries=4, chunk=5), "must fit into the 4 entries"),
        (
            lambda: rolling(ORACLE, solvers.ddim(), linspace(4), entries=4, chunk=2).prime(KEY, jnp.zeros((2, 3, 1))
            ),
            "a buffer of 4 entries",
        ),
        (
            lambda: sample_windowed(
                KEY, ORACLE, gaussian_clip(2), solvers.ddim(), timesteps.staircase(linspace(8), 6, 2), 2,
                x_init=jnp.zeros((1, 6, 1)),
            ),
            "steps <= window",
        ),
        (
            lambda: sample_windowed(
                KEY, ORACLE, gaussian_clip(2), solvers.ddim(), timesteps.staircase(linspace(8), 6, 2), 2,
                x_init=jnp.zeros((1, 6, 1)), starts=jnp.zeros(3),
            ),
            "starts.shape",
        ),
        (
            lambda: sample_chained(
                KEY, ORACLE, gaussian_clip(4), solvers.ddim(), linspace(4), shape=(1, 4, 1), chunks=2, overlap=4
            ),
            "overlap is 4",
        ),
        (
            lambda: sample_chained(
                KEY, ORACLE, gaussian_clip(4), solvers.ddim(), linspace(4), shape=(1, 4, 1), chunks=2, overlap=1,
                context=jnp.zeros((1, 2, 1)),
            ),
            "context.shape",
        ),
    ],
)  # fmt: skip
def test_wrong_values_are_named(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
