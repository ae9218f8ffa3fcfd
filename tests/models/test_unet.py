"""Laws of the U-Net: what it computes at initialisation, how times, conditions and ControlNets enter, its sizes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.adapters import lora
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import (
    by_path,
    cached,
    count_params,
    empty_condition,
    gates,
    intercepted,
    param_shapes,
    taps,
)
from diffusion_jax.models.layers import Branch
from diffusion_jax.models.unet import unet
from tests.models.drawn import drawn

TINY = {"channels": 8, "multipliers": (1, 2), "num_residual": 1, "attention": (0, 1), "heads": 2, "groups": 4}
TRANSFORMER = {**TINY, "transformer": True, "attention": (0, 2), "modulation": "shift", "context": True}
X = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
T = jnp.array([250.0, 700.0])
LABEL = {"label": jnp.array([0, 2])}
CONTEXT = {"context": jax.random.normal(jax.random.key(2), (2, 5, 6))}
CASES = {"classes": ({**TINY, "num_classes": 3}, LABEL), "text": (TRANSFORMER, CONTEXT)}


@cache
def model(case):
    fields, cond = CASES[case]
    network = unet(**fields)
    params = drawn(param_shapes(network, X.shape, cond))
    return network, params, jax.jit(lambda *args: network.apply(*args)[0]), cond


def test_output_is_zero_at_initialisation():
    network = unet(**{**TINY, "multipliers": (1,), "attention": (0,), "mid_attention": 0})
    y, _ = jax.jit(network.apply)(network.init(jax.random.key(0), X, T), X, T)
    np.testing.assert_array_equal(y, jnp.zeros_like(X))


@pytest.mark.parametrize(("case", "shape"), [("classes", (2, 8)), ("classes", (2, 8, 12)), ("text", (2, 8, 12))])
def test_equal_times_per_pixel_or_row_are_one_time_per_sample(case, shape):
    _, params, apply, cond = model(case)
    field = jnp.broadcast_to(T.reshape(-1, *(1,) * (len(shape) - 1)), shape)
    np.testing.assert_allclose(apply(params, X, field, cond), apply(params, X, T, cond), atol=2e-5)


def transposed(params):
    return jax.tree.map(lambda p: p.swapaxes(0, 1) if p.ndim == 4 else p, params)


@pytest.mark.parametrize("case", CASES)
def test_transposing_image_times_and_kernels_transposes_the_output(case):
    _, params, apply, cond = model(case)
    t = 1000 * jax.random.uniform(jax.random.key(4), X.shape[:3])
    y = apply(params, X, t, cond)
    flipped = apply(transposed(params), X.swapaxes(1, 2), t.swapaxes(1, 2), cond)
    np.testing.assert_allclose(flipped.swapaxes(1, 2), y, atol=2e-5)
    assert float(jnp.abs(y - apply(params, X, t.mean((1, 2)), cond)).max()) > 1e-2


def test_a_sample_does_not_see_its_neighbours():
    _, params, apply, cond = model("text")
    both = apply(params, X, T, cond)
    for i in range(2):
        one = apply(params, X[i : i + 1], T[i : i + 1], jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], cond))
        np.testing.assert_allclose(one[0], both[i], atol=2e-5)


def test_time_and_label_enter_through_the_modulations_alone():
    _, params, apply, cond = model("classes")
    mute = jax.tree_util.tree_map_with_path(
        lambda path, p: 0 * p if "modulation" in jax.tree_util.keystr(path) else p, params
    )
    others = {"label": jnp.array([1, 1])}
    np.testing.assert_array_equal(apply(mute, X, T, cond), apply(mute, X, 0.5 * T, others))
    assert float(jnp.abs(apply(params, X, T, cond) - apply(params, X, 0.5 * T, cond)).max()) > 1e-2
    assert float(jnp.abs(apply(params, X, T, cond) - apply(params, X, T, others)).max()) > 1e-2


def test_null_label_that_embeds_to_nothing_is_the_unconditional_network():
    _, params, apply, cond = model("classes")
    plain = unet(**TINY)
    condition = {name: leaf for name, leaf in params["condition"].items() if name != "label"}
    expected, _ = jax.jit(plain.apply)({**params, "condition": condition}, X, T)
    table = params["condition"]["label"]["embedding"].at[3].set(0.0)
    silent = {**params, "condition": {**condition, "label": {"embedding": table}}}
    null = empty_condition(cond, num_classes=3)
    np.testing.assert_allclose(apply(silent, X, T, null), expected, atol=1e-5)


def test_context_behind_the_mask_has_no_effect():
    _, params, apply, cond = model("text")
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool)
    changed = jnp.where(mask[..., None], cond["context"], 7.0)
    y = apply(params, X, T, {**cond, "context_mask": mask})
    np.testing.assert_allclose(apply(params, X, T, {"context": changed, "context_mask": mask}), y, atol=1e-5)
    assert float(jnp.abs(apply(params, X, T, {"context": changed}) - y).max()) > 1e-3


def test_every_parameter_matters_and_remat_changes_neither_values_nor_gradients():
    fields = {**TRANSFORMER, "mid_attention": 0}
    cond, params = CONTEXT, drawn(param_shapes(unet(**fields), X.shape, CONTEXT))

    def value_and_grad(remat):
        network = unet(**fields, remat=remat)
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(network.apply(p, X, T, cond)[0]).sum()))(params)

    (expected, gradients), (value, recomputed) = value_and_grad("none"), value_and_grad("full")
    gradients, recomputed = by_path(gradients), by_path(recomputed)
    # The softmax does not see a shift of all keys, so their biases alone have no gradient.
    dead = [name for name, g in gradients.items() if not name.endswith("/k/bias") and float(jnp.abs(g).max()) < 1e-4]
    assert not dead
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, g in gradients.items():
        np.testing.assert_allclose(recomputed[name], g, atol=1e-3 * float(jnp.abs(g).max()) + 1e-4)


def test_bfloat16_is_close_and_keeps_float32_outside():
    _, params, apply, cond = model("classes")
    network = unet(**CASES["classes"][0], dtype="bfloat16")
    y, _ = jax.jit(network.apply)(params, X, T, cond)
    expected = apply(params, X, T, cond)
    assert y.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(param_shapes(network, X.shape, cond))} == {jnp.dtype("float32")}
    error = float(jnp.sqrt(jnp.square(y - expected).mean()) / expected.std())
    assert 0 < error < 0.05


def test_dropout_acts_in_training_only_and_asks_for_a_key():
    _, params, apply, cond = model("classes")
    network = unet(**CASES["classes"][0], dropout=0.5)
    train = jax.jit(lambda key: network.apply(params, X, T, cond, True, key)[0])
    first = train(jax.random.key(0))
    np.testing.assert_array_equal(first, train(jax.random.key(0)))
    assert float(jnp.abs(first - train(jax.random.key(1))).max()) > 1e-2
    calm, _ = jax.jit(network.apply)(params, X, T, cond, key=jax.random.key(0))
    np.testing.assert_allclose(calm, apply(params, X, T, cond), atol=1e-5)
    with pytest.raises(InvalidInput, match="needs a key"):
        network.apply(params, X, T, cond, True)


def test_learned_variance_is_reported_beside_the_output():
    network = unet(**TINY, learn_sigma=True)
    params = drawn(param_shapes(network, X.shape))
    y, extras = jax.jit(network.apply)(params, X, T)
    assert y.shape == extras["log_variance"].shape == X.shape
    assert float(jnp.abs(y - extras["log_variance"]).max()) > 1e-3


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_published_numbers_of_parameters():
    """DDPM on CIFAR-10 has 35.7 M (Ho et al. 2020, appendix B), exactly 35,746,307 in the released checkpoint; Stable
    Diffusion 1.5's U-Net 859,520,964."""
    assert count_params(param_shapes(unet("ddpm_cifar10"), (1, 32, 32, 3))) == 35_746_307
    stable = param_shapes(unet("sd15"), (1, 64, 64, 4), {"context": shape(1, 77, 768)})
    assert count_params(stable) == 859_520_964
    label = {"label": shape(1, dtype=jnp.int32)}
    adm = param_shapes(unet("adm_imagenet64"), (1, 64, 64, 3), label)
    assert 0.9 < count_params(adm) / 295.9e6 < 1  # its resampling residual blocks are plain convolutions here


@pytest.mark.parametrize("remat", ["dots", "dots_no_batch"])
def test_parameters_are_laid_out_alike_whatever_the_remat_policy(remat):
    plain = param_shapes(unet(**TRANSFORMER), X.shape, CONTEXT)
    other = param_shapes(unet(**{**TRANSFORMER, "remat": remat}), X.shape, CONTEXT)
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
        ({"raw_context": True}, "context=True"),
        ({"time_ids": True}, "pooled=True"),
        ({"heads": (4, 4, 4)}, "each of the 2 levels"),
        ({"mid_residual": 0}, "mid_attention is 1"),
        ({"linear_projection": True}, "transformer=True"),
    ],
)
def test_wrong_fields_are_told_at_construction(fields, message):
    with pytest.raises(InvalidInput, match=message):
        unet(**fields)


@pytest.mark.parametrize(
    ("x", "t", "cond", "message"),
    [
        (jnp.zeros((2, 7, 8, 3)), T, None, "divisible by 2: pad it to 8 x 8"),
        (jnp.zeros((2, 8, 3)), T, None, r"\[B, H, W, C\]"),
        (X, jnp.zeros((3,)), None, "t.shape"),
        (X, jnp.zeros(X.shape), None, r"\[B, H\] or \[B, H, W\]"),
        (X, T, LABEL, "'label'"),
    ],
)
def test_wrong_inputs_are_told(x, t, cond, message):
    with pytest.raises(InvalidInput, match=message):
        jax.eval_shape(unet(**TINY).init, jax.random.key(0), x, t, cond)


BRANCHES = ("residual", "attention", "cross_attention", "mlp")


def is_branch(module):
    return isinstance(module, Branch)


def test_taps_read_every_branch_and_every_attention_map():
    network, params, apply, cond = model("text")
    opened = intercepted(network, taps(is_branch))
    y, extras, _ = jax.jit(opened.apply)(params, opened.init(jax.random.key(0), params, X, T, cond), X, T, cond)
    np.testing.assert_allclose(y, apply(params, X, T, cond), atol=1e-5)
    tapped = by_path(extras["taps"])
    assert {name.split("/")[-2] for name in tapped} == set(BRANCHES)
    assert tapped["down_1_0_attention/blocks/block/cross_attention/output"].shape == (2, 2, 4, 6, 16)


def test_cache_returns_the_network_when_refreshed_and_the_last_branches_when_not():
    network, params, apply, cond = model("text")
    opened = intercepted(network, cached(is_branch))
    run = jax.jit(lambda collections, x: opened.apply(params, collections, x, T, cond))
    collections = opened.init(jax.random.key(0), params, X, T, cond)
    y, _, filled = run(collections, X)
    np.testing.assert_allclose(y, apply(params, X, T, cond), atol=1e-5)
    stale = {**filled, "policy": jax.tree.map(jnp.zeros_like, filled["policy"])}
    # Nothing is refreshed: the same input gives the same output again, another one goes through the shortcuts only.
    again, _, kept = run(stale, X)
    np.testing.assert_allclose(again, y, atol=1e-5)
    other, _, _ = run(stale, 2 * X)
    assert float(jnp.abs(other - apply(params, 2 * X, T, cond)).max()) > 1e-2
    jax.tree.map(np.testing.assert_array_equal, kept["cache"], filled["cache"])
    assert " conditional(" in run.lower(stale, X).compile().as_text()


def test_closed_gates_leave_the_shortcuts():
    network, params, apply, cond = model("classes")
    opened = intercepted(network, gates("residual"))
    collections = opened.init(jax.random.key(0), params, X, T, cond)
    run = jax.jit(lambda gate: opened.apply(params, jax.tree.map(lambda g: gate * g, collections), X, T, cond)[0])
    np.testing.assert_allclose(run(1.0), apply(params, X, T, cond), atol=1e-5)
    silenced = jax.tree_util.tree_map_with_path(
        lambda path, p: 0 * p if "'residual'" in (key := jax.tree_util.keystr(path)) and "conv_out" in key else p,
        params,
    )
    np.testing.assert_allclose(run(0.0), apply(silenced, X, T, cond), atol=1e-5)


def test_lora_starts_as_nothing_and_merges_into_the_weights():
    network, params, apply, cond = model("text")
    adapted = lora(network, rank=2, select=("q", "v"))
    factors = drawn(jax.eval_shape(adapted.init, jax.random.key(0), params, X, T, cond))
    run = jax.jit(lambda factors: adapted.network.apply({"params": params, "lora": factors}, X, T, cond)[0])
    y = apply(params, X, T, cond)
    np.testing.assert_allclose(run(jax.tree.map(jnp.zeros_like, factors)), y, atol=1e-5)
    moved = run(factors)
    assert float(jnp.abs(moved - y).max()) > 1e-2
    np.testing.assert_allclose(moved, apply(adapted.merge(params, factors), X, T, cond), atol=1e-4)


def test_labels_weigh_as_much_as_times_from_the_start():
    # With embeddings of 0.02 the digits' U-Net hardly learned its labels: 0.39 of its samples showed their class.
    module = unet(channels=8, multipliers=(1,), num_residual=1, attention=(0,), num_classes=50)
    x, cond = jnp.zeros((1, 4, 4, 1)), {"label": jnp.zeros(1, jnp.int32)}
    condition = module.init(jax.random.key(0), x, jnp.zeros(1), cond)["condition"]
    assert 0.5 < float(condition["label"]["embedding"].std()) < 2.0


def test_concat_joins_the_channels_of_x():
    fields = {**TINY, "multipliers": (1,), "attention": (0,), "mid_attention": 0}
    joined = unet(**fields, in_channels=2, concat=1)
    plain = unet(**fields, out_channels=2)
    params = drawn(param_shapes(plain, X.shape))
    y = jax.jit(joined.apply)(params, X[..., :2], T, {"concat": X[..., 2:]})[0]
    np.testing.assert_array_equal(y, jax.jit(plain.apply)(params, X, T)[0])
    assert y.shape == (*X.shape[:3], 2)
