"""The joint transformer: parts meet in attention alone, and times may have any shape."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import config, models
from diffusion_jax.adapters import lora
from diffusion_jax.errors import InvalidInput
from tests.models.drawn import drawn
from tests.models.shared import T, changed, compiled, drawn_params, image, labels


def vector(*values):
    return jax.device_put(np.array(values, np.float32))


PATCHES = {"text": (1,), "image": (2, 2), "clip": (1, 2, 2), "vector": ()}
X = {
    "text": image((2, 3, 5)),
    "image": image((2, 4, 6, 3)),
    "clip": image((2, 3, 2, 4, 1)),
    "vector": image((2, 4)),
}
TIMES = {"text": T, "image": T[::-1], "clip": vector(0.0, 1000.0), "vector": vector(5.0, 300.0)}
KINDS = {
    "adaln": {"registers": 2},
    "global": {"times": "global", "registers": 2},
    "tokens": {"times": "tokens", "skips": True, "positions": "sincos"},
}
PAIR = {"image": (2, 2), "text": (1,)}
TOLD = (models.pooled(), models.context())


def tiny(modalities=PATCHES, **fields):
    return models.joint_transformer(modalities, **{"width": 16, "depth": 3, "heads": 2, **fields})


@functools.cache
def case(kind):
    """(network, params, jitted apply of x and t)"""
    network = tiny(**KINDS[kind])
    params = drawn(models.param_shapes(network, jax.tree.map(jnp.shape, X, is_leaf=lambda leaf: hasattr(leaf, "ndim"))))
    return network, params, compiled(lambda x, t: network.apply(params, x, t)[0])


@functools.cache
def alone(kind):
    """The same without attention."""
    network, params, _ = case(kind)
    inside = models.intercepted(network, models.edit("attention", lambda run, data, h, *_: jnp.zeros_like(h)))
    return compiled(lambda x, t: inside.apply(params, {}, x, t)[0])


def moved(one, other):
    """The largest change of each example, by part."""
    return {name: np.abs(one[name] - other[name]).reshape(2, -1).max(1) for name in one}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_have_the_shapes_of_the_parts(kind):
    assert jax.tree.map(np.shape, case(kind)[2](X, TIMES)) == jax.tree.map(np.shape, X)


def test_outputs_begin_at_zero():
    x = {name: X[name] for name in ("image", "vector")}
    network = tiny({name: PATCHES[name] for name in x}, times="tokens", depth=1)
    output = compiled(lambda key: network.apply(network.init(key, x, T, None), x, T)[0])(jax.random.key(0))
    assert all(np.abs(leaf).max() == 0 for leaf in output.values())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_known_by_name_and_examples_do_not_see_each_other(kind):
    network, _, apply = case(kind)
    turned = dict(reversed(PATCHES.items()))
    assert models.joint_transformer(turned, width=16, depth=3, heads=2, **KINDS[kind]).module == network.module
    output = apply(X, TIMES)
    again = apply(dict(reversed(X.items())), dict(reversed(TIMES.items())))
    chex.assert_trees_all_equal(output, again)
    other = {name: changed(leaf, 1, np.asarray(leaf)[1] + 1.0) for name, leaf in X.items()}
    times = {name: changed(leaf, 1, 42.0) for name, leaf in TIMES.items()}
    for change in moved(apply(other, times), output).values():
        assert change[0] == 0 and change[1] > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_parts_meet_in_attention_alone(kind):
    _, _, apply = case(kind)
    times = {**TIMES, "text": np.full((2,), 1000.0, np.float32)}
    other = {**X, "text": X["text"] + 1.0}
    apart = moved(alone(kind)(other, times), alone(kind)(X, times))
    together = moved(apply(other, times), apply(X, times))
    for name in PATCHES:
        assert together[name].min() > 1e-4
        assert (apart[name].min() > 1e-4) if name == "text" else (apart[name].max() == 0)
    # A part's time is told to its own tokens, but for the one vector that is told to all.
    change = moved(alone(kind)(X, {**times, "text": T}), alone(kind)(X, times))
    for name in PATCHES:
        told = {"adaln": name == "text", "global": True, "tokens": False}[kind]
        assert (change[name].min() > 1e-4) if told else (change[name].max() == 0)


def test_equal_entries_of_a_vector_time_are_the_scalar_time():
    _, _, apply = case("adaln")
    wide = {
        "text": np.broadcast_to(np.asarray(TIMES["text"])[:, None], (2, 3)),
        "image": np.broadcast_to(np.asarray(TIMES["image"])[:, None, None], (2, 4, 6)),
        "clip": np.broadcast_to(np.asarray(TIMES["clip"])[:, None], (2, 3)),
        "vector": TIMES["vector"],
    }
    expected = apply(X, TIMES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), apply(X, wide), expected)
    shared = apply(X, T)
    chex.assert_trees_all_equal(shared, apply(X, dict.fromkeys(X, T)))


def test_a_tokens_time_is_its_own():
    """Frames of a clip and entries of a text, where they do not mix."""
    apply, same = alone("adaln"), np.full((2, 3), 300.0, np.float32)
    before = apply(X, {**TIMES, "text": same, "clip": same})
    after = apply(X, {**TIMES, "text": changed(same, (0, 1), 900.0), "clip": changed(same, (1, 2), 900.0)})
    text, clip = (np.abs(after[name] - before[name]).reshape(2, 3, -1).max(-1) > 1e-5 for name in ("text", "clip"))
    np.testing.assert_array_equal(text, [[False, True, False], [False] * 3])
    np.testing.assert_array_equal(clip, [[False] * 3, [False, False, True]])


def test_joined_times_are_one_vector_of_the_times_of_all_tokens():
    network = tiny((2,), times="joined", registers=1)
    params = drawn(models.param_shapes(network, (2, 6, 3)))
    apply = compiled(lambda x, t: network.apply(params, x, t)[0])
    x = image((2, 6, 3))
    equal = apply(x, np.broadcast_to(np.asarray(T)[:, None], (2, 6)))
    np.testing.assert_array_equal(equal, apply(x, T))
    # The last patch's time is told to all tokens, even where they do not meet; and in their order.
    inside = models.intercepted(network, models.edit("attention", lambda run, data, h, *_: jnp.zeros_like(h)))
    alone = compiled(lambda t: inside.apply(params, {}, x, t)[0])
    rising = np.array([100.0, 100, 300, 300, 700, 700], np.float32) * np.ones((2, 1), np.float32)
    assert (np.abs(alone(rising) - alone(changed(rising, np.s_[:, 4:], 900.0))).max(axis=-1) > 1e-4).all()
    assert (np.abs(alone(rising) - alone(rising[:, ::-1])).max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("kind", ["global", "tokens"])
def test_gradients_reach_every_parameter(kind):
    parts = {"words": 7, "image": (2, 2)}
    x = {"words": jnp.array([[0, 3, 7], [1, 2, 5]]), "image": X["image"]}
    fields = {"conditions": (models.label(3), *TOLD), "positions": "learned", "skips": True}
    network = tiny(parts, **{**KINDS[kind], **fields})
    cond = {**labels(0, 2), "pooled": image((2, 5)), "context": image((2, 4, 9))}

    @compiled
    @jax.grad
    def gradient(params):
        output, _ = network.apply(params, x, {"words": T, "image": T[::-1]}, cond)
        assert output["words"].shape == (2, 3, 7)
        return sum((leaf * image(leaf.shape, 7)).sum() for leaf in output.values())

    for path, leaf in models.by_path(gradient(drawn_params(network, x, T, cond))).items():
        # A bias of the keys moves all logits of a query alike. Of an embedding, the rows that x has are trained.
        size = np.abs(leaf).reshape(-1, leaf.shape[-1]).max(0).min()
        assert size > 1e-6 or path.endswith("/k/bias"), (path, size)


def test_long_skips_of_weight_zero_are_a_plain_stack():
    shapes = {"image": (2, 4, 4, 1), "text": (2, 3, 2)}
    x = {name: image(shape) for name, shape in shapes.items()}
    plain, skipped = tiny(PAIR), tiny(PAIR, skips=True)
    params = drawn(models.param_shapes(skipped, shapes))
    assert params["blocks"]["block"]["mlp"]["modulation"]["dense"]["bias"].shape[0] == 2
    assert params["skip_blocks"]["block"]["skip"]["linear"]["kernel"].shape == (1, 32, 16)
    params, apply = jax.device_get(params), compiled(skipped.apply)
    connected = apply(params, x, T)[0]
    zero = {
        **params["skip_blocks"]["block"],
        "skip": jax.tree.map(np.zeros_like, params["skip_blocks"]["block"]["skip"]),
    }
    without = apply({**params, "skip_blocks": {"block": zero}}, x, T)[0]
    later = {name: leaf for name, leaf in zero.items() if name != "skip"}
    blocks = jax.tree.map(lambda *halves: np.concatenate(halves), params["blocks"], {"block": later})
    rest = {name: leaf for name, leaf in params.items() if name != "skip_blocks"}
    expected = compiled(plain.apply)({**rest, "blocks": blocks}, x, T)[0]
    for name in x:
        np.testing.assert_allclose(without[name], expected[name], atol=2e-5)
        assert np.abs(connected[name] - without[name]).max() > 1e-2


def test_scan_remat_and_dtype_are_not_part_of_the_function():
    _, params, apply = case("tokens")
    output = apply(X, TIMES)
    unrolled = tiny(**KINDS["tokens"], remat="full", scan=False)
    low = tiny(**KINDS["tokens"], dtype="bfloat16")
    for network, error in ((unrolled, 1e-5), (low, 0.03)):
        found, _ = compiled(network.apply)(params, X, TIMES)
        for name, leaf in found.items():
            assert leaf.dtype == np.float32
            assert np.linalg.norm(leaf - output[name]) <= error * np.linalg.norm(output[name])


def test_one_array_is_one_part_with_times_of_its_own():
    """Actions under a streaming policy: a level for each, what is observed as a condition."""
    x, cond = image((2, 6, 3)), {"pooled": image((2, 4)), "context": image((2, 5, 7))}
    fields = {"depth": 2, "conditions": TOLD, "positions": "sincos"}
    bare, named = tiny((1,), **fields), tiny({"data": (1,)}, **fields)
    levels = np.broadcast_to(np.arange(6, dtype=np.float32) * 100, (2, 6))
    params = drawn(models.param_shapes(bare, x.shape, cond))
    output, extras = compiled(bare.apply)(params, x, levels, cond)
    assert output.shape == x.shape and extras == {}
    other = compiled(named.apply)(params, {"data": x}, {"data": levels}, cond)[0]["data"]
    np.testing.assert_array_equal(output, other)
    # Fixed positions take other horizons.
    assert jax.eval_shape(bare.apply, params, x[:, :4], levels[:, :4], cond)[0].shape == (2, 4, 3)


def test_it_is_opened_by_interception_like_all_networks():
    network, params, apply = case("tokens")
    adapted = lora(network, 2)
    tapped = models.intercepted(adapted.network, models.taps("attention"), models.gates("skip"))
    factors = drawn(jax.eval_shape(adapted.init, jax.random.key(2), params, X, TIMES, None))
    gates = jax.eval_shape(tapped.init, jax.random.key(1), {"params": params, "lora": factors}, X, TIMES)
    gates = jax.tree.map(lambda leaf: np.ones(leaf.shape), gates)
    run = compiled(lambda factors: tapped.apply({"params": params, "lora": factors}, gates, X, TIMES)[:2])
    output, extras = run(jax.tree.map(np.zeros_like, jax.device_get(factors)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), output, apply(X, TIMES))
    told = extras["taps"]
    # 3 words, 6 patches, 6 patches of the clip, 1 vector, and a time for each part.
    assert told["blocks"]["block"]["attention"]["output"].shape == (2, 2, 3 + 6 + 6 + 1 + 4, 16)
    assert told["skip_blocks"]["block"]["attention"]["output"].shape[0] == 1
    low = run(factors)[0]
    merged, _ = compiled(network.apply)(adapted.merge(params, factors), X, TIMES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), low, merged)
    assert max(change.max() for change in moved(low, output).values()) > 1e-3


def test_published_sizes():
    """UniDiffuser has about a billion parameters, of which the text encoders and autoencoders are no part."""
    network = models.joint_transformer({"image": (2, 2), "clip": (), "text": (1,)}, "unidiffuser")
    shapes = models.param_shapes(network, {"image": (1, 64, 64, 4), "clip": (1, 512), "text": (1, 77, 64)})
    assert models.count_params(shapes) == pytest.approx(0.95e9, rel=0.01)
    policy = models.joint_transformer({"action": (1,), "future": (2, 4, 4)}, "uwm", conditions=(models.pooled(),))
    cond = {"pooled": jax.ShapeDtypeStruct((1, 512), jnp.float32)}
    shapes = models.param_shapes(policy, {"action": (1, 16, 7), "future": (1, 2, 28, 28, 4)}, cond)
    assert shapes["registers"].shape == (8, 768)
    assert models.count_params(shapes) == pytest.approx(130e6, rel=0.05)


def test_a_config_describes_it():
    entry = config.call(
        "models.joint_transformer", modalities={"image": (2, 2), "text": (1,)}, width=16, depth=3, heads=2
    )
    assert config.build(entry).module == tiny(PAIR).module
    assert config.build(config.call("models.joint_transformer", modalities=[1], preset="S")).module.modalities == (
        ("", (1,)),
    )


def test_mistakes_are_told_in_one_sentence():
    network, params, _ = case("global")
    single = tiny((1,))
    wrong = [
        (lambda: tiny(preset="uvit"), "preset is 'uvit'"),
        (lambda: tiny(timse="adaln"), "did you mean 'times'"),
        (lambda: tiny(times="adalm"), "did you mean 'adaln'"),
        (lambda: tiny(positions="learnt"), "did you mean 'learned'"),
        (lambda: tiny(registers=-1), "registers is -1"),
        (lambda: tiny(depth=1, skips=True), "at least 2 blocks"),
        (lambda: tiny(times="tokens", swiglu=True), "swiglu is True"),
        (lambda: tiny({}), "at least one modality"),
        (lambda: tiny({"image": (2, 0)}), r"modalities\['image'\] is \(2, 0\)"),
        (lambda: tiny({"words": 1}), "a vocabulary"),
        (lambda: network.apply(params, X, {**TIMES, "text": jnp.zeros((2, 3))}), "times='global' takes one time"),
        (lambda: network.apply(params, X["text"], T), "needs a dict"),
        (lambda: network.apply(params, {"text": X["text"]}, T), r"x has the parts \['text'\]"),
        (lambda: network.apply(params, X, {"text": T}), r"t has the parts \['text'\]"),
        (lambda: network.apply(params, {**X, "image": X["image"][:, :3]}, T), "divide by the patch"),
        (lambda: network.apply(params, {**X, "image": X["text"]}, T), r"x\['image'\].shape"),
        (lambda: network.apply(params, {**X, "text": X["text"][:, :2]}, T), "learned for 3 tokens"),
        (lambda: single.apply({}, X, T), "is one array"),
        (lambda: tiny({"words": 5}).apply({}, {"words": jnp.zeros((2, 3))}, T), "integer tokens"),
        (lambda: tiny(PATCHES).apply(case("adaln")[1], X, {**TIMES, "vector": jnp.zeros((2, 4))}), r"takes \[B\]"),
    ]
    for call, message in wrong:
        with pytest.raises(InvalidInput, match=message):
            jax.eval_shape(call)
