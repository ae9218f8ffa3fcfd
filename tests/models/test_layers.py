"""Layers: attention against its definition, positions, embeddings, and prefix-shaped modulation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.costs import count_flops
from diffusion_jax.models import dit, layers
from diffusion_jax.models.layers import attention as attention_module
from diffusion_jax.models.layers.attention import _chunk
from diffusion_jax.models.layers.modulation import spread
from diffusion_jax.models.layers.patches import from_patches, times_of_patches, to_patches
from tests.models.shared import compiled, image


def qkv(shape=(2, 12, 2, 8), dtype=jnp.float32):
    return [jax.device_put(np.asarray(image(shape, seed)).astype(dtype)) for seed in range(3)]


def masks():
    keys, per_query = np.arange(12) < np.array([[5], [12]]), np.tril(np.ones((1, 1, 12, 12), bool))
    return {
        "none": None,
        "keys": jax.device_put(layers.key_mask(jax.device_put(keys))),
        "per_query": jax.device_put(per_query),
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


@pytest.mark.parametrize("tile", [2**21, 1], ids=["at once", "by heads"])
@pytest.mark.parametrize("mask", list(masks()))
def test_derivatives_of_attention_are_those_of_the_library_both_ways(mask, tile, monkeypatch):
    monkeypatch.setattr(attention_module, "TILE", tile)
    primals, tangents, visible = qkv(), [0.5 * leaf for leaf in qkv()[::-1]], masks()[mask]
    bias = image((1, 2, 12, 12), 7)

    def both_ways(attend):
        def along(bias, *inputs):
            out, forward = jax.jvp(attend, (bias, *inputs), (bias, *tangents))
            return out, forward, jax.vjp(attend, bias, *inputs)[1](out)

        return jax.tree.leaves(jax.jit(along)(bias, *primals))

    ours = both_ways(lambda bias, q, k, v: layers.dot_product_attention(q, k, v, visible, bias))
    library = both_ways(lambda bias, q, k, v: jax.nn.dot_product_attention(q, k, v, bias, visible))
    for a, b in zip(ours, library, strict=True):
        assert float(np.abs(b).max()) > 1e-3
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_rematerialised_block_asks_attention_for_its_map_again_and_for_nothing_else(monkeypatch):
    monkeypatch.setattr(attention_module, "TILE", 1)
    batch = image((1, 4, 4, 1), 0)

    def products(remat):
        network = dit("S/2", width=8, depth=1, heads=2, remat=remat)
        params = jax.eval_shape(network.init, jax.random.key(0), batch, jnp.zeros(1), None)
        loss = jax.grad(lambda params: jnp.sum(network.apply(params, batch, jnp.zeros(1), None)[0] ** 2))
        return count_flops(loss, params)

    # Everything kept, heads one by one: the product for the map of 4 x 4 tokens is made a second time in both.
    assert products("dots_no_batch") == products("none") < products("full")


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
    hidden = ~np.asarray(mask)[:, 0, 0, :, None, None]
    attend = jax.jit(layers.dot_product_attention)
    others = (np.where(hidden, np.float32(value), leaf) for value, leaf in ((7.0, k), (-9.0, v)))
    np.testing.assert_array_equal(attend(q, *others, mask), attend(q, k, v, mask))


def test_attention_keeps_its_softmax_in_float32():
    low = qkv(dtype=jnp.bfloat16)
    assert jax.eval_shape(layers.attention_probabilities, *low[:2]).dtype == jnp.float32
    attend = compiled(layers.dot_product_attention)
    out, exact = attend(*low), attend(*(np.asarray(leaf).astype(np.float32) for leaf in low))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.03)


def test_rotation_keeps_lengths_and_only_differences_of_positions_count():
    q, k, _ = qkv()
    place = layers.grid_positions(3, 4)

    @compiled
    def turn(angles):
        return layers.rotate(q, angles), layers.rotate(k, angles)

    products = []
    for offset in (0.0, 5.0):
        turned = turn(layers.rotary_angles(place + offset, 8))
        np.testing.assert_allclose(np.linalg.norm(turned[0], axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5)
        products.append(np.einsum("bnhd,bmhd->bhnm", *turned))
    np.testing.assert_allclose(products[0], products[1], atol=2e-5)
    assert np.abs(products[0] - np.einsum("bnhd,bmhd->bhnm", q, k)).max() > 0.1


def test_positions_tell_every_place_apart():
    table = layers.sincos_positions(layers.grid_positions(5, 7), 32)
    assert table.shape == (35, 32)
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1) + 10 * np.eye(35)
    assert distances.min() > 0.1


def test_timestep_embedding_tells_neighbouring_steps_apart_and_takes_any_prefix():
    t, embed = np.arange(1000, dtype=np.float32), compiled(lambda t: layers.timestep_embedding(t, 64))
    table = embed(t)
    assert table.dtype == np.float32
    assert np.linalg.norm(np.diff(table, axis=0), axis=-1).min() > 0.1
    np.testing.assert_array_equal(embed(t.reshape(10, 100)), table.reshape(10, 100, 64))
    rough = jax.ShapeDtypeStruct((1000,), jnp.bfloat16)
    assert jax.eval_shape(lambda t: layers.timestep_embedding(t, 64), rough).dtype == jnp.float32


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 4, 6, 8)])
def test_modulation_by_equal_vectors_does_not_depend_on_their_prefix(shape):
    x, vectors = image(shape), image((2, shape[0], shape[-1]), 2)

    @compiled
    def modulated(x, shift, scale):
        def wide(prefix, a):
            return jnp.broadcast_to(layers.expand_vector(a, jnp.zeros((*prefix, 8))), (*prefix, 8))

        prefixes = [shape[:ndim] for ndim in range(2, len(shape))]
        every = [layers.modulate(x, wide(prefix, shift), wide(prefix, scale)) for prefix in prefixes]
        return layers.modulate(x, shift, scale), every

    expected, every = modulated(x, *np.asarray(vectors))
    for found in every:
        np.testing.assert_array_equal(found, expected)


def test_norms_have_unit_moments():
    x = jax.device_put(3 + 5 * np.asarray(image((2, 6, 6, 24))))
    y = compiled(layers.layer_norm)(x)
    np.testing.assert_allclose(y.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.var(-1), 1.0, rtol=1e-3)
    norm = layers.GroupNorm(groups=5)
    y = compiled(lambda x: norm.apply(norm.init(jax.random.key(0), x), x))(x).reshape(2, 36, 4, 6)
    np.testing.assert_allclose(y.mean((1, 3)), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.var((1, 3)), 1.0, rtol=1e-3)


@pytest.mark.parametrize("patch, sizes", [((2, 3), (4, 6)), ((1, 2, 2), (3, 4, 2)), ((2,), (6,)), ((), ())])
def test_patches_of_any_number_of_axes_and_back(patch, sizes):
    x = image((2, *sizes, 3))
    tokens = compiled(lambda x: to_patches(x, patch))(x)
    assert tokens.shape == (2, math.prod(sizes) // math.prod(patch), 3 * math.prod(patch))
    first = np.asarray(x)[(slice(None), *(slice(0, size) for size in patch))]
    np.testing.assert_array_equal(tokens[:, 0], first.reshape(2, -1))
    np.testing.assert_array_equal(compiled(lambda tokens: from_patches(tokens, patch, sizes))(tokens), x)
    # The time of a patch is the mean of its entries' times.
    t = np.random.default_rng(1).random((2, *sizes[:1]), np.float32)
    whole = np.broadcast_to(t.reshape(*t.shape, *(1,) * (len(sizes) + 1 - t.ndim)), (2, *sizes))
    expected = compiled(lambda whole: to_patches(whole, patch))(whole[..., None]).mean(-1) if sizes else t
    np.testing.assert_allclose(compiled(lambda t: times_of_patches(t, patch, sizes))(t), expected, rtol=1e-6)


def test_the_vectors_of_segments_are_those_of_their_tokens():
    c, counts = np.asarray(image((2, 4, 3))), (1, 3, 3, 2)
    np.testing.assert_array_equal(compiled(lambda c: spread(c, counts))(c), np.repeat(c, counts, axis=1))
