"""DiT and PixArt: sizes of the paper, prefix-shaped times, scan, remat, dtype, conditions, and clear errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path
from diffusion_jax.models.dit import patch_times, patchify, unpatchify
from diffusion_jax.models.layers import image_positions, sincos_positions
from tests.models.shared import (
    T,
    changed,
    compiled,
    dit_apply,
    dit_case,
    drawn_params,
    image,
    labels,
    tiny_dit,
)


@pytest.mark.parametrize("preset, millions", [("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675)])
def test_presets_have_the_papers_number_of_parameters(preset, millions):
    network = models.dit(preset, conditions=(models.label(1000),), learn_sigma=True)
    shapes = models.param_shapes(network, (1, 32, 32, 4), {"label": jax.ShapeDtypeStruct((1,), jnp.int32)})
    assert models.count_params(shapes) == pytest.approx(millions * 1e6, rel=0.01)


def test_zero_initialised_output_is_zero_and_sigma_is_reported_apart():
    network = tiny_dit(learn_sigma=True)
    x, cond = image(), labels(0, 2)
    run = compiled(lambda key: network.apply(network.init(key, x, T, cond), x, T, cond))
    output, extras = run(jax.random.key(0))
    assert output.shape == extras["log_variance"].shape == x.shape
    assert np.abs(output).max() == 0.0


def test_patches_and_back():
    x = image((2, 4, 6, 3))
    np.testing.assert_array_equal(unpatchify(patchify(x, 2), 2, 4, 6), x)
    np.testing.assert_array_equal(patchify(x, 2)[0, 2].reshape(2, 2, 3), x[0, :2, 4:6])


def test_times_of_patches():
    rows = jnp.arange(8.0).reshape(2, 4)
    per_row = patch_times(rows, 2, 4, 6)
    np.testing.assert_array_equal(per_row[0], [0.5] * 3 + [2.5] * 3)
    with pytest.raises(InvalidInput, match=r"t.shape.*takes \[B\]"):
        patch_times(jnp.zeros((2, 3)), 2, 4, 6)


@pytest.mark.parametrize("prefix", [(2, 4), (2, 4, 6)])
def test_equal_entries_of_a_vector_time_are_the_scalar_time(prefix):
    _, params, x, t, cond, output = dit_case()
    wide = np.broadcast_to(np.asarray(t).reshape(2, *(1,) * (len(prefix) - 1)), prefix)
    # The modulation's matrix product has another shape, so its sums may round otherwise.
    np.testing.assert_allclose(dit_apply()(params, x, wide, cond), output, atol=2e-5)


def test_a_patchs_time_is_its_own_where_patches_do_not_mix():
    network, params, x, _, cond, _ = dit_case()
    alone = models.edit("block/attention", lambda run, data, h, c, side: jnp.zeros_like(h))
    inside = models.intercepted(network, alone)
    apply = compiled(lambda t: inside.apply(params, {}, x, t, cond)[0])
    t = np.full((2, 4, 6), 300.0, np.float32)
    difference = np.abs(apply(t) - apply(changed(t, np.s_[0, :2, :2], 800.0)))
    assert difference[0, :2, :2].min() > 0
    assert changed(difference, np.s_[0, :2, :2], 0.0).max() == 0.0


def loss_and_gradient(network):
    """What it says of the shared case, squared, and how that moves with the parameters."""
    _, _, x, t, cond, _ = dit_case()
    return compiled(jax.value_and_grad(lambda params: (network.apply(params, x, t, cond)[0] ** 2).mean()))


@functools.cache
def plain_loss_and_gradient():
    network, params, *_ = dit_case()
    return loss_and_gradient(network)(params)


@pytest.mark.parametrize(
    "fields", [{"scan": False}, {"remat": "full"}, {"remat": "dots"}, {"remat": "dots_no_batch", "scan": False}]
)
def test_scan_and_remat_change_neither_layout_nor_output_nor_gradient(fields):
    _, params, x, _, cond, _ = dit_case()
    other = tiny_dit(**fields)
    layout = jax.tree.map(lambda leaf: leaf.shape, models.param_shapes(other, x.shape, cond))
    assert layout == jax.tree.map(jnp.shape, params)
    (expected, gradient), (found, other_gradient) = plain_loss_and_gradient(), loss_and_gradient(other)(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), other_gradient, gradient)


def test_deep_networks_are_traced_and_lowered_like_shallow_ones():
    def lines(depth):
        network = tiny_dit(depth=depth)
        params = models.param_shapes(network, (2, 4, 6, 3), labels(0, 1))
        return len(jax.jit(network.apply).lower(params, image(), T, labels(0, 1)).as_text().splitlines())

    assert lines(28) == lines(2)


def test_bfloat16_is_close_and_parameters_stay_float32():
    _, params, x, t, cond, output = dit_case()
    network = tiny_dit(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(models.param_shapes(network, x.shape, cond))} == {
        jnp.dtype("float32")
    }
    low = compiled(network.apply)(params, x, t, cond)[0]
    assert low.dtype == jnp.float32
    assert 0 < np.abs(low - output).max() < 0.1 * np.abs(output).max()


@pytest.mark.parametrize("fields", [{"positions": "rotary", "qk_norm": True}, {"positions": "learned", "swiglu": True}])
def test_every_option_runs_and_tells_places_apart(fields):
    network = tiny_dit(**fields)
    cond = labels(0, 2)
    x = np.array(np.broadcast_to(image((2, 1, 1, 3)), (2, 4, 6, 3)))
    x[:, 0, 0] += 1.0
    params = drawn_params(network, x, T, cond)
    apply = compiled(lambda x: network.apply(params, x, T, cond)[0])
    moved = np.roll(apply(np.roll(x, 2, axis=2)), -2, axis=2)
    assert np.abs(moved - apply(x)).max() > 1e-3


def test_labels_are_told_apart_and_dropped_ones_are_the_null_class():
    _, params, x, t, cond, output = dit_case()
    null = models.empty_condition((models.label(3),), cond)
    np.testing.assert_array_equal(null["label"], [3, 3])
    mixed = dit_apply()(params, x, t, labels(3, 2))
    unconditional = dit_apply()(params, x, t, null)
    np.testing.assert_array_equal(mixed[0], unconditional[0])
    np.testing.assert_array_equal(mixed[1], output[1])
    assert np.abs(unconditional - output).min(axis=(1, 2, 3)).max() > 0


def sequence_case():
    network = tiny_dit(conditions=(models.pooled(), models.context(), models.text(7, depth=1)), depth=1)
    cond = {
        "pooled": image((2, 5)),
        "context": image((2, 4, 9)),
        "context_mask": np.array([[True, True, True, False], [True, False, False, False]]),
        "tokens": np.array([[1, 2, 3], [4, 5, 0]], np.int32),
        "tokens_mask": np.array([[True, True, True], [True, True, False]]),
    }
    x = image()
    params = drawn_params(network, x, T, cond)
    return compiled(lambda cond: network.apply(params, x, T, cond)[0]), network.module.conditions, cond


def test_sequences_count_where_their_masks_say_so():
    apply, conditions, cond = sequence_case()
    before = apply(cond)
    padded = {
        **cond,
        "context": np.where(cond["context_mask"][..., None], cond["context"], np.float32(99.0)),
        "tokens": np.where(cond["tokens_mask"], cond["tokens"], np.int32(6)),
    }
    np.testing.assert_array_equal(apply(padded), before)
    shuffled = {**cond, "context": cond["context"][:, ::-1], "context_mask": cond["context_mask"][:, ::-1]}
    np.testing.assert_allclose(apply(shuffled), before, atol=1e-5)
    for name in ("pooled", "context", "tokens"):
        other = {**cond, name: changed(cond[name], (0, 0), np.asarray(cond[name])[0, 0] + 1)}
        difference = np.abs(apply(other) - before).max(axis=(1, 2, 3))
        assert difference[0] > 1e-4 and difference[1] == 0.0
    null = models.empty_condition(conditions, cond)
    assert jax.tree.map(jnp.shape, null) == jax.tree.map(jnp.shape, cond)
    assert np.isfinite(apply(null)).all()


def test_mistakes_are_told_in_one_sentence():
    network, params, x, t, cond, _ = dit_case()
    wrong = [
        (lambda: models.dit("XL/3"), "preset.*did you mean"),
        (lambda: models.dit("S/2", qknorm=True), "did you mean 'qk_norm'"),
        (lambda: tiny_dit(heads=3), "width is 16"),
        (lambda: tiny_dit(depth=0), "depth is 0"),
        (lambda: tiny_dit(positions="sin"), "did you mean 'sincos'"),
        (lambda: tiny_dit(remat="ful"), "did you mean 'full'"),
        (lambda: tiny_dit(dtype="bf16"), "did you mean 'bfloat16'"),
        (lambda: models.label(-1), "num_classes is -1"),
        (lambda: network.apply(params, x, t, None), "needs the condition 'label'"),
        (lambda: network.apply(params, x, t, {"lable": cond["label"]}), "did you mean 'label'"),
        (lambda: network.apply(params, x, t, {"label": jnp.zeros((2,))}), "dtype integer"),
        (lambda: network.apply(params, x[:, :3], t, cond), "divide by the patch"),
        (lambda: network.apply(params, x[0], t, cond), r"\[B, H, W, C\]"),
        (lambda: models.empty_condition((), cond), "no condition of the network reads"),
        (lambda: tiny_dit(conditions=models.label(3)), r"a tuple such as \(models.label\(10\),\)"),
        (lambda: tiny_dit(conditions=(models.label(3), models.label(5))), "one before it reads label already"),
        (lambda: tiny_dit(conditions=("label",)), r"conditions\[0\] is 'label'"),
        (lambda: tiny_dit(num_classes=3), "num_classes.*Valid: .*conditions"),
    ]
    for call, message in wrong:
        with pytest.raises(InvalidInput, match=message):
            jax.eval_shape(call)


def test_learned_positions_are_bound_to_their_resolution():
    network = tiny_dit(positions="learned", depth=1)
    params = models.param_shapes(network, (2, 4, 6, 3), labels(0, 1))
    with pytest.raises(InvalidInput, match="made for 6 patches"):
        jax.eval_shape(network.apply, params, image((2, 8, 8, 3)), T, labels(0, 1))


def test_positions_have_columns_first_and_span_the_same_whatever_the_resolution():
    native, fine = image_positions(2, 3, 3, 2.0), image_positions(4, 6, 3, 2.0)
    np.testing.assert_allclose(native[:4], [[0, 0], [0.5, 0], [1, 0], [0, 0.75]])
    np.testing.assert_allclose(fine.reshape(4, 6, 2)[::2, ::2].reshape(-1, 2), native, atol=1e-6)
    table = sincos_positions(image_positions(2, 3), 8)
    row = table.reshape(2, 3, 8)[1]
    np.testing.assert_array_equal(row[:, 4:], np.broadcast_to(row[0, 4:], (3, 4)))


CAPTIONED = (models.context("mlp"), models.sizes())


def tiny_pixart(**fields):
    shape = {"width": 24, "depth": 2, "heads": 2, "base_size": 2, "interpolation_scale": 2.0}
    return models.pixart(**{**shape, "conditions": CAPTIONED, **fields})


@functools.cache
def pixart_case():
    """A tiny PixArt: (network, params, x, cond), its captions masked in part."""
    network = tiny_pixart()
    x = image()
    cond = {
        "context": image((2, 4, 5), seed=2),
        "context_mask": np.array([[True, True, False, False], [True, True, True, False]]),
        "size": np.array([[512.0, 768.0], [1024.0, 1024.0]], np.float32),
        "aspect": np.array([2 / 3, 1.0], np.float32),
    }
    return network, drawn_params(network, x, T, cond), x, cond


@functools.cache
def pixart_call():
    network, params, _, _ = pixart_case()
    traces = []

    def call(x, t, cond):
        traces.append(t.shape)
        return network.apply(params, x, t, cond)[0]

    return compiled(call), traces


def test_pixart_says_nothing_about_masked_captions_and_something_about_all_else():
    _, _, x, cond = pixart_case()
    call, _ = pixart_call()
    before = call(x, T, cond)
    padded = {**cond, "context": np.where(cond["context_mask"][..., None], cond["context"], np.float32(99.0))}
    np.testing.assert_array_equal(call(x, T, padded), before)
    for name in ("context", "size", "aspect"):
        other = {**cond, name: changed(cond[name], 0, np.asarray(cond[name])[0] + 1.0)}
        difference = np.abs(call(x, T, other) - before).max(axis=(1, 2, 3))
        assert difference[0] > 1e-4 and difference[1] == 0.0
    null = models.empty_condition(CAPTIONED, cond)
    np.testing.assert_array_equal(null["size"], cond["size"])
    assert np.isfinite(call(x, T, null)).all()


def test_pixart_takes_times_per_pixel_and_compiles_once_a_shape():
    _, _, x, cond = pixart_case()
    call, traces = pixart_call()
    wide = call(x, np.broadcast_to(np.asarray(T)[:, None, None], x.shape[:3]), cond)
    np.testing.assert_allclose(wide, call(x, T, cond), atol=2e-5)
    call(x + 1, T + 1, cond)
    assert len(traces) == len(set(traces))


def test_pixart_branches_are_read_and_removed_by_their_names():
    network, params, x, cond = pixart_case()
    names = ("attention", "cross_attention", "mlp")
    gate = models.gates("block/cross_attention")
    opened = models.intercepted(network, gate, models.taps(tuple(f"block/{name}" for name in names)))
    apply = compiled(lambda collections, cond: opened.apply(params, collections, x, T, cond))
    shapes = jax.eval_shape(opened.init, jax.random.key(0), params, x, T, cond)
    open_gates, closed = (
        jax.tree.map(lambda leaf, value=value: np.full(leaf.shape, value), shapes) for value in (1.0, 0.0)
    )
    output, extras, _ = apply(open_gates, cond)
    reports = by_path(extras["taps"])
    assert len(reports) == 3
    assert {leaf.shape for leaf in reports.values()} == {(2, 2, 6, 24)}
    assert min(np.abs(leaf).max() for leaf in reports.values()) > 0
    np.testing.assert_allclose(output, pixart_call()[0](x, T, cond), atol=1e-5)
    other = {**cond, "context": np.asarray(cond["context"]) + 1.0}
    np.testing.assert_array_equal(apply(closed, other)[0], apply(closed, cond)[0])


def test_a_pixart_block_has_a_table_of_its_own_for_all_its_modulation():
    network = models.pixart("S/2")
    cond = {"context": jax.ShapeDtypeStruct((1, 3, 4096), jnp.float32)}
    shapes = models.param_shapes(network, (1, 8, 8, 4), cond)
    tables = {path: leaf.shape for path, leaf in by_path(shapes["blocks"]).items() if "modulation" in path}
    assert tables == {f"block/{name}/modulation/table": (12, 3, 384) for name in ("attention", "mlp")}


def test_embeddings_per_block_are_the_shared_ones_where_they_are_equal():
    _, params, x, t, cond, output = dit_case()
    other = tiny_dit(embeddings="per_block")
    apply = compiled(lambda condition, t: other.apply({**params, "condition": condition}, x, t, cond)[0])
    copies = jax.tree.map(lambda leaf: np.stack([leaf] * 3), jax.device_get(params["condition"]))
    np.testing.assert_allclose(apply(copies, t), output, atol=1e-5)
    for layer in range(3):
        moved = jax.tree.map(lambda leaf, layer=layer: changed(leaf, layer, leaf[layer] + 0.1), copies)
        assert np.abs(apply(moved, t) - output).max() > 1e-4
    np.testing.assert_allclose(apply(copies, np.broadcast_to(np.asarray(t)[:, None], (2, 4))), output, atol=2e-5)


def test_mistakes_about_the_published_options():
    network, params, x, cond = pixart_case()
    wrong = [
        (lambda: tiny_dit(modulation="singel"), "did you mean 'single'"),
        (lambda: tiny_dit(embeddings="per-block"), "did you mean 'per_block'"),
        (lambda: tiny_dit(embeddings="per_block", modulation="single"), "it is 'shared'"),
        (lambda: tiny_dit(embeddings="per_block", conditions=(models.context(),)), "per_block' takes vector"),
        (lambda: tiny_dit(interpolation_scale=0.0), "interpolation_scale is 0.0"),
        (lambda: tiny_dit(base_size=-1), "base_size is -1"),
        (lambda: tiny_dit(conditions=CAPTIONED).init(jax.random.key(0), x, T, cond), "divide by 3"),
        (lambda: models.context("gelu"), "projection is 'gelu'"),
        (lambda: models.pooled(3), "layers is 3"),
        (lambda: network.apply(params, x, T, {**cond, "size": cond["aspect"]}), "cond\\['size'\\]"),
        (lambda: tiny_pixart(conditions=(models.context("mlp", 6), models.sizes())).apply(params, x, T, cond), "4, 6"),
        (lambda: tiny_dit(in_channels=4).init(jax.random.key(0), x, T, labels(0, 1)), "images of 4 channels"),
    ]
    for call, message in wrong:
        with pytest.raises(InvalidInput, match=message):
            jax.eval_shape(call)
