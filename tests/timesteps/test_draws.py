"""Laws of draws: distributions, spreads over the batch, importance without bias, and patterns over frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import processes, timesteps
from diffusion_jax.errors import InvalidInput

KEY = jax.random.key(0)
EDM = processes.edm()


def mode_cdf(scale):
    u = np.linspace(0, 1, 20_001)
    t = 1 - u - scale * (np.cos(0.5 * np.pi * u) ** 2 - 1 + u)
    return lambda x: np.interp(x, t[::-1], (1 - u)[::-1])


DISTRIBUTIONS = {
    "uniform": (timesteps.uniform(0.2, 0.6), stats.uniform(0.2, 0.4).cdf),
    "logit_normal": (timesteps.logit_normal(0.5, 0.8), lambda t: stats.norm(0.5, 0.8).cdf(np.log(t / (1 - t)))),
    "mode": (timesteps.mode(1.29), mode_cdf(1.29)),
    "log_normal": (timesteps.log_normal(EDM), lambda t: stats.norm(-1.2, 1.2).cdf(np.log(80 * t))),
    "beta": (timesteps.beta(1.5, 1.0), stats.beta(1.5, 1.0).cdf),
    "stratified": (timesteps.stratified(), stats.uniform.cdf),
    "antithetic": (timesteps.antithetic(), stats.uniform.cdf),
    "low_discrepancy": (timesteps.uniform(spread="low_discrepancy"), stats.uniform.cdf),
    "importance": (timesteps.importance(), stats.uniform.cdf),
    "spread_normal": (timesteps.logit_normal(spread="stratified"), lambda t: stats.norm.cdf(np.log(t / (1 - t)))),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_follow_their_distribution(name):
    draw, cdf = DISTRIBUTIONS[name]
    t, weight = draw.draw(draw.init(), KEY, (4000, 2))
    assert t.shape == weight.shape == (4000, 2) and t.dtype == jnp.float32
    np.testing.assert_allclose(weight, 1.0, rtol=1e-5)
    for column in np.asarray(t, np.float64).T:
        assert stats.kstest(column, cdf).pvalue > 1e-3
    assert abs(np.corrcoef(np.asarray(t).T)[0, 1]) < 0.06  # every frame has a time of its own


def test_stratified_has_one_time_in_each_part_and_antithetic_mirrors():
    t, _ = timesteps.stratified().draw((), KEY, (64, 3))
    np.testing.assert_array_equal(np.sort(np.floor(64 * np.asarray(t)), axis=0), np.arange(64)[:, None].repeat(3, 1))
    t, _ = timesteps.uniform(spread="low_discrepancy").draw((), KEY, (64,))
    np.testing.assert_allclose(np.diff(np.sort(t)), 1 / 64, atol=1e-6)
    t, _ = timesteps.antithetic().draw((), KEY, (7,))
    np.testing.assert_allclose(t[:3] + t[4:], 1.0, atol=1e-6)


def test_importance_is_uniform_until_every_bucket_has_its_history():
    draw = timesteps.importance(num_buckets=4, history=3, uniform_share=0.0)
    state = draw.init()
    for centre in (0.1, 0.4, 0.6):
        state = draw.update(state, jnp.full((3,), centre), jnp.full((3,), 9.0))
    t, weight = draw.draw(state, KEY, (1000,))
    np.testing.assert_array_equal(weight, 1.0)
    state = draw.update(state, jnp.full((3,), 0.9), jnp.full((3,), 27.0))
    t, weight = draw.draw(state, KEY, (20_000,))
    assert np.mean(t >= 0.75) == pytest.approx(0.5, abs=0.02)  # 27 of 9 + 9 + 9 + 27
    # Weights undo the choice: the mean of any f(t) is the one under uniform t.
    for f in (jnp.ones_like, lambda t: t**2, lambda t: jnp.cos(3 * t)):
        expected = float(jnp.mean(f((jnp.arange(1000) + 0.5) / 1000)))
        assert float(jnp.mean(weight * f(t))) == pytest.approx(expected, abs=0.02)


def test_importance_keeps_the_last_losses_as_if_recorded_one_by_one():
    draw = timesteps.importance(num_buckets=3, history=4)
    keys = jax.random.split(KEY, 2)
    t = np.asarray(jax.random.uniform(keys[0], (40,)))
    loss = np.array(jax.random.uniform(keys[1], (40,)))
    loss[7] = np.nan
    state = draw.init()
    for part in range(0, 40, 20):
        state = jax.jit(draw.update)(state, t[part : part + 20], loss[part : part + 20])
    for bucket in range(3):
        seen = loss[(np.floor(3 * t) == bucket) & np.isfinite(loss)]
        assert int(state.count[bucket]) == len(seen)
        np.testing.assert_array_equal(np.sort(state.losses[bucket]), np.sort(seen[-4:]))


def test_frames_shared_independent_monotone_and_mixed():
    shape, uniform = (500, 5), timesteps.uniform()
    shared, _ = timesteps.shared(uniform).draw((), KEY, shape)
    assert (shared == shared[:, :1]).all() and len(np.unique(shared)) == 500
    alone, _ = timesteps.independent(uniform).draw((), KEY, shape)
    assert len(np.unique(alone)) > 2400
    rising, _ = timesteps.monotone(uniform).draw((), KEY, shape)
    assert (np.diff(rising, axis=1) >= 0).all()
    # Order statistics of uniform times: the mean of the k-th of 5 is k / 6.
    np.testing.assert_allclose(np.mean(rising, axis=0), np.arange(1, 6) / 6, atol=0.03)
    mixed = timesteps.mixture(timesteps.independent(uniform), timesteps.shared(uniform), 0.2)
    t, _ = mixed.draw(mixed.init(), KEY, shape)
    assert np.mean(np.ptp(t, axis=1) > 0) == pytest.approx(0.2, abs=0.06)


def test_pinned_entries():
    draw = timesteps.pinned(timesteps.uniform(0.1, 1.0), entries=2, probability=0.3)
    t, weight = draw.draw((), KEY, (2000, 4))
    pinned = np.asarray(t[:, 0] == 0)
    assert pinned.mean() == pytest.approx(0.3, abs=0.04)
    np.testing.assert_array_equal(t[:, 1] == 0, pinned)
    assert (t[:, 2:] >= 0.1).all()
    np.testing.assert_array_equal(weight == 0, t == 0)
    ends = timesteps.pinned(timesteps.uniform(), entries=(True, False, True), value=1.0, weight=1.0)
    t, weight = ends.draw((), KEY, (3, 3))
    assert (t[:, [0, 2]] == 1).all() and (t[:, 1] < 1).all() and (weight == 1).all()
    t, _ = timesteps.pinned(timesteps.uniform(0.1, 1.0), probability=0.5).draw((), KEY, (1000,))
    assert np.mean(t == 0) == pytest.approx(0.5, abs=0.06)


def test_wrappers_hand_losses_to_the_draw_within():
    inner = timesteps.importance(num_buckets=2, history=1)
    for wrap in (timesteps.shared, timesteps.monotone, timesteps.pinned, timesteps.independent):
        draw = wrap(inner)
        state = draw.update(draw.init(), jnp.array([[0.1, 0.1], [0.9, 0.9]]), jnp.array([1.0, 3.0]))
        np.testing.assert_array_equal(state.losses[:, 0], [1.0, 3.0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: timesteps.uniform(0.7, 0.3), "low and high"),
        (lambda: timesteps.uniform(spread="stratifed"), "did you mean 'stratified'"),
        (lambda: timesteps.stratified().draw((), KEY, ()), "needs a batch"),
        (lambda: timesteps.logit_normal(std=0), "std"),
        (lambda: timesteps.mode(5.0), "scale"),
        (lambda: timesteps.importance(0), "num_buckets"),
        (lambda: timesteps.pinned(timesteps.uniform(), entries=(True,)).draw((), KEY, (2, 3)), "entries"),
        (lambda: timesteps.pinned(timesteps.uniform(), value=2), "value"),
        (lambda: timesteps.shared(timesteps.uniform()).draw((), KEY, (4,)), "t_shape"),
        (lambda: timesteps.mixture(timesteps.uniform(), timesteps.uniform(), 1.5), "probability"),
    ],
)
def test_wrong_values_are_named(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()
