"""Laws of the text and vision encoders; that they equal the published ones is in `tests/peers`."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import adapters, models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.layers import attention
from diffusion_jax.models.layers.embeddings import bicubic_matrix
from diffusion_jax.models.layers.prenorm import relative_buckets
from tests import shipped
from tests.models.shared import changed, compiled, image

TINY = {"width": 24, "depth": 3, "heads": 3, "mlp_width": 48}
ENCODERS = {
    "clip text": models.clip_text("small", **TINY, vocab_size=50, positions=12, eos=49),
    "t5": models.t5_encoder("small", **TINY, vocab_size=50, head_dim=6),
    "umt5": models.t5_encoder("small", **TINY, vocab_size=50, head_dim=6, shared_bias=False),
    "clip vision": models.clip_vision("small", **TINY, image_size=12, patch=4, projection=7),
    "dinov2": models.dinov2("base", **TINY, image_size=12, patch=4, registers=2, antialias=True),
}
TEXT = ("clip text", "t5", "umt5")


def inputs(name, batch=2, length=8):
    rng = np.random.default_rng(0)
    if name in TEXT:
        return changed(rng.integers(0, 49, size=(batch, length)).astype(np.int32), np.s_[:, -1], 49)
    return rng.normal(size=(batch, 12, 12, 3)).astype(np.float32)


@cache
def run(name):
    """`(params, given, [mask]) -> Encoded`, compiled."""
    return compiled(ENCODERS[name].apply)


def drawn(encoder, given):
    """Parameters of which none is trivial."""
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), given)
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    drawn = [rng.normal(size=leaf.shape) * (leaf.shape[-2] ** -0.5 if leaf.ndim > 2 else 1.0) for leaf in leaves]
    return jax.tree.unflatten(treedef, [leaf.astype(np.float32) for leaf in drawn])


@pytest.fixture(scope="module")
def params():
    return {name: drawn(encoder, inputs(name)) for name, encoder in ENCODERS.items()}


@pytest.mark.parametrize("name", ENCODERS)
def test_shapes_and_the_last_norm(name, params):
    encoder = ENCODERS[name]
    encoded = run(name)(params[name], inputs(name))
    tokens = {"clip vision": 10, "dinov2": 12}.get(name, 8)
    assert encoded.hidden.shape == (2, tokens, 24) and encoded.hidden_states.shape == (4, 2, tokens, 24)
    pooled = {"clip text": (2, 24), "clip vision": (2, 7), "dinov2": (2, 24)}.get(name)
    assert (None if encoded.pooled is None else encoded.pooled.shape) == pooled
    assert {leaf.dtype for leaf in jax.tree.leaves(encoded)} == {jnp.dtype("float32")}
    last = encoded.hidden_states[-1]
    expected = last if name == "clip vision" else compiled(encoder.final_norm)(params[name], last)
    np.testing.assert_allclose(encoded.hidden, expected, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_do_not_see_each_other_and_unrolling_changes_nothing(name, params):
    given = inputs(name)
    encoded = run(name)(params[name], given)
    module = ENCODERS[name].module.clone(scan=False, remat="full")
    unrolled = compiled(lambda params, given: module.apply({"params": params}, given, None))(params[name], given[1:])
    np.testing.assert_allclose(unrolled.hidden, encoded.hidden[1:], atol=2e-5)


@pytest.mark.parametrize("name", TEXT)
def test_what_is_masked_is_not_seen(name, params):
    apply, given = run(name), inputs(name)
    shown = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1]], bool)
    encoded = apply(params[name], given, shown)
    # Masks are True or 1.
    mask = shown.astype(np.int32) if name == "clip text" else shown
    other = apply(params[name], np.where(shown, given, 17).astype(np.int32), mask)
    np.testing.assert_allclose(other.hidden[shown], encoded.hidden[shown], atol=1e-6)
    assert np.abs(apply(params[name], given).hidden - encoded.hidden)[shown].max() > 1e-3


def test_clip_looks_back_only_and_t5_both_ways(params):
    given = inputs("clip text")
    for name, same in (("clip text", True), ("t5", False)):
        before, after = (run(name)(params[name], each) for each in (given, changed(given, np.s_[:, 5], 3)))
        assert (np.abs(before.hidden - after.hidden)[:, :5].max() < 1e-6) == same


def test_pooled_is_the_first_end_of_the_prompt(params):
    encoder = ENCODERS["clip text"]
    given = np.array([[5, 6, 49, 49, 49], [5, 49, 1, 2, 49]], np.int32)
    encoded = shipped.jit(encoder.apply)(params["clip text"], given)
    np.testing.assert_array_equal(encoded.pooled, np.asarray(encoded.hidden)[np.arange(2), [2, 1]])
    # eos=2 in a config means the highest id, whichever it is.
    legacy = models.CLIPText(**{**vars_of(encoder.module), "eos": 2})
    tokens = np.array([[2, 7, 30, 7]], np.int32)
    encoded = shipped.jit(legacy.apply)({"params": params["clip text"]}, tokens, None)
    np.testing.assert_array_equal(encoded.pooled, np.asarray(encoded.hidden)[:, 2])


def vars_of(module):
    return {name: getattr(module, name) for name in module.__dataclass_fields__ if name not in ("parent", "name")}


def test_t5_knows_distances_only(params):
    """The relative bias is the only position: the same tokens further on are encoded alike."""
    apply, given = run("t5"), inputs("t5", length=4)
    before, after = (np.pad(given, ((0, 0), room)) for room in ((5, 0), (0, 5)))
    encoded = apply(params["t5"], before, np.broadcast_to(np.arange(9) >= 5, (2, 9)))
    expected = apply(params["t5"], after, np.broadcast_to(np.arange(9) < 4, (2, 9)))
    np.testing.assert_allclose(encoded.hidden[:, 5:], expected.hidden[:, :4], atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_stream_that_bfloat16_cannot_carry(name, params):
    """A channel of 1e5, as trained encoders have them, beside channels of 1: in float16 it would be infinite, and added
    up in bfloat16 it would lose what the blocks add to it."""
    given, encoder = inputs(name), ENCODERS[name]
    place = ("embed", "embedding") if name in TEXT else ("positions",)
    leaves = models.by_path(params[name])
    huge = dict(params[name])
    table = changed(leaves["/".join(place)], np.s_[:, 0], 1e5)
    huge[place[0]] = {place[1]: table} if name in TEXT else table
    if name == "clip vision":
        # Its stream is normed before the first block.
        huge["norm_in"] = {**huge["norm_in"], "scale": changed(huge["norm_in"]["scale"], 0, 1e5)}
    exact = run(name)(huge, given).hidden_states
    low = compiled(encoder.module.clone(dtype="bfloat16").apply)({"params": huge}, given, None).hidden_states
    assert exact[..., 0].max() > 1e4 and np.isfinite(low).all()
    added, expected = (states[-1, ..., 0] - states[0, ..., 0] for states in (low, exact))
    assert np.linalg.norm(added - expected) / np.linalg.norm(expected) < 0.05


def test_states_that_are_not_used_cost_nothing():
    encoder = models.t5_encoder("small", depth=16)
    given = jnp.zeros((4, 128), jnp.int32)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), given)

    def bytes_of(read):
        compiled = jax.jit(lambda params, given: read(encoder.apply(params, given))).lower(shapes, given).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    state = 4 * 128 * 64 * 4
    assert bytes_of(lambda encoded: encoded.hidden) < bytes_of(lambda encoded: encoded.hidden_states[3]) - 8 * state


def test_hidden_patches_are_the_mask_token(params):
    apply, images = run("dinov2"), inputs("dinov2")
    mask = np.ones((2, 9), bool)
    mask[:, 4] = False
    encoded = apply(params["dinov2"], images, mask)
    other = apply(params["dinov2"], changed(images, np.s_[:, 4:8, 4:8], 7.0), mask)
    np.testing.assert_allclose(encoded.hidden, other.hidden, atol=1e-6)


@pytest.mark.parametrize("antialias", [False, True])
def test_resampling_matrices(antialias):
    for size, out in ((7, 7), (5, 11), (11, 5), (16, 37)):
        matrix = bicubic_matrix(size, out, antialias)
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-6)
        np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6)
    np.testing.assert_allclose(bicubic_matrix(7, 7, antialias), np.eye(7), atol=1e-7)
    # A straight line stays one away from the border, and a fine pattern is filtered where that is asked for.
    line = bicubic_matrix(32, 16, antialias) @ np.arange(32)
    np.testing.assert_allclose(np.diff(line)[3:-3], 2.0, atol=1e-4)
    fine = bicubic_matrix(30, 10, antialias) @ (np.arange(30) % 2)
    assert (np.ptp(fine[2:-2]) < 0.1) == antialias


def test_relative_buckets():
    index = relative_buckets(200, 32, 128)
    assert index.min() == 0 and index.max() == 31
    assert index[5, 5] == 0 and index[5, 4] == 1 and index[5, 6] == 17
    assert index[0, 7] == 23 and index[0, 8] == 24 and index[0, 16] == 26 and index[0, 150] == 31
    np.testing.assert_array_equal(index[1:, 1:], index[:-1, :-1])


@pytest.mark.parametrize("tile", [2**21, 2**9])
def test_attention_with_a_bias(tile, monkeypatch):
    """Whole, by heads and by chunks of queries: the same as written out, gradients too; the bias stays float32."""
    monkeypatch.setattr(attention, "TILE", tile)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 3, 8)).astype(np.float32) for n in (48, 32, 32))

    def written_out(q, k, v, mask, bias):
        logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5 + bias
        weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
        return jnp.einsum("bhnm,bmhd->bnhd", weights, v)

    for mask_shape, bias_shape in (((2, 1, 1, 32), (1, 3, 48, 32)), ((1, 1, 48, 32), (2, 1, 1, 32))):
        mask = changed(rng.random(mask_shape) < 0.7, np.s_[..., 0], True)
        bias = (3 * rng.normal(size=bias_shape)).astype(np.float32)

        @compiled
        def both(q, k, v, mask, bias):
            def loss(function, q, bias):
                return jnp.sum(jnp.cos(function(q, k, v, mask, bias)))

            ours, theirs = (
                jax.value_and_grad(lambda *args, f=f: loss(f, *args), argnums=(0, 1))(q, bias)
                for f in (attention.dot_product_attention, written_out)
            )
            rough = [a.astype(jnp.bfloat16) for a in (q, k, v)]
            low = attention.dot_product_attention(*rough, mask, bias + 300.0)
            return ours, theirs, low, written_out(*(a.astype(jnp.float32) for a in rough), mask, bias)

        ours, theirs, low, exact = both(q, k, v, mask, bias)
        for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
            np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-5)
        assert np.linalg.norm(low.astype(np.float32) - exact) / np.linalg.norm(exact) < 1e-2


def test_maps_are_tapped(params):
    encoder, given = ENCODERS["t5"], inputs("t5")

    def maps(out, q, k, v, mask, bias):
        return attention.attention_probabilities(q, k, mask, bias)

    network = models.intercepted(models.as_network(encoder), models.taps("attend", maps)).network
    encoded, extras = compiled(network.apply)({"params": params["t5"]}, given, np.zeros(2, np.float32))
    np.testing.assert_allclose(encoded.hidden, run("t5")(params["t5"], given).hidden, atol=1e-5)
    (found,) = jax.tree.leaves(extras["taps"])
    assert found.shape == (3, 2, 3, 8, 8)
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-5)


def test_lora_of_an_encoder(params):
    encoder, given, t = ENCODERS["clip text"], inputs("clip text"), jnp.zeros(2)
    adapted = adapters.lora(models.as_network(encoder), rank=2)
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), params["clip text"], given, t)
    moved = jax.tree.map(lambda leaf: 0.1 * np.asarray(image(leaf.shape)), shapes)
    encoded, _ = compiled(adapted.network.apply)({"params": params["clip text"], "lora": moved}, given, t)
    merged = run("clip text")(adapted.merge(params["clip text"], moved), given)
    np.testing.assert_allclose(encoded.hidden, merged.hidden, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.clip_text("vit_x"), "did you mean 'vit_l'"),
        (lambda: models.clip_text(widht=3), "did you mean 'width'"),
        (lambda: models.clip_text(width=50, heads=3), "must divide by the number of heads, 3"),
        (lambda: models.clip_text(activation="gelu_new"), "did you mean 'gelu_tanh'"),
        (lambda: models.t5_encoder(depth=0), "positive integer"),
        (lambda: models.t5_encoder(dtype="float16"), "use bfloat16 or float32"),
        (lambda: models.t5_encoder(buckets=30), "a multiple of 4"),
        (lambda: models.dinov2(dtype="int8"), "dtype is 'int8'"),
        (lambda: models.clip_vision(patch=300), "an image of 224 pixels"),
        (lambda: ENCODERS["t5"].apply({}, jnp.zeros((2, 3))), "integers [B, N] are needed"),
        (lambda: ENCODERS["t5"].apply({}, jnp.zeros((2, 3), int), jnp.ones((2, 4))), "(2, 3) is needed"),
        (lambda: ENCODERS["clip text"].apply({}, jnp.zeros((2, 13), int)), "12 positions"),
        (lambda: ENCODERS["dinov2"].apply({}, jnp.zeros((2, 13, 12, 3))), "divide by the patch, 4"),
        (lambda: ENCODERS["dinov2"].apply({}, jnp.zeros((2, 12, 12, 4))), "[B, H, W, 3] are needed"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InvalidInput) as error:
        call()
    assert message in str(error.value)


def test_clip_has_no_mask_token(params):
    with pytest.raises(InvalidInput, match="no mask token"):
        ENCODERS["clip vision"].apply(params["clip vision"], inputs("clip vision"), np.ones((2, 9)))
