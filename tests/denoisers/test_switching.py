"""Time tables: shares, times and log-SNRs say the same, each denoiser is asked as often as its table says."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, randomness, sampling, solvers, timesteps
from diffusion_jax.denoisers import (
    by_interval,
    by_log_snr,
    by_share,
    by_time,
    guided,
    scheduled_condition,
    switched,
    time_table,
)
from diffusion_jax.errors import InvalidInput
from diffusion_jax.typing import Network
from tests.denoisers.tiny import ask, network, step_at

PROCESS = processes.vp_linear()
SHARES = [number / 10 for number in range(11)]
KEY = jax.random.key(0)


@pytest.mark.parametrize("steps", [50, 100])
def test_shares_times_and_log_snrs_agree_on_equal_steps_for_every_share(steps):
    grid = timesteps.linspace(steps)

    @jax.jit
    def tables(share):
        # On a boundary of 1 nothing lies above it, on a boundary of 0 everything does.
        boundary = 1.0 - share
        rules = by_share(share), by_time(boundary), by_log_snr(PROCESS, PROCESS.log_snr(boundary))
        return [time_table(rule, grid) for rule in rules]

    for share in SHARES:
        expected = (np.arange(steps) >= round(share * steps)).astype(int)
        for table in tables(share):
            np.testing.assert_array_equal(table, expected, err_msg=str(share))


def test_shares_of_several_models_add_up_and_halves_are_rounded_up():
    grid = timesteps.linspace(10)
    np.testing.assert_array_equal(time_table(by_share(0.3, 0.4), grid), [0] * 3 + [1] * 4 + [2] * 3)
    np.testing.assert_array_equal(time_table(by_share(0.0, 1.0), grid), [1] * 10)
    np.testing.assert_array_equal(time_table(by_share(0.25, 0.0), grid), [0] * 3 + [2] * 7)
    np.testing.assert_array_equal(time_table((0.7, 0.25), grid), [0] * 3 + [1] * 5 + [2] * 2)
    np.testing.assert_array_equal(time_table(jnp.array([1, 0, 2]), grid), [1, 0] + [2] * 8)


def test_boundaries_in_log_snr_mean_the_same_noise_on_every_process():
    for process in (PROCESS, processes.rectified_flow(), processes.edm()):
        steps = step_at(process.inverse_log_snr(jnp.float32(-1.5))), step_at(process.inverse_log_snr(jnp.float32(-1.0)))
        assert [int(by_log_snr(process, -1.2, 3.0)(step)) for step in steps] == [0, 1]


def test_an_interval_has_its_upper_edge_as_clusters_do():
    """So each step that is taken in an interval of `timesteps.by_cluster` is the specialist's, and no other."""
    grid = timesteps.linspace(10)
    np.testing.assert_array_equal(time_table(by_interval(0.3, 0.7), grid), [0] * 3 + [1] * 4 + [0] * 3)
    edges = np.array([0.0, 0.3, 0.7, 1.0])
    clusters = timesteps.cluster_of(edges, grid[:-1])
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        np.testing.assert_array_equal(time_table(by_interval(low, high), grid), clusters == i)


def counting(calls, name):
    def apply(params, x, t, cond, train=False, key=None):
        jax.debug.callback(lambda: calls.append(name))
        return params * x, {}

    return denoisers.denoiser(Network(lambda key, x, t, cond: 0.5, apply), PROCESS)


def test_every_model_is_asked_as_often_as_the_table_says_and_the_cost_says_so_too():
    calls = []
    models = tuple(counting(calls, number) for number in range(3))
    grid = timesteps.linspace(20)

    @jax.jit
    def run(shares):
        d = switched(models, by_share(*shares), compute=(0.1, 0.3, 1.0))
        return sampling.sample(KEY, d, (0.5, 0.4, 0.3), solvers.ddim(), grid, shape=(2, 3)).cost

    for first in SHARES:
        for second in (0.0, 1.0 - first):
            calls.clear()
            cost = run((first, second))
            jax.effects_barrier()
            counts = np.bincount(time_table(by_share(first, second), grid), minlength=3)
            assert [calls.count(number) for number in range(3)] == counts.tolist()
            assert float(cost.evaluations) == 20
            np.testing.assert_allclose(float(cost.compute), counts @ [0.1, 0.3, 1.0], rtol=1e-5)
    assert run._cache_size() == 1


def test_each_model_has_its_own_condition_null_embedding_and_scale():
    """Labels of the first mean nothing to the second: other numbers, another null, another strength."""
    plain = denoisers.denoiser(network(), PROCESS)
    x = randomness.normal(KEY, (3, 4, 2))
    params = tuple(network().init(jax.random.key(seed), x, None, None) for seed in (1, 2))
    conds = {"label": jnp.array([0, 1, 2])}, {"label": jnp.array([3, 2, 1])}
    alone = guided(plain, 1.5, {"label": 4}), guided(plain, 3.0, {"label": 0})

    def told(number):
        return scheduled_condition(alone[number], lambda cond, step: cond[number])

    both = switched((told(0), told(1)))
    for t, number in ((0.8, 0), (0.3, 1)):
        got = ask(both, params, x, step_at(t), conds)
        expected = ask(alone[number], params[number], x, step_at(t), conds[number])
        np.testing.assert_allclose(got.x0, expected.x0, rtol=1e-5, atol=1e-6)
        assert float(got.cost.evaluations) == 2.0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: by_share(), "at least one share"),
        (lambda: by_share(0.8, 0.3), "sum of at most 1"),
        (lambda: by_share(-0.1), "at least 0"),
        (lambda: by_log_snr(PROCESS, 1.0, -1.0), "rising"),
        (lambda: by_interval(0.5, 0.5), "below high"),
        (lambda: by_log_snr(processes.JointProcess({"a": PROCESS}), 1.0), "use by_time"),
        (lambda: time_table(jnp.ones(3), timesteps.linspace(3)), "an int array"),
    ],
)
def test_mistakes_are_told_in_a_sentence(make, says):
    with pytest.raises(InvalidInput, match=says):
        make()


def test_models_of_different_noise_are_not_switched_as_they_are():
    pair = denoisers.analytic(PROCESS), denoisers.analytic(processes.rectified_flow())
    with pytest.raises(InvalidInput, match="on_process"):
        switched(pair)
    with pytest.raises(InvalidInput, match="on_process"):
        denoisers.averaged(pair)
    switched((pair[0], denoisers.on_process(pair[1], PROCESS)))
