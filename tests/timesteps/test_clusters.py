"""Intervals of times as tasks: the cheapest of all partitions, drawn equally often."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, timesteps
from diffusion_jax.errors import InvalidInput

KEY = jax.random.key(0)


def cheapest(distance, clusters):
    """The least cost of all partitions, one after the other, and the cost of one."""
    parts = len(distance)

    def cost(edges):
        return sum(
            sum(distance[(low + high - 1) // 2, t] for t in range(low, high)) for low, high in itertools.pairwise(edges)
        )

    every = itertools.combinations(range(1, parts), clusters - 1)
    return min(cost((0, *inner, parts)) for inner in every), cost


@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("kind", ["log_snr", "time", "affinity"])
def test_the_partition_is_the_cheapest_of_all(kind, clusters):
    rng = np.random.default_rng(1)
    distance = {
        "log_snr": timesteps.log_snr_distance(processes.vp_linear(), 11),
        "time": timesteps.time_distance(11),
        "affinity": timesteps.affinity_distance(rng.uniform(-1, 1, (11, 11))),
    }[kind]
    edges = timesteps.interval_clusters(distance, clusters)
    least, cost = cheapest(distance, clusters)
    np.testing.assert_allclose(cost(np.round(edges * 11).astype(int)), least, atol=1e-9)
    assert edges[0] == 0 and edges[-1] == 1 and len(edges) == clusters + 1


def test_the_distance_of_tasks_is_how_little_they_agree():
    affinity = np.random.default_rng(0).uniform(-1, 1, (3, 3))
    np.testing.assert_array_equal(timesteps.affinity_distance(affinity), -affinity)


@pytest.mark.parametrize(
    "distance",
    [
        timesteps.log_snr_distance(processes.vp_cosine(num_steps=14), 14),
        timesteps.time_distance(14),
        1 + timesteps.affinity_distance(np.exp(-np.abs(np.subtract.outer(np.arange(14), np.arange(14))) / 5)),
    ],
    ids=["log_snr", "time", "affinity"],
)
def test_more_intervals_cost_no_more_and_one_for_each_part_nothing(distance):
    _, cost = cheapest(distance, 1)
    found = [timesteps.interval_clusters(distance, clusters) for clusters in range(1, 15)]
    costs = [cost(np.round(edges * 14).astype(int)) for edges in found]
    np.testing.assert_array_equal(found[0], [0.0, 1.0])
    assert (np.diff(costs) <= 1e-9).all() and abs(costs[-1]) < 1e-9


@pytest.mark.parametrize(
    ("process", "starts"),
    [(processes.vp_linear(), [0, 153, 394, 624, 823]), (processes.vp_cosine(), [0, 133, 372, 653, 881])],
    ids=["linear", "cosine"],
)
def test_the_intervals_of_known_schedules(process, starts):
    """Of a thousand steps in five intervals, computed independently of this library."""
    edges = timesteps.interval_clusters(timesteps.log_snr_distance(process, 1000), 5)
    np.testing.assert_array_equal(np.round(edges[:-1] * 1000), starts)
    even = timesteps.interval_clusters(timesteps.time_distance(1000), 5)
    np.testing.assert_allclose(even, np.linspace(0, 1, 6), atol=2e-3)


@pytest.mark.parametrize("process", [processes.rectified_flow(), processes.cosine()], ids=["flow", "cosine"])
def test_a_part_that_ends_in_pure_noise_has_the_log_snr_of_its_middle(process):
    found = timesteps.log_snr_distance(process, 8)
    at = np.array([*np.arange(1, 8), 7.5], np.float32) / 8
    expected = np.asarray(process.log_snr(at))
    np.testing.assert_allclose(found, np.abs(np.subtract.outer(expected, expected)), rtol=1e-5)


def test_a_batch_has_equally_many_times_of_each_interval():
    edges = (0.0, 0.1, 0.4, 1.0)
    t, weight = jax.jit(lambda key: timesteps.by_cluster(edges).draw((), key, (3000, 2)))(KEY)
    which = timesteps.cluster_of(edges, t)
    np.testing.assert_array_equal(np.bincount(np.ravel(which), minlength=3), 2000)
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        mine = t[which == i]
        assert low < float(mine.min()) < low + 0.02 and high - 0.02 < float(mine.max()) <= high
        np.testing.assert_allclose(mine.mean(), (low + high) / 2, atol=0.03)
    np.testing.assert_array_equal(weight, 1.0)
    # An edge belongs to the interval below it, as the last step of a discrete process does.
    np.testing.assert_array_equal(timesteps.cluster_of(edges, jnp.array([0.0, 0.1, 0.11, 0.4, 1.0])), [0, 0, 1, 1, 2])


DRAWS = {
    "uniform": timesteps.uniform(),
    "logit_normal": timesteps.logit_normal(0.5, 1.2),
    "mode": timesteps.mode(0.8),
    "log_normal": timesteps.log_normal(processes.edm()),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_restricted_draw_is_the_part_of_the_distribution(name):
    base = DRAWS[name]
    whole, _ = base.draw((), KEY, (40_000,))
    np.testing.assert_array_equal(timesteps.restricted(base).draw((), KEY, (40_000,))[0], whole)
    low, high = np.quantile(whole, [0.3, 0.8])
    part, _ = jax.jit(lambda low: timesteps.restricted(base, low, high).draw((), jax.random.key(1), (40_000,)))(low)
    expected = np.sort(np.asarray(whole))[12_000:32_000]
    assert part.min() >= low - 1e-4 and part.max() <= high + 1e-4
    shares = np.linspace(0.02, 0.98, 25)
    np.testing.assert_allclose(np.quantile(part, shares), np.quantile(expected, shares), atol=0.02 * (high - low))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: timesteps.interval_clusters(timesteps.time_distance(4), 5), "clusters is 5"),
        (lambda: timesteps.interval_clusters(np.full((4, 4), np.nan), 2), "distance is nan"),
        (lambda: timesteps.log_snr_distance(processes.absorbing(5), 4), "log_snr_distance needs Gaussian"),
        (lambda: timesteps.by_cluster((0.0, 0.5, 0.5)), "edges"),
        (lambda: timesteps.by_cluster((0.0, 0.5, 1.0)).draw((), KEY, (1,)), "at least the 2 intervals"),
    ],
)
def test_wrong_calls_are_told(call, told):
    with pytest.raises(InvalidInput, match=told):
        call()
