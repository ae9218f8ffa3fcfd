"""Masks of weights: ones are the network, a mask is an edit of the weights, each sample has its own, drawn as told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.errors import InvalidInput
from tests.models.shared import T, compiled, dit_case, drawn_params, image, labels

LAYERS = ("q", "k", "v", "out")


def random_masks(like, batch, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (rng.random((leaf.shape[0], batch, *leaf.shape[2:])) > 0.3).astype(np.float32), like
    )


def test_ones_are_the_network_and_a_shared_mask_is_an_edit_of_its_weights():
    network, params, x, t, cond, plain = dit_case()
    opened = models.intercepted(network, models.masked_weights())
    made = opened.init(jax.random.key(0), params, x, t, cond)
    run = compiled(lambda *args: opened.network.apply(*args)[0])
    np.testing.assert_array_equal(run({"params": params, **made}, x, t, cond), plain)
    masks = random_masks(made["weight_masks"], 1)
    edited = jax.tree.map(np.array, params)
    attention = edited["blocks"]["block"]["attention"]["attention"]
    for name in LAYERS:
        attention[name]["kernel"] *= masks["blocks"]["block"]["attention"]["attention"][name]["mask"][:, 0]
    expected = compiled(lambda *args: network.apply(*args)[0])(edited, x, t, cond)
    assert np.abs(expected - plain).max() > 1e-2
    np.testing.assert_allclose(run({"params": params, "weight_masks": masks}, x, t, cond), expected, atol=1e-6)


def test_samples_with_masks_of_their_own_are_calls_of_their_own():
    network, params, x, t, cond, _ = dit_case()
    opened = models.intercepted(network, models.masked_weights())
    made = opened.init(jax.random.key(0), params, x, t, cond)
    run = compiled(lambda *args: opened.network.apply(*args)[0])
    masks = random_masks(made["weight_masks"], 2)
    both = run({"params": params, "weight_masks": masks}, x, t, cond)
    shares = models.kept_share(masks)
    assert len(shares) == 4 and all(share.shape == (3, 2) for share in shares.values())
    for i in range(2):
        own = jax.tree.map(lambda leaf, i=i: leaf[:, i : i + 1], masks)
        alone = run({"params": params, "weight_masks": own}, x, t, cond)
        np.testing.assert_allclose(both[i], alone[i], atol=1e-5)
    assert np.abs(both[0] - alone[0]).max() > 1e-3


def test_the_decoder_of_a_unet_is_masked_alone_and_its_masks_have_a_gradient():
    network = models.unet("digits", channels=8, groups=4, multipliers=(1,), attention=(1,), mid_attention=0)
    x = image((2, 4, 4, 1))
    params = drawn_params(network, x, T)
    decoder = tuple(f"up_*_attention/blocks/block/attention/attention/{name}" for name in LAYERS)
    opened = models.intercepted(network, models.masked_weights(decoder))
    masks = opened.init(jax.random.key(0), params, x, T)["weight_masks"]
    assert {path.split("_")[0] for path in models.kept_share(masks)} == {"up"}

    @compiled
    @jax.grad
    def slope(masks):
        return jnp.square(opened.network.apply({"params": params, "weight_masks": masks}, x, T)[0]).sum()

    for path, leaf in models.by_path(slope(masks)).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def test_masks_are_drawn_with_one_gumbel_variable_and_the_gradient_of_the_sigmoid():
    logits = np.repeat(np.array([-2.0, 0.0, 1.0, 5.0], np.float32)[:, None], 100_000, axis=1)
    key = jax.random.key(0)

    def draw(logits):
        value, pull = jax.vjp(lambda logits: models.gumbel_sigmoid_st(key, logits, 0.7, single=True), logits)
        return value, pull(jnp.ones_like(value))[0], jax.random.gumbel(key, logits.shape)

    value, slope, noise = compiled(draw)(logits)
    np.testing.assert_allclose(value.mean(axis=1), 1 - np.exp(-np.exp(logits[:, 0])), atol=0.01)
    soft = 1 / (1 + np.exp(-(logits + noise) / 0.7))
    np.testing.assert_allclose(slope, soft * (1 - soft) / 0.7, atol=1e-5)


def test_what_has_no_matrix_or_too_many_masks_is_refused():
    network, params, x, t, cond, _ = dit_case()
    with pytest.raises(InvalidInput, match="with a matrix each"):
        models.intercepted(network, models.masked_weights("attend")).init(jax.random.key(0), params, x, t, cond)
    opened = models.intercepted(network, models.masked_weights())
    shapes = jax.eval_shape(opened.init, jax.random.key(0), params, x, t, cond)
    masks = random_masks(shapes["weight_masks"], 3)
    with pytest.raises(InvalidInput, match="one for each sample"):
        opened.network.apply({"params": params, "weight_masks": masks}, x, t, labels(0, 2))
