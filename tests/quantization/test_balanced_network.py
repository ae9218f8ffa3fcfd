"""Balancing around a network: without a quantiser nothing changes; with one, its error falls where channels differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.quantization.balanced_network import balanced_network, input_taps
from diffusion_jax.quantization.statistics import no_maxima, with_batch
from tests.models.shared import scramble

NET = models.dit(patch=2, width=16, depth=2, heads=2)
X, T = jax.random.normal(jax.random.key(1), (3, 4, 4, 1)), jnp.array([100.0, 600.0, 900.0])
SELECT, EDGES = ("q", "feed_forward/up", "feed_forward/down"), (500.0, 800.0)


@pytest.fixture(scope="module")
def world():
    """`(params, maxima of three buckets)` of a tiny transformer with weights that are nowhere zero."""
    params = scramble(jax.jit(NET.init)(jax.random.key(0), X, T))

    @jax.jit
    def collect(params):
        inputs = input_taps(NET, SELECT)(params, X, T)
        return with_batch(no_maxima(inputs, 3), inputs, T, np.array(EDGES)).maxima

    return params, collect(params)


def test_inputs_are_tapped_by_path_and_stacked_over_depth(world):
    _, maxima = world
    paths = {path.split("/")[-1] for path in maxima}
    assert paths == {"q", "up", "down"}
    assert {leaf.shape for leaf in maxima.values()} == {(3, 2, 16), (3, 2, 64)}


@pytest.mark.parametrize("rotated", [False, True])
def test_in_floats_it_is_the_network_at_times_of_any_buckets(world, rotated):
    params, maxima = world
    made = balanced_network(NET, NET, SELECT, edges=EDGES, rotated=rotated)
    prepared = made.prepare(params, maxima, [0.2, 0.5, 0.8])
    expected = NET.apply(params, X, T)[0]
    call = jax.jit(lambda prepared, t: made.network.apply(prepared, X, t)[0])
    np.testing.assert_allclose(call(prepared, T), expected, atol=2e-5 * np.abs(expected).max())
    # A sample depends on the copies of its own bucket, and on no other.
    spoilt = {**prepared, "copies": jax.tree.map(lambda leaf: leaf.at[1].add(0.1), prepared["copies"])}
    off = np.abs(call(spoilt, T) - expected).max((1, 2, 3)) > 1e-3 * np.abs(expected).max()
    np.testing.assert_array_equal(off, [False, True, False])


def test_what_no_bucket_changes_is_kept_once_and_the_rest_in_copies(world):
    params, maxima = world
    prepared = balanced_network(NET, NET, SELECT, edges=EDGES).prepare(params, maxima, 0.5)
    # A kernel and its factors for each of the three selected layers.
    assert len(prepared["copies"]) == 6 and all(leaf.shape[0] == 3 for leaf in prepared["copies"].values())


def test_what_does_not_fit_is_refused(world):
    params, maxima = world
    with pytest.raises(InvalidInput, match="3 buckets"):
        balanced_network(NET, NET, SELECT, edges=EDGES).prepare(params, {k: v[:2] for k, v in maxima.items()}, 0.5)
    with pytest.raises(InvalidInput, match="Dense"):
        jax.eval_shape(balanced_network(NET, NET, "feed_forward").network.init, jax.random.key(0), X, T)
