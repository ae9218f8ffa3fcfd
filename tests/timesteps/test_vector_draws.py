"""Laws of draws over frames: FoPP against an enumeration, mixtures and their limits, the rows of a stream, grids."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import timesteps
from diffusion_jax.errors import InvalidInput

KEY = jax.random.key(0)
UNIFORM = timesteps.uniform()


def fopp(levels, frames):
    """The probability of each sequence: anchor frame and level uniform, then uniform over its monotone extensions."""
    rising = [s for s in itertools.product(range(levels), repeat=frames) if list(s) == sorted(s)]
    chances = collections.Counter()
    for frame, level in itertools.product(range(frames), range(levels)):
        through = [s for s in rising if s[frame] == level]
        for s in through:
            chances[s] += 1.0 / (levels * frames * len(through))
    return chances


def test_anchored_discrete_is_fopp():
    chances = fopp(6, 4)
    assert sum(chances.values()) == pytest.approx(1.0) and len(chances) == 126
    t, weight = timesteps.anchored(6).draw((), KEY, (60_000, 4))
    assert (weight == 1).all() and t.dtype == jnp.float32
    levels = np.round(6 * np.asarray(t)).astype(int) - 1
    counted = collections.Counter(map(tuple, levels.tolist()))
    assert set(counted) <= set(chances)
    observed = [counted[s] for s in chances]
    assert stats.chisquare(observed, 60_000 * np.array(list(chances.values()))).pvalue > 1e-3
    # The plain sorted draw is another distribution.
    plain, _ = timesteps.monotone(UNIFORM).draw((), KEY, (60_000, 4))
    levels = np.floor(6 * np.asarray(plain)).astype(int)
    counted = collections.Counter(map(tuple, levels.tolist()))
    assert stats.chisquare([counted[s] for s in chances], 60_000 * np.array(list(chances.values()))).pvalue < 1e-9


def test_anchored_continuous_is_the_limit_of_discrete():
    t, _ = timesteps.anchored().draw((), KEY, (20_000, 16))
    t = np.asarray(t, np.float64)
    assert (np.diff(t, axis=1) >= 0).all() and t.min() >= 0 and t.max() <= 1
    # As computed in the card for T = 1000 and 16 frames: .11, .48, .89, and 4.7 % of first frames above one half.
    np.testing.assert_allclose(t.mean(0)[[0, 7, 15]], [0.11, 0.48, 0.89], atol=0.01)
    assert np.mean(t[:, 0] > 0.5) == pytest.approx(0.047, abs=0.006)
    fine, _ = timesteps.anchored(1000).draw((), jax.random.key(5), (20_000, 16))
    fine = np.asarray(fine, np.float64)
    assert (np.diff(fine, axis=1) >= 0).all() and fine.min() >= 1e-3 - 1e-9
    jittered = fine - np.random.default_rng(0).uniform(0, 1e-3, fine.shape)
    for frame in (0, 5, 15):
        assert stats.ks_2samp(t[:, frame], jittered[:, frame]).statistic < 0.02


def test_anchored_takes_further_axes_and_single_frames():
    t, _ = timesteps.anchored(5).draw((), KEY, (7, 3, 2))
    assert t.shape == (7, 3, 2) and (np.diff(t, axis=1) >= 0).all() and len(np.unique(t[:, 0])) > 1
    one, _ = jax.jit(lambda key: timesteps.anchored(4).draw((), key, (4000, 1)))(KEY)
    np.testing.assert_allclose(np.unique(one, return_counts=True)[1] / 4000, 0.25, atol=0.03)


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_the_mixture_of_fvdm_tosses_a_coin_for_each_example(probability):
    draw = timesteps.mixture(timesteps.independent(UNIFORM), timesteps.shared(UNIFORM), probability)
    t, _ = draw.draw(draw.init(), KEY, (4000, 5))
    t = np.asarray(t, np.float64)
    assert np.mean(np.ptp(t, axis=1) == 0) == pytest.approx(1 - probability, abs=0.03)
    for frame in t.T:
        assert stats.kstest(frame, stats.uniform.cdf).pvalue > 1e-3
    grid = timesteps.on_grid(timesteps.trailing(10, 10))
    draw = timesteps.mixture(timesteps.independent(grid), timesteps.shared(grid), probability)
    t, _ = draw.draw(draw.init(), KEY, (4000, 5))
    same = probability / 10**4 + 1 - probability
    assert np.mean(np.ptp(np.asarray(t), axis=1) == 0) == pytest.approx(same, abs=0.03)


@pytest.mark.parametrize(("steps", "entries", "chunk", "past"), [(12, 9, 2, 1), (7, 6, 2, 0)])
def test_rows_of_a_plan_are_exactly_what_a_stream_visits(steps, entries, chunk, past):
    plan = timesteps.chunk_staircase(timesteps.linspace(steps), entries, chunk, past)
    t, weight = timesteps.on_rows(plan).draw((), KEY, (500, entries))
    assert {tuple(row) for row in np.asarray(t).tolist()} == {tuple(row) for row in np.asarray(plan[:-1, 0]).tolist()}
    # A chunk that has less to do than others is done before the call ends.
    np.testing.assert_array_equal(weight == 0, t == 0)
    given = timesteps.chunk_staircase(timesteps.linspace(steps), entries, chunk, past, given_past=True)
    t, weight = timesteps.on_rows(given).draw((), KEY, (500, entries, 2))
    assert t.shape == (500, entries, 2)
    np.testing.assert_array_equal(weight == 0, t == 0)
    draw = timesteps.mixture(timesteps.on_rows(plan), timesteps.shared(UNIFORM), 0.8)
    t, _ = draw.draw(draw.init(), KEY, (2000, entries))
    assert np.mean(np.ptp(np.asarray(t), axis=1) > 0) == pytest.approx(0.8, abs=0.03)


def test_uniform_over_a_shifted_grid():
    grid = timesteps.shift(timesteps.trailing(1000), 5.0)
    t, weight = timesteps.on_grid(grid).draw((), KEY, (400, 50))
    assert set(np.unique(t)) <= set(np.asarray(grid[:-1]).tolist()) and (weight == 1).all()
    u = np.asarray(t, np.float64) / (5.0 - 4.0 * np.asarray(t, np.float64))
    assert stats.kstest(u.ravel() - 5e-4, stats.uniform.cdf).pvalue > 1e-3
    with_end, _ = timesteps.on_grid(timesteps.linspace(3), last=True).draw((), KEY, (4000,))
    np.testing.assert_allclose(np.unique(with_end, return_counts=True)[1] / 4000, 0.25, atol=0.03)
    spread, _ = timesteps.on_grid(timesteps.linspace(8), "stratified").draw((), KEY, (8,))
    np.testing.assert_array_equal(np.sort(spread), np.sort(timesteps.linspace(8)[:-1]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: timesteps.anchored(0), "num_steps"),
        (lambda: timesteps.anchored().draw((), KEY, (4,)), "t_shape"),
        (lambda: timesteps.on_rows(timesteps.linspace(4)), "plan.shape"),
        (lambda: timesteps.on_rows(timesteps.synchronous(timesteps.linspace(4), 3)).draw((), KEY, (2, 4)), "4 entries"),
        (lambda: timesteps.on_grid(timesteps.synchronous(timesteps.linspace(4), 3)), "grid.shape"),
    ],
)
def test_wrong_values_are_named(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


def test_blocks_share_their_times():
    t, weight = timesteps.blockwise(UNIFORM, 2).draw((), KEY, (5000, 6, 3))
    assert t.shape == weight.shape == (5000, 6, 3)
    np.testing.assert_array_equal(t[:, ::2], t[:, 1::2])
    # Other blocks, and other entries behind the frames, are independent.
    for other in (t[:, 2, 0], t[:, 4, 0], t[:, 0, 1]):
        assert abs(np.corrcoef(t[:, 0, 0], other)[0, 1]) < 0.06
    one, _ = timesteps.blockwise(UNIFORM, 6).draw((), KEY, (10, 6))
    np.testing.assert_array_equal(one, np.broadcast_to(one[:, :1], (10, 6)))
    with pytest.raises(InvalidInput, match="block"):
        timesteps.blockwise(UNIFORM, 4).draw((), KEY, (10, 6))
    with pytest.raises(InvalidInput, match="block"):
        timesteps.blockwise(UNIFORM, 0)
