"""Text transformer: shapes, times per token, the absorbing mask, and attention in both directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.errors import InvalidInput
from tests.models.shared import T, changed, compiled, drawn_params

TOKENS = jnp.array([[1, 2, 11, 4, 5], [6, 7, 8, 9, 10]])


@functools.cache
def case():
    network = models.text_transformer(vocab_size=11, width=16, depth=2, heads=2, qk_norm=True)
    params = drawn_params(network, TOKENS, T)
    return network, compiled(lambda x, t: network.apply(params, x, t)[0])


def test_logits_of_words_from_both_sides_and_times_per_token():
    _, apply = case()
    logits = apply(TOKENS, T)
    assert logits.shape == (2, 5, 11) and logits.dtype == jnp.float32
    np.testing.assert_allclose(apply(TOKENS, np.broadcast_to(np.asarray(T)[:, None], (2, 5))), logits, atol=2e-5)
    for place in (0, 4):
        change = np.abs(apply(changed(TOKENS, (0, place), 0), T) - logits)
        assert change[0].min(axis=-1).max() > 0 and change[0].max(axis=-1).min() > 1e-5
        assert change[1].max() == 0.0
    swapped = apply(np.asarray(TOKENS)[:, ::-1], T)[:, ::-1]
    assert np.abs(swapped - logits).max() > 1e-3


def test_untrained_logits_are_uniform():
    network, _ = case()
    output = compiled(lambda key: network.apply(network.init(key, TOKENS, T), TOKENS, T)[0])(jax.random.key(0))
    assert np.abs(output).max() == 0.0


def test_mistakes_are_told():
    network, apply = case()
    with pytest.raises(InvalidInput, match="vocab_size is 1"):
        models.text_transformer(vocab_size=1)
    with pytest.raises(InvalidInput, match="integer tokens"):
        network.apply({}, jnp.zeros((2, 5)), T)
    with pytest.raises(InvalidInput, match="per sample or per token"):
        apply(TOKENS, jnp.zeros((2, 3)))
