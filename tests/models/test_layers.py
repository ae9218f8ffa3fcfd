"""Layers: attention against its definition, positions, embeddings, and prefix-shaped modulation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models import layers
from diffusion_jax.models.layers import attention as attention_module
from diffusion_jax.models.layers.attention import _chunk
from diffusion_jax.models.layers.modulation import spread
from diffusion_jax.models.layers.patches import from_patches, times_of_patches, to_patches


def qkv(shape=(2, 12, 2, 8), dtype=jnp.float32):
    return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3)]


def masks():
    per_query = jnp.arange(12)[:, None] >= jnp.arange(12)[None, :]
    return {
        "none": None,
        "keys": layers.key_mask(jnp.arange(12)[None, :] < jnp.array([[5], [12]])),
        "per_query": jnp.broadcast_to(per_query, (1, 1, 12, 12)),
    }


@pytest.mark.parametrize("mask", list(masks()))
def test_attention_is_the_weighted_mean_of_the_values_and_chunks_do_not_matter(mask, monkeypatch):
    (q, k, v), visible = qkv((2, 64, 2, 8)) if mask == "none" else qkv(), masks()[mask]

    @jax.jit
    def reference(q, k, v):
        maps = layers.attention_probabilities(q, k, visible)
        return maps.sum(-1), jnp.einsum("bhnm,bmhd->bnhd", maps, v), jax.nn.dot_product_attention(q, k, v, mask=visible)

    def run(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: layers.dot_product_attention(q, k, v, visible), q, k, v)
        return out, pull(out)

    sums, expected, library = reference(q, k, v)
    np.testing.assert_allclose(sums, 1.0, rtol=1e-5)
    whole, gradient = jax.jit(run)(q, k, v)
    np.testing.assert_allclose(whole, expected, atol=1e-6)
    np.testing.assert_allclose(whole, library, atol=1e-6)

    monkeypatch.setattr(attention_module, "_chunk", lambda length, limit: length // 4)
    chunked, chunked_gradient = jax.jit(lambda q, k, v: run(q, k, v))(q, k, v)
    np.testing.assert_allclose(chunked, whole, atol=1e-6)
    for a, b in zip(chunked_gradient, gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_chunks_divide_the_length_and_stay_within_the_limit():
    for length, limit in [(256, 1000), (256, 100), (1024, 200), (1000, 300), (257, 100)]:
        chunk = _chunk(length, limit)
        assert length % chunk == 0
        assert chunk <= limit or chunk == length
    assert _chunk(1024, 200) == 128
    assert _chunk(1024, 1) == 32


def test_attention_ignores_what_the_mask_hides():
    q, k, v = qkv()
    mask = masks()["keys"]
    hidden = ~mask[:, 0, 0, :, None, None]
    before = layers.dot_product_attention(q, k, v, mask)
    after = layers.dot_product_attention(q, jnp.where(hidden, 7.0, k), jnp.where(hidden, -9.0, v), mask)
    np.testing.assert_array_equal(before, after)


def test_attention_keeps_its_softmax_in_float32():
    q, k, v = qkv(dtype=jnp.bfloat16)
    assert layers.attention_probabilities(q, k).dtype == jnp.float32
    out = layers.dot_product_attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = layers.dot_product_attention(*(a.astype(jnp.float32) for a in (q, k, v)))
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


def test_rotation_keeps_lengths_and_only_differences_of_positions_count():
    q, k, _ = qkv()
    place = layers.grid_positions(3, 4)
    products = []
    for offset in (0.0, 5.0):
        angles = layers.rotary_angles(place + offset, 8)
        turned = layers.rotate(q, angles), layers.rotate(k, angles)
        np.testing.assert_allclose(jnp.linalg.norm(turned[0], axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5)
        products.append(jnp.einsum("bnhd,bmhd->bhnm", *turned))
    np.testing.assert_allclose(products[0], products[1], atol=2e-5)
    assert float(jnp.abs(products[0] - jnp.einsum("bnhd,bmhd->bhnm", q, k)).max()) > 0.1


def test_positions_tell_every_place_apart():
    table = layers.sincos_positions(layers.grid_positions(5, 7), 32)
    assert table.shape == (35, 32)
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1) + 10 * np.eye(35)
    assert distances.min() > 0.1


def test_timestep_embedding_tells_neighbouring_steps_apart_and_takes_any_prefix():
    t = jnp.arange(1000.0)
    table = layers.timestep_embedding(t, 64)
    assert table.dtype == jnp.float32
    gaps = jnp.linalg.norm(jnp.diff(table, axis=0), axis=-1)
    assert float(gaps.min()) > 0.1
    np.testing.assert_array_equal(layers.timestep_embedding(t.reshape(10, 100), 64), table.reshape(10, 100, 64))
    assert layers.timestep_embedding(t.astype(jnp.bfloat16), 64).dtype == jnp.float32


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 4, 6, 8)])
def test_modulation_by_equal_vectors_does_not_depend_on_their_prefix(shape):
    x = jax.random.normal(jax.random.key(1), shape)
    shift, scale = jax.random.normal(jax.random.key(2), (2, shape[0], shape[-1]))
    expected = layers.modulate(x, shift, scale)
    for ndim in range(2, len(shape)):
        prefix = shape[:ndim]
        wide = [
            jnp.broadcast_to(layers.expand_vector(a, jnp.zeros((*prefix, 8))), (*prefix, 8)) for a in (shift, scale)
        ]
        np.testing.assert_array_equal(layers.modulate(x, *wide), expected)


def test_norms_have_unit_moments():
    x = 3 + 5 * jax.random.normal(jax.random.key(1), (2, 6, 6, 24))
    y = layers.layer_norm(x)
    np.testing.assert_allclose(y.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.var(-1), 1.0, rtol=1e-3)
    norm = layers.GroupNorm(groups=5)
    y = norm.apply(norm.init(jax.random.key(0), x), x).reshape(2, 36, 4, 6)
    np.testing.assert_allclose(y.mean((1, 3)), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.var((1, 3)), 1.0, rtol=1e-3)


@pytest.mark.parametrize("patch, sizes", [((2, 3), (4, 6)), ((1, 2, 2), (3, 4, 2)), ((2,), (6,)), ((), ())])
def test_patches_of_any_number_of_axes_and_back(patch, sizes):
    x = jax.random.normal(jax.random.key(0), (2, *sizes, 3))
    tokens = to_patches(x, patch)
    assert tokens.shape == (2, math.prod(sizes) // math.prod(patch), 3 * math.prod(patch))
    first = x[(slice(None), *(slice(0, size) for size in patch))]
    np.testing.assert_array_equal(tokens[:, 0], first.reshape(2, -1))
    np.testing.assert_array_equal(from_patches(tokens, patch, sizes), x)
    # The time of a patch is the mean of its entries' times.
    t = jax.random.uniform(jax.random.key(1), (2, *sizes[:1]))
    whole = jnp.broadcast_to(t.reshape(*t.shape, *(1,) * (len(sizes) + 1 - t.ndim)), (2, *sizes))
    expected = to_patches(whole[..., None], patch).mean(-1) if sizes else t
    np.testing.assert_allclose(times_of_patches(t, patch, sizes), expected, rtol=1e-6)


def test_the_vectors_of_segments_are_those_of_their_tokens():
    c = jax.random.normal(jax.random.key(0), (2, 4, 3))
    np.testing.assert_array_equal(spread(c, (1, 3, 3, 2)), jnp.repeat(c, jnp.array([1, 3, 3, 2]), axis=1))
