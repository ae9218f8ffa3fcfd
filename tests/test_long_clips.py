"""Laws of long clips: sliding windows, chains of chunks and blocks with kept keys against `sample`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models, processes, solvers, timesteps
from diffusion_jax.denoisers import analytic, denoiser, gaussian_clip
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from diffusion_jax.streaming import sample_autoregressive, sample_chained, sample_windowed
from diffusion_jax.timesteps import linspace
from diffusion_jax.typing import Denoiser
from tests.denoisers.tiny import remembering
from tests.models.shared import compiled, drawn_params, now

KEY = jax.random.key(6)
FLOW = processes.rectified_flow()
ORACLE = analytic(FLOW)


@pytest.mark.parametrize("solver", [solvers.ddim(1.0), solvers.unipc(3)], ids=["ddim", "unipc"])
def test_a_window_over_everything_is_the_plain_run(solver):
    plan = np.asarray(timesteps.staircase(linspace(6), 5, 2))

    def made():
        clip, denoiser, x = gaussian_clip(5), remembering(ORACLE), FLOW.prior(KEY, (3, 5, 1))
        whole = sample(KEY, denoiser, clip, solver, plan, x_init=x)
        seen = sample_windowed(KEY, denoiser, clip, solver, plan, 5, x_init=x, starts=np.zeros(len(plan) - 1, int))
        return (whole.x, whole.cost.evaluations), (seen.x, seen.cost.evaluations)

    whole, seen = now(made)
    np.testing.assert_allclose(seen[0], whole[0], atol=2e-6)
    assert float(seen[1]) == float(whole[1]) == 6 + 4 * 2


@pytest.mark.parametrize("solver", [solvers.ddim(), solvers.dpm_solver_pp(2)], ids=["ddim", "dpm"])
def test_a_window_that_shows_the_last_done_frame_loses_nothing_of_a_markov_clip(solver):
    """What it hides is either pure noise or shielded by a clean frame. Twelve frames through a window of five."""
    steps, width, window = 8, 2, 5
    plan = np.asarray(timesteps.staircase(linspace(steps), 12, width))
    starts = timesteps.windows(plan, window)
    clip = jax.device_get(gaussian_clip(window))

    # Starts are data: a jitted driver takes them and the plan as arguments.
    @jax.jit
    def driver(plan, starts):
        x = FLOW.prior(KEY, (3, 12, 1))
        whole = sample(KEY, ORACLE, gaussian_clip(12), solver, plan, x_init=x)
        seen = sample_windowed(KEY, ORACLE, clip, solver, plan, window, x_init=x, starts=starts)
        return x, whole.x, seen.x, seen.cost.evaluations

    x, whole, seen, evaluations = jax.device_get(driver(plan, starts))
    np.testing.assert_allclose(seen, whole, atol=2e-5)
    assert float(evaluations) == steps + 11 * width
    found = sample_windowed(KEY, ORACLE, clip, solver, plan, window, x_init=x).x
    np.testing.assert_allclose(seen, found, atol=1e-5)


def test_frames_outside_of_the_window_are_not_touched_and_conditions_follow_it():
    plan = np.asarray(timesteps.staircase(linspace(4), 9, 2))
    starts = timesteps.windows(plan, 3)
    poses = np.arange(9, dtype=np.float32)

    def apply(params, carry, x, step, cond):
        return FLOW.from_x0(
            jnp.broadcast_to(cond[None, :, None], x.shape), x, jnp.broadcast_to(step.t, x.shape[:2])
        ), carry

    made = Denoiser(lambda params, x, cond: (), apply, FLOW)
    out = now(
        lambda: (
            sample_windowed(
                KEY,
                made,
                None,
                solvers.ddim(),
                plan,
                3,
                x_init=FLOW.prior(KEY, (2, 9, 1)),
                starts=starts,
                cond=lambda start: jax.lax.dynamic_slice(jnp.asarray(poses), (start,), (3,)),
            ).x
        )
    )
    np.testing.assert_array_equal(out[..., 0], np.broadcast_to(poses, (2, 9)))


def test_a_chain_of_chunks_is_a_long_clip():
    frames, overlap, chunks, grid = 4, 1, 4, linspace(200)
    size = 8000

    def made():
        clip = gaussian_clip(frames)
        args = (ORACLE, clip, solvers.ddim(), grid)
        run = sample_chained(KEY, *args, shape=(size, frames, 1), chunks=chunks, overlap=overlap)
        first = sample(jax.random.fold_in(KEY, 0), *args, shape=(size, frames, 1)).x
        return run.x, run.cost.evaluations, first

    x, evaluations, first = now(made)
    assert x.shape == (size, 13, 1) and float(evaluations) == 800
    target = 0.9 ** np.abs(np.subtract.outer(np.arange(13), np.arange(13)))
    np.testing.assert_allclose(np.cov(x[..., 0].T), target, atol=0.06)
    np.testing.assert_allclose(x[:, :frames], first, atol=1e-4)


def test_a_chain_by_replacement_keeps_what_it_replaces():
    """The first chunk is the plain run; a model that sees no level but its own needs no other."""
    clip, grid, shape = jax.device_get(gaussian_clip(4)), linspace(50), (4000, 4, 1)
    options = {"shape": shape, "overlap": 2, "replaced": True}

    def made():
        args = (ORACLE, clip, solvers.ddim(), grid)
        run = sample_chained(KEY, *args, chunks=3, **options)
        first = sample(jax.random.fold_in(KEY, 0), *args, shape=shape).x
        long = sample_chained(KEY, *args, chunks=1, context=first[:, 2:], **options).x
        return run.x, run.cost.evaluations, first, long

    x, evaluations, first, long = now(made)
    np.testing.assert_allclose(x[:, :4], first, atol=1e-4)
    assert x.shape == (4000, 8, 1) and float(evaluations) == 150
    # New frames follow the old ones, though less closely than they do in the data (0.9).
    correlation = np.corrcoef(x[..., 0].T)
    assert 0.5 < correlation[3, 4] < 0.9 and 0.5 < correlation[5, 6] < 0.9
    np.testing.assert_array_equal(long[:, :2], first[:, 2:])
    assert np.corrcoef(long[:, 1:3, 0].T)[0, 1] > 0.5


def test_a_chain_goes_on_from_its_context():
    context = np.random.default_rng(6).standard_normal((3, 2, 1)).astype(np.float32)

    def made():
        grid, own = linspace(6), jax.random.fold_in(KEY, 0)
        args = (ORACLE, gaussian_clip(4), solvers.dpm_solver_pp(2))
        options = {"shape": (3, 4, 1), "overlap": 2, "context": context}
        long = sample_chained(KEY, *args, grid, **options, chunks=3).x
        plan = timesteps.frames(grid, 4, range(2))
        known = jnp.zeros((3, 4, 1)).at[:, :2].set(context)
        one = sample(own, *args, plan, x_init=timesteps.noised_start(own, FLOW, plan, known)).x
        return long, one, sample_chained(KEY, *args, grid, **options, chunks=2, level=0.2).x

    long, one, soft = now(made)
    assert long.shape == (3, 8, 1)
    np.testing.assert_array_equal(long[:, :2], context)
    np.testing.assert_allclose(long[:, :4], one, atol=1e-5)
    assert soft.shape == (3, 6, 1) and np.isfinite(soft).all()


@pytest.mark.parametrize(("attention", "block"), [("joint", 1), ("factorised", 2)])
def test_kept_keys_are_the_staircase_of_full_width(attention, block):
    """AR-Diffusion at s = S: each frame runs alone on the clean ones before it, which need not be evaluated again."""
    steps, frames = 3, 4
    network = models.video_dit(
        "S/2", width=16, depth=2, heads=2, attention=attention, block=block, temporal_positions="rotary"
    )
    process = processes.cosine(prediction="x0")
    x = np.random.default_rng(6).standard_normal((2, frames, 4, 4, 2)).astype(np.float32)
    params = drawn_params(network, x, np.zeros(2, np.float32))
    plan = timesteps.staircase(linspace(steps), frames, steps, block)

    @compiled
    def run(params, x):
        made = sample(KEY, denoiser(network, process), params, solvers.ddim(), plan, x_init=x)
        return made.x, made.cost.evaluations

    kept = models.incremental(network, window=frames // block)

    @compiled
    def autoregressive(params, x):
        made = sample_autoregressive(KEY, kept, process, params, solvers.ddim(), linspace(steps), x_init=x, block=block)
        return made.x, made.cost.evaluations

    whole, evaluations = run(params, x)
    alone, fewer = autoregressive(params, x)
    np.testing.assert_allclose(alone, whole, atol=2e-5 * float(np.abs(whole).max()))
    assert float(evaluations) == steps * frames // block
    assert float(fewer) == (steps + 1) * frames // block
    # What comes later is not seen.
    other, _ = run(params, np.concatenate([x[:, :block], x[:, block:] + 1], axis=1))
    changed = np.abs(other - whole).max(axis=(0, 2, 3, 4))
    assert (changed[:block] == 0).all() and (changed[block:] > 1e-4).all()
    with pytest.raises(InvalidInput, match="must divide the 4 frames"):
        sample_autoregressive(KEY, kept, process, params, solvers.ddim(), linspace(steps), x_init=x, block=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sample_windowed(
                KEY, ORACLE, gaussian_clip(2), solvers.ddim(), timesteps.staircase(linspace(8), 6, 2), 2,
                x_init=np.zeros((1, 6, 1)),
            ),
            "steps <= window",
        ),
        (
            lambda: sample_windowed(
                KEY, ORACLE, gaussian_clip(2), solvers.ddim(), timesteps.staircase(linspace(8), 6, 2), 2,
                x_init=np.zeros((1, 6, 1)), starts=np.zeros(3),
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
                context=np.zeros((1, 2, 1)),
            ),
            "context.shape",
        ),
    ],
)  # fmt: skip
def test_wrong_values_are_named(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
