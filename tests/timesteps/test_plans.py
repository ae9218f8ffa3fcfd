"""Laws of level plans: published schedules by simulation, tasks as arrays of one program, what stands bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, solvers, timesteps
from diffusion_jax.denoisers import analytic, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import make_sampler, sample
from diffusion_jax.timesteps import linspace
from tests.models.shared import changed, compiled, now

KEY = jax.random.key(3)
FLOW = processes.rectified_flow()
GRID = np.asarray(linspace(6))
COVARIANCE = 0.9 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
CLIP = jax.device_get(gaussian_mixture(np.zeros((1, 4, 1)), covariances=COVARIANCE[None]))
DENOISER = analytic(FLOW)
KNOWN = np.random.default_rng(1).standard_normal((3, 4, 1)).astype(np.float32)

ONE_AND_MULTI_STEP = {
    "ddim": solvers.ddim(),
    "ddpm": solvers.ddpm(),
    "euler_ancestral": solvers.euler_ancestral(),
    "heun": solvers.heun(),
    "flow_heun": solvers.flow_heun(),
    "flow_midpoint": solvers.flow_midpoint(),
    "flow_sde": solvers.flow_sde(),
    "dpm_solver_pp": solvers.dpm_solver_pp(2),
    "unipc": solvers.unipc(3),
    "deis": solvers.deis(3),
    "plms": solvers.plms(),
    "sa_solver": solvers.sa_solver(),
}


def ad_scheduler(steps, frames, width):
    """The sweeps of AR-Diffusion, as its card says them."""
    n = np.zeros(frames, int)
    rows = [n.copy()]
    while n[-1] < steps:
        old = n.copy()
        for i in range(frames):
            free = i == 0 or old[i - 1] == steps
            n[i] = min(steps, old[i] + 1) if free else min(steps, max(0, n[i - 1] - width))
        rows.append(n.copy())
    return np.array(rows)


@pytest.mark.parametrize(
    ("steps", "frames", "width"), [(6, 4, 0), (6, 4, 2), (6, 4, 6), (5, 3, 4), (7, 1, 3), (4, 6, 1)]
)
def test_the_staircase_is_the_ad_scheduler(steps, frames, width):
    levels = timesteps.staircase_levels(steps, frames, width)
    np.testing.assert_array_equal(levels, ad_scheduler(steps, frames, width))
    assert len(levels) == steps + (frames - 1) * width + 1
    assert (np.diff(levels, axis=1) <= 0).all()
    for frame in levels.T:
        np.testing.assert_array_equal(np.unique(frame), np.arange(steps + 1))
        assert (np.diff(frame) <= 1).all()
    if width == 0:
        assert (levels == levels[:, :1]).all()
    if width == steps:
        assert ((np.diff(levels, axis=0) > 0).sum(axis=1) == 1).all()
    plan = timesteps.staircase(linspace(steps), frames, width)
    assert plan.shape == (len(levels), 1, frames)
    np.testing.assert_array_equal(plan[:, 0], np.asarray(linspace(steps))[levels])


@pytest.mark.parametrize(
    ("steps", "entries", "chunk", "past"), [(100, 20, 8, 1), (12, 12, 3, 0), (10, 11, 3, 1), (7, 5, 1, 2)]
)
def test_chunk_levels_are_those_of_sdp(steps, entries, chunk, past):
    chunks = (entries - past) // chunk
    left = timesteps.chunk_levels(steps, entries, chunk, past)
    for n in range(entries):
        i = min(max((n - past) // chunk, 0), chunks - 1)
        assert left[0, n] - 1 == steps * (i + 1) // chunks - 1
        assert left[-1, n] == (0 if i == 0 else steps * i // chunks)
        if steps % chunks == 0:
            np.testing.assert_array_equal(left[:, n], left[0, n] - np.arange(steps // chunks + 1))
    assert (np.diff(left, axis=0) <= 0).all() and (np.diff(left, axis=0) >= -1).all()
    given = timesteps.chunk_levels(steps, entries, chunk, past, given_past=True)
    assert (given[:, :past] == 0).all()
    np.testing.assert_array_equal(given[:, past:], left[:, past:])


def test_the_chunk_staircase_is_the_steady_stretch_of_the_staircase():
    grid = linspace(12)
    whole = timesteps.staircase(grid, 8, width=3, chunk=2)
    np.testing.assert_array_equal(timesteps.chunk_staircase(grid, 8, 2), whole[9:13])


@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_every_frame_finishes_in_the_window_if_and_only_if_steps_fit(window, width):
    plan = timesteps.staircase(GRID, 7, width)
    if window * width < 6:
        with pytest.raises(InvalidInput, match="steps <= window"):
            timesteps.windows(plan, window)
        return
    starts = timesteps.windows(plan, window)
    moves = np.asarray(plan[1:] != plan[:-1])[:, 0]
    for row, start in enumerate(starts):
        inside = np.arange(start, start + window)
        assert set(np.flatnonzero(moves[row])) <= set(inside)
        assert (np.asarray(plan)[row, 0, :start] == 0).all() and (np.asarray(plan)[row, 0, start + window :] == 1).all()
    assert starts[0] == 0 and starts[-1] == 7 - window and set(np.diff(starts)) <= {0, 1}


def test_roles_are_the_query_table():
    made = timesteps.roles(
        GRID,
        {
            "a": "generate",
            "b": "given",
            "c": "ignored",
            "d": 0.4,
            "e": ["generate", "given", 0.4],
            "f": timesteps.frames(GRID, 3),
            "g": "e",
        },
    )
    np.testing.assert_array_equal(made["a"], GRID)
    assert (made["b"] == 0).all() and (made["c"] == 1).all() and made["d"].tolist() == [np.float32(0.4)] * 7
    np.testing.assert_array_equal(made["e"], np.stack([GRID, 0 * GRID, made["d"]], axis=1))
    assert made["f"].shape == (7, 1, 3)
    np.testing.assert_array_equal(made["g"], made["e"])


def test_frames_and_multipliers():
    np.testing.assert_array_equal(timesteps.synchronous(GRID, 3), np.broadcast_to(GRID[:, None, None], (7, 1, 3)))
    np.testing.assert_array_equal(timesteps.frames(GRID, 4, (0, -1))[:, 0, [0, 3]], 0.0)
    soft = timesteps.multiplied(GRID, [[0.0, 0.3, 1.0], [1.0, 1.0, 0.5]])
    assert soft.shape == (7, 2, 3)
    np.testing.assert_array_equal(soft[:, 0, 1], GRID * np.float32(0.3))


@functools.cache
def tasks():
    """Plans in which some frames stand at 0, and what is known of all, noised to where they begin."""
    known = changed(KNOWN, (0, 0), -0.0)
    plans = (timesteps.frames(GRID, 4, (0, -1)), timesteps.multiplied(GRID, [0.0, 1.0, 0.5, 0.0]))
    start = compiled(lambda plan: timesteps.noised_start(KEY, FLOW, plan, known))
    return known, [(np.asarray(plan), start(plan)) for plan in plans], now(lambda: FLOW.prior(KEY, KNOWN.shape))


@pytest.mark.parametrize("name", ONE_AND_MULTI_STEP)
def test_given_frames_come_back_bit_for_bit_and_equal_levels_are_the_scalar_run(name):
    run = compiled(lambda plan, start: sample(KEY, DENOISER, CLIP, ONE_AND_MULTI_STEP[name], plan, x_init=start).x)
    known, plans, prior = tasks()
    for plan, start in plans:
        x, still = run(plan, start), plan[0, 0] == 0
        assert x[:, still].tobytes() == known[:, still].tobytes()
        assert np.isfinite(x).all() and (x[:, ~still] != start[:, ~still]).all()
    # Two programs: the same operations, which XLA may fuse in another way.
    vector = np.ascontiguousarray(np.broadcast_to(GRID[:, None, None], (7, 1, 4)))
    np.testing.assert_allclose(run(vector, prior), run(GRID, prior), rtol=1e-5, atol=1e-6)


def test_what_stands_passes_its_gradient_on_and_finished_frames_are_frozen():
    plan = timesteps.frames(GRID, 4)

    def first(known):
        return sample(KEY, DENOISER, CLIP, solvers.ddim(), plan, x_init=known).x[:, 0].sum()

    np.testing.assert_array_equal(compiled(jax.grad(first))(KNOWN), changed(np.zeros_like(KNOWN), np.s_[:, 0], 1.0))
    stairs = np.asarray(timesteps.staircase(GRID, 4, 2))
    trace = now(lambda: sample(KEY, DENOISER, CLIP, solvers.unipc(2), stairs, x_init=KNOWN, save_every=1).trace)
    for row in range(len(trace)):
        idle = stairs[row, 0] == stairs[row + 1, 0]
        before = KNOWN if row == 0 else trace[row - 1]
        np.testing.assert_array_equal(trace[row][:, idle], before[:, idle])


def test_a_plan_begins_with_what_is_known_noised_to_its_first_row():
    process = processes.JointProcess({"image": processes.vp_cosine(), "text": FLOW})
    known = {"image": np.full((5, 3), 2.0, np.float32), "text": np.full((5, 2), -0.0, np.float32)}
    many = np.full((4000, 3), 2.0, np.float32)

    def begun():
        plan = timesteps.roles(GRID, {"image": "generate", "text": "given"})
        world = gaussian_mixture({"image": np.zeros((1, 3)), "text": np.zeros((1, 2))})
        shapes = {"image": (5, 3), "text": (5, 2)}
        drawn = sample(KEY, analytic(process), world, solvers.ddim(), np.ones(2), shape=shapes, stop=0).x
        levels = timesteps.multiplied(GRID, [0.0, 0.25, 1.0])
        return (
            timesteps.noised_start(KEY, process, plan, known),
            drawn,
            timesteps.noised_start(KEY, FLOW, levels, many),
            timesteps.noised_start(KEY, FLOW, levels, many[:2], index=jnp.array([7, 9])),
        )

    start, drawn, soft, few = now(begun)
    np.testing.assert_array_equal(start["image"], drawn["image"])
    assert start["text"].tobytes() == known["text"].tobytes()
    np.testing.assert_allclose(soft.mean(0), [2.0, 1.5, 0.0], atol=0.05)
    np.testing.assert_allclose(soft.std(0), [0.0, 0.25, 1.0], atol=0.05)
    np.testing.assert_array_equal(few, soft[[7, 9]])


def test_another_task_is_another_array_of_one_program_on_eight_devices():
    traces = []

    def counted(params, carry, x, step, cond):
        traces.append(1)
        return DENOISER.apply(params, carry, x, step, cond)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    known = np.random.default_rng(2).standard_normal((16, 4, 1)).astype(np.float32)
    index = np.arange(16)
    noised = compiled(lambda plan: timesteps.noised_start(KEY, FLOW, plan, known, jnp.asarray(index)))
    eight = make_sampler(DENOISER._replace(apply=counted), solvers.dpm_solver_pp(2), shape=(4, 1), mesh=mesh)
    one = make_sampler(DENOISER, solvers.dpm_solver_pp(2), shape=(4, 1))
    once = None
    for plan in (
        timesteps.synchronous(GRID, 4),
        timesteps.frames(GRID, 4),
        timesteps.frames(GRID, 4, (0, -1)),
        timesteps.multiplied(GRID, [0.0, 0.3, 0.6, 1.0]),
    ):
        start = noised(plan)
        x = eight(KEY, CLIP, plan, None, index, start).x
        once = len(traces) if once is None else once
        np.testing.assert_allclose(x, one(KEY, CLIP, plan, None, index, start).x, atol=1e-5)
    assert len(traces) == once
    tasks = timesteps.multiplied(GRID, np.arange(64).reshape(16, 4) % 3 / 2)
    start = noised(tasks)
    per_example = eight(KEY, CLIP, tasks, None, index, start).x
    np.testing.assert_allclose(per_example, one(KEY, CLIP, tasks, None, index, start).x, atol=1e-5)
    still = np.asarray(tasks)[0] == 0
    np.testing.assert_array_equal(np.asarray(per_example)[still], np.asarray(known)[still])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timesteps.synchronous(GRID, 0), "frames is 0"),
        (lambda: timesteps.multiplied(GRID, [0.5, 1.2]), "multipliers is"),
        (lambda: timesteps.multiplied(GRID, 0.5), "multipliers.shape"),
        (lambda: timesteps.multiplied(timesteps.synchronous(GRID, 2), [1.0]), "grid.shape"),
        (lambda: timesteps.frames(GRID, 4, (4,)), "indices of 4 frames"),
        (lambda: timesteps.roles(GRID, {"text": "givn"}), "did you mean 'given'"),
        (lambda: timesteps.roles(GRID, {"text": 1.5}), r"roles\['text'\] is 1.5"),
        (lambda: timesteps.roles(GRID, {"text": jnp.ones(3)}), "7 entries"),
        (lambda: timesteps.staircase(GRID, 4, 7), "width is 7"),
        (lambda: timesteps.chunk_staircase(GRID, 4, 3, past=2), "must fit into the 4 entries"),
        (lambda: timesteps.chunk_staircase(linspace(2), 6, 2), "each of the 3 chunks"),
        (lambda: timesteps.windows(timesteps.synchronous(GRID, 4), 5), "window is 5"),
        (lambda: timesteps.windows(GRID, 1), "plan.shape"),
        (lambda: jax.jit(lambda plan: timesteps.windows(plan, 2))(timesteps.synchronous(GRID, 4)), "traced"),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
