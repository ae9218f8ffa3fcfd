"""Laws of the U-Net: what it computes at initialisation, how times, conditions and ControlNets enter, its sizes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import (
    by_path,
    concat,
    context,
    count_params,
    empty_condition,
    label,
    param_shapes,
    reference,
)
from diffusion_jax.models.unet import unet
from tests.models.drawn import drawn
from tests.models.shared import T, changed, compiled, image, labels

# Attention in the middle alone: it is the same module on the way down and up.
TINY = {"channels": 8, "multipliers": (1, 2), "num_residual": 1, "attention": (0, 0), "heads": 2, "groups": 4}
TINY = {**TINY, "mid_residual": 1}
SHALLOW = {**TINY, "multipliers": (1,), "attention": (0,), "mid_attention": 0, "mid_residual": 0}
TRANSFORMER = {**TINY, "transformer": True, "mid_attention": 2, "modulation": "shift", "conditions": (context(),)}
TEXT = {**TRANSFORMER, "multipliers": (1,), "attention": (0,)}
X, LABEL, CONTEXT = image((2, 4, 6, 3)), labels(0, 2), {"context": image((2, 5, 6), 2)}
CASES = {"classes": ({**TINY, "conditions": (label(3),)}, LABEL), "text": (TEXT, CONTEXT)}


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@cache
def model(case):
    fields, cond = CASES[case]
    network = unet(**fields)
    params = drawn(param_shapes(network, X.shape, cond))
    return network, params, compiled(lambda *args: network.apply(*args)[0]), cond


def test_output_is_zero_at_initialisation():
    network = unet(**SHALLOW)
    y, _ = compiled(lambda key: network.apply(network.init(key, X, T), X, T))(jax.random.key(0))
    np.testing.assert_array_equal(y, np.zeros(X.shape))


@pytest.mark.parametrize(("case", "shape"), [("classes", (2, 4)), ("classes", (2, 4, 6)), ("text", (2, 4, 6))])
def test_equal_times_per_pixel_or_row_are_one_time_per_sample(case, shape):
    _, params, apply, cond = model(case)
    field = np.broadcast_to(np.asarray(T).reshape(-1, *(1,) * (len(shape) - 1)), shape)
    np.testing.assert_allclose(apply(params, X, field, cond), apply(params, X, T, cond), atol=2e-5)


def transposed(params):
    return jax.tree.map(lambda p: p.swapaxes(0, 1) if p.ndim == 4 else p, params)


@pytest.mark.parametrize("case", CASES)
def test_transposing_image_times_and_kernels_transposes_the_output(case):
    _, params, apply, cond = model(case)
    x, t = np.asarray(X), np.random.default_rng(4).uniform(0, 1000, X.shape[:3]).astype(np.float32)
    y = apply(params, x, t, cond)
    flipped = apply(transposed(jax.device_get(params)), x.swapaxes(1, 2), t.swapaxes(1, 2), cond)
    np.testing.assert_allclose(flipped.swapaxes(1, 2), y, atol=2e-5)
    assert np.abs(y - apply(params, x, t.mean((1, 2)), cond)).max() > 1e-2


def test_a_sample_does_not_see_its_neighbours():
    _, params, apply, cond = model("text")
    both = apply(params, X, T, cond)
    for i in range(2):
        others = jax.tree.map(lambda leaf, i=i: changed(leaf, 1 - i, 0.5), (X, T, cond))
        np.testing.assert_allclose(apply(params, *others)[i], both[i], atol=2e-5)
        assert np.abs(apply(params, *others)[1 - i] - both[1 - i]).max() > 1e-2


def test_time_and_label_enter_through_the_modulations_alone():
    _, params, apply, cond = model("classes")
    mute = jax.tree_util.tree_map_with_path(
        lambda path, p: 0 * p if "modulation" in jax.tree_util.keystr(path) else p, jax.device_get(params)
    )
    others, half = labels(1, 1), 0.5 * np.asarray(T)
    np.testing.assert_array_equal(apply(mute, X, T, cond), apply(mute, X, half, others))
    assert np.abs(apply(params, X, T, cond) - apply(params, X, half, cond)).max() > 1e-2
    assert np.abs(apply(params, X, T, cond) - apply(params, X, T, others)).max() > 1e-2


def test_null_label_that_embeds_to_nothing_is_the_unconditional_network():
    _, params, apply, cond = model("classes")
    plain = unet(**TINY)
    condition = {name: leaf for name, leaf in params["condition"].items() if name != "label"}
    expected, _ = compiled(plain.apply)({**params, "condition": condition}, X, T)
    table = changed(params["condition"]["label"]["embedding"], 3, 0.0)
    silent = {**params, "condition": {**condition, "label": {"embedding": table}}}
    null = empty_condition((label(3),), cond)
    np.testing.assert_allclose(apply(silent, X, T, null), expected, atol=1e-5)


def test_context_behind_the_mask_has_no_effect():
    _, params, apply, cond = model("text")
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool)
    other = np.where(mask[..., None], cond["context"], np.float32(7.0))
    y = apply(params, X, T, {**cond, "context_mask": mask})
    np.testing.assert_allclose(apply(params, X, T, {"context": other, "context_mask": mask}), y, atol=1e-5)
    assert np.abs(apply(params, X, T, {"context": other}) - y).max() > 1e-3


def test_every_parameter_matters_and_remat_changes_neither_values_nor_gradients():
    cond, params = CONTEXT, drawn(param_shapes(unet(**TRANSFORMER), X.shape, CONTEXT))

    def value_and_grad(remat):
        network = unet(**TRANSFORMER, remat=remat)
        return compiled(jax.value_and_grad(lambda p: jnp.square(network.apply(p, X, T, cond)[0]).sum()))(params)

    (expected, gradients), (value, recomputed) = value_and_grad("none"), value_and_grad("full")
    gradients, recomputed = by_path(gradients), by_path(recomputed)
    # The softmax does not see a shift of all keys, so their biases alone have no gradient.
    dead = [name for name, g in gradients.items() if not name.endswith("/k/bias") and np.abs(g).max() < 1e-4]
    assert not dead
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, g in gradients.items():
        np.testing.assert_allclose(recomputed[name], g, atol=1e-3 * np.abs(g).max() + 1e-4)


def test_bfloat16_is_close_and_keeps_float32_outside():
    _, params, apply, cond = model("text")
    network = unet(**TEXT, dtype="bfloat16")
    y, _ = compiled(network.apply)(params, X, T, cond)
    expected = apply(params, X, T, cond)
    assert y.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(param_shapes(network, X.shape, cond))} == {jnp.dtype("float32")}
    error = np.sqrt(np.square(y - expected).mean()) / expected.std()
    assert 0 < error < 0.05


def test_dropout_acts_in_training_only_and_asks_for_a_key():
    network, params = unet(**SHALLOW, dropout=0.5), drawn(param_shapes(unet(**SHALLOW), X.shape))
    train = compiled(lambda key: network.apply(params, X, T, None, True, key)[0])
    first = train(jax.random.key(0))
    np.testing.assert_array_equal(first, train(jax.random.key(0)))
    assert np.abs(first - train(jax.random.key(1))).max() > 1e-2
    calm = compiled(lambda key: network.apply(params, X, T, None, key=key)[0])(jax.random.key(0))
    np.testing.assert_allclose(calm, compiled(unet(**SHALLOW).apply)(params, X, T)[0], atol=1e-5)
    with pytest.raises(InvalidInput, match="needs a key"):
        jax.eval_shape(lambda: network.apply(params, X, T, None, True))


def test_learned_variance_is_reported_beside_the_output():
    network = unet(**SHALLOW, learn_sigma=True)
    y, extras = compiled(network.apply)(drawn(param_shapes(network, X.shape)), X, T)
    assert y.shape == extras["log_variance"].shape == X.shape
    assert np.abs(y - extras["log_variance"]).max() > 1e-3


def test_published_numbers_of_parameters():
    """DDPM on CIFAR-10 has 35.7 M (Ho et al. 2020, appendix B), exactly 35,746,307 in the released checkpoint; Stable
    Diffusion 1.5's U-Net 859,520,964."""
    assert count_params(param_shapes(unet("ddpm_cifar10"), (1, 32, 32, 3))) == 35_746_307
    stable = param_shapes(unet("sd15"), (1, 64, 64, 4), {"context": shape(1, 77, 768)})
    assert count_params(stable) == 859_520_964
    label = {"label": shape(1, dtype=jnp.int32)}
    adm = param_shapes(unet("adm_imagenet64"), (1, 64, 64, 3), label)
    assert 0.9 < count_params(adm) / 295.9e6 < 1  # its resampling residual blocks are plain convolutions here


DISTILLED = {
    **TINY,
    "transformer": True,
    "conditions": (context("none", 6),),
    "num_residual": (2, 1),
    "attention": ((0, 2), 1),
    "up_attention": ((1, 0, 3), 0),
    "mid_attention": 0,
}


def test_each_residual_block_has_its_own_depth_of_attention():
    """Distilled networks leave blocks out; which are left is read off the parameters."""
    shapes = param_shapes(unet(**DISTILLED), (1, 4, 4, 3), {"context": jnp.zeros((1, 2, 6))})
    depth = {
        name.removesuffix("_attention"): entry["blocks"]["block"]["attention"]["norm"]["scale"].shape[0]
        for name, entry in shapes.items()
        if name.endswith("_attention")
    }
    assert depth == {"down_0_1": 2, "down_1_0": 1, "up_0_0": 1, "up_0_2": 3}
    blocks = {name for name in shapes if name.startswith(("down_", "up_")) and "residual" in shapes[name]}
    assert blocks == {"down_0_0", "down_0_1", "down_1_0", "up_1_0", "up_1_1", "up_0_0", "up_0_1", "up_0_2"}


@pytest.mark.parametrize("remat", ["dots", "dots_no_batch"])
def test_parameters_are_laid_out_alike_whatever_the_remat_policy(remat):
    plain = param_shapes(unet(**TEXT), X.shape, CONTEXT)
    other = param_shapes(unet(**{**TEXT, "remat": remat}), X.shape, CONTEXT)
    assert by_path(plain).keys() == by_path(other).keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "sd1.5"}, "did you mean 'sd15'"),
        ({"chanels": 8}, "did you mean 'channels'"),
        ({"channels": 0}, "channels is 0"),
        ({"multipliers": ()}, "multipliers is"),
        ({"attention": (0, 1, 1)}, "each of the 2 levels"),
        ({"heads": 3}, "must divide the 64 features"),
        ({"head_dim": 48}, "head_dim is 48"),
        ({"modulation": "scale-shift"}, "did you mean 'scale_shift'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"remat": "all"}, "remat is 'all'"),
        ({"dtype": "bf16"}, "did you mean 'bfloat16'"),
        ({"conditions": (reference(),)}, "unet takes vector, context, channels"),
        ({"heads": (4, 4, 4)}, "each of the 2 levels"),
        ({"mid_residual": 0}, "mid_attention is 1"),
        ({"num_residual": (1, 2, 3)}, "one for each of the 2 levels is needed"),
        ({"num_residual": (1, 0)}, r"num_residual is \(1, 0\)"),
        ({"attention": (0, (1, 1))}, "level 1 has 1 residual blocks"),
        ({"attention": (0, (1,)), "up_attention": ()}, "level 1 has 2 residual blocks"),
        ({"up_attention": (0, 1, 2)}, r"up_attention is \(0, 1, 2\)"),
        ({"linear_projection": True}, "transformer=True"),
    ],
)
def test_wrong_fields_are_told_at_construction(fields, message):
    with pytest.raises(InvalidInput, match=message):
        unet(**fields)


@pytest.mark.parametrize(
    ("x", "t", "cond", "message"),
    [
        (shape(2, 7, 8, 3), shape(2, 7, 8), None, "divisible by 2: pad it to 8 x 8"),
        (shape(2, 8, 3), T, None, r"\[B, H, W, C\]"),
        (X, shape(3), None, "t.shape"),
        (X, shape(*X.shape), None, r"\[B, H\] or \[B, H, W\]"),
        (X, T, LABEL, "'label'"),
    ],
)
def test_wrong_inputs_are_told(x, t, cond, message):
    with pytest.raises(InvalidInput, match=message):
        jax.eval_shape(unet(**TINY).init, jax.random.key(0), x, t, cond)


@pytest.mark.parametrize("size", [(5, 7), (1, 2), (6, 4)])
def test_any_height_and_width_will_do_where_times_are_of_samples(size):
    network = unet(**{**TINY, "multipliers": (1, 2, 2), "attention": (0, 0, 0)})
    x = shape(2, *size, 3)
    params = jax.eval_shape(network.init, jax.random.key(0), x, T, None)
    assert jax.eval_shape(network.apply, params, x, T, None)[0].shape == x.shape


def test_labels_weigh_as_much_as_times_from_the_start():
    # With embeddings of 0.02 the digits' U-Net hardly learned its labels: 0.39 of its samples showed their class.
    module = unet(channels=8, multipliers=(1,), num_residual=1, attention=(0,), conditions=(label(50),))
    x, cond = jnp.zeros((1, 4, 4, 1)), {"label": jnp.zeros(1, jnp.int32)}
    init = compiled(lambda key: module.init(key, x, jnp.zeros(1), cond)["condition"]["label"]["embedding"])
    assert 0.5 < init(jax.random.key(0)).std() < 2.0


def test_concat_joins_the_channels_of_x():
    joined = unet(**SHALLOW, in_channels=2, conditions=(concat(1),))
    plain = unet(**SHALLOW, out_channels=2)
    params, x = drawn(param_shapes(plain, X.shape)), np.asarray(X)
    y = compiled(joined.apply)(params, x[..., :2], T, {"concat": x[..., 2:]})[0]
    np.testing.assert_array_equal(y, compiled(plain.apply)(params, X, T)[0])
    assert y.shape == (*X.shape[:3], 2)
