"""Averages equal their closed forms, and stored snapshots give back widths that were never tracked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import InvalidInput
from diffusion_jax.training import ema

STEPS = 400


@pytest.fixture(scope="module")
def run():
    """A random walk as parameters, and every track's average after each step."""
    tracks = {
        "fixed": ema.fixed(0.9),
        "warm": ema.warmup(0.99, delay=10.0),
        "narrow": ema.power(0.05),
        "wide": ema.power(0.10),
        "other": ema.power(0.15),
        "mean": ema.power(12**-0.5),
    }
    walk = jnp.cumsum(jax.random.normal(jax.random.key(0), (STEPS + 1, 3)), axis=0)

    def body(averages, step):
        averages = ema.update(tracks, averages, {"w": walk[step]}, step)
        return averages, averages

    start = ema.init(tracks, {"w": walk[0]})
    history = jax.jit(lambda: jax.lax.scan(body, start, jnp.arange(1, STEPS + 1))[1])()
    return tracks, np.asarray(walk, np.float64), {name: np.asarray(track["w"]) for name, track in history.items()}


def test_a_fixed_decay_is_a_geometric_sum(run):
    _, walk, history = run
    weights = 0.1 * 0.9 ** np.arange(STEPS - 1, -1, -1)
    expected = weights @ walk[1:] + 0.9**STEPS * walk[0]
    np.testing.assert_allclose(history["fixed"][-1], expected, rtol=1e-4)


def test_warming_up_forgets_the_start_and_ends_at_the_decay(run):
    tracks, walk, history = run
    betas = np.asarray([tracks["warm"].beta(jnp.float32(n)) for n in (1, 5, 10_000)])
    np.testing.assert_allclose(betas, [2 / 11, 6 / 15, 0.99], rtol=1e-6)
    np.testing.assert_allclose(history["warm"][0], 2 / 11 * walk[0] + 9 / 11 * walk[1], rtol=1e-5)


def test_a_power_function_average_has_the_width_that_was_asked_for(run):
    tracks, _, history = run
    for name in ("narrow", "wide", "other"):
        betas = np.asarray(jax.vmap(tracks[name].beta)(jnp.arange(1.0, STEPS + 1)), np.float64)
        weights = (1 - betas) * np.append(np.cumprod(betas[:0:-1])[::-1], 1.0)
        assert abs(weights.sum() - 1) < 1e-5, "the initial parameters have no weight"
        times = np.arange(1, STEPS + 1) / STEPS
        width = np.sqrt(weights @ times**2 - (weights @ times) ** 2)
        np.testing.assert_allclose(width, tracks[name].sigma_rel, rtol=0.02)
    assert history["narrow"].shape == (STEPS, 3)


def test_the_widest_power_function_is_the_plain_mean(run):
    _, walk, history = run
    np.testing.assert_allclose(history["mean"][-1], walk[1:].mean(0), rtol=1e-3)


def test_an_untracked_width_is_reconstructed_from_snapshots(run):
    tracks, _, history = run
    kept = range(25, STEPS + 1, 25)
    snapshots = [
        (step, tracks[name].sigma_rel, lambda step=step, name=name: {"w": history[name][step - 1]})
        for name in ("narrow", "wide")
        for step in kept
    ]
    scale = np.abs(history["other"]).max()
    found = ema.reconstruct(snapshots, 0.15)
    np.testing.assert_allclose(found["w"], history["other"][-1], atol=0.01 * scale)
    # The nearest tracked average is no substitute.
    assert np.abs(history["wide"][-1] - history["other"][-1]).max() > 0.05 * scale
    earlier = ema.reconstruct(snapshots, 0.15, step=300)
    np.testing.assert_allclose(earlier["w"], history["other"][299], atol=0.01 * scale)


def test_a_tracked_width_is_its_own_reconstruction():
    weights = ema.post_hoc_weights([100, 200, 200], [0.1, 0.05, 0.1], 0.1, 200)
    np.testing.assert_allclose(weights, [0, 0, 1], atol=1e-9)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ema.fixed(1.0), "decay is 1.0"),
        (lambda: ema.warmup(0.9, delay=1.0), "delay is 1.0"),
        (lambda: ema.power(0.5), "sigma_rel is 0.5"),
        (lambda: ema.post_hoc_weights([], [], 0.1, 5), "no EMA snapshots"),
        (lambda: ema.post_hoc_weights([10], [0.1], 0.1, 20), "step is 20"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()
