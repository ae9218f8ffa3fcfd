"""Gates: everything on is the network itself, gated is sliced, gathered is masked, the ledger counts what ran, and
routers learn through gates that are 0 or 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import adapters, models
from diffusion_jax.errors import InvalidInput
from tests.models.shared import T, changed, compiled, dit_case, drawn_params, image, labels, scramble

GROUPS = 4


@functools.cache
def routed_case(tokens=True):
    """`(timed, parameters as they begin)` of the tiny DiT."""
    network, params, x, t, cond, _ = dit_case()
    timed = adapters.routed(network, GROUPS, tokens=tokens)
    made = jax.jit(timed.init)(jax.random.key(1), params, x, t, cond)
    return timed, {"params": params, **jax.device_get(made)}


def random_gates(like, seed):
    """Gates `[L, 1, K]` of which about half are off; the first is always on."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        on = rng.random((leaf.shape[0], 1, leaf.shape[2])) > 0.5
        on[..., 0] = True
        return on.astype(np.float32)

    return jax.tree.map(one, like)


def chosen_tokens(entry):
    """A token router that leaves out some tokens, not all."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full_like(leaf, 0.3) if path[-1].key == "b2" else leaf, scramble(entry, 6, 0.5)
    )


def test_with_the_published_biases_it_begins_as_the_network_bit_for_bit():
    _, _, x, t, cond, output = dit_case()
    timed, tree = routed_case()
    out, extras = jax.jit(timed.network.apply)(tree, x, t, cond)
    np.testing.assert_array_equal(out, output)
    np.testing.assert_array_equal(models.executed_ratio(extras["ledger"]), jnp.ones(2))


def test_sliced_weights_are_masked_weights():
    network, params, x, t, cond, output = dit_case()
    timed, tree = routed_case(tokens=False)
    like = jax.jit(timed.fill)(tree, t)["gates"]
    first, second, third = (random_gates(like, seed) for seed in range(3))
    union = jax.tree.map(lambda a, b: (a + b)[:, 0] > 0, first, second)
    cut = models.sliced(network, [union, jax.tree.map(lambda a: a[:, 0] > 0, third)])
    slices = cut.cut(params)
    # Weights are really smaller: a quarter of the hidden units for each group that is on.
    kept = third["blocks"]["block"]["mlp"]["feed_forward"]["up"]["gate"][:, 0].sum(axis=1)
    widths = [block["mlp"]["feed_forward"]["up"]["kernel"].shape[1] for block in slices[1]]
    assert widths == [int(16 * count) for count in kept]
    masked, smaller = jax.jit(timed.opened.apply), jax.jit(cut.network.apply)
    for bucket, gates in ((0, first), (0, second), (1, third)):
        expected = np.asarray(masked({"params": params, "gates": gates}, x, t, cond)[0])
        given = {"params": params, "slices": slices, "bucket": jnp.int32(bucket), "gates": gates}
        np.testing.assert_allclose(smaller(given, x, t, cond)[0], expected, atol=1e-5)
        assert np.abs(expected - output).max() > 1e-2


def test_gathered_tokens_are_masked_tokens_where_there_is_room_for_all():
    network, _, x, t, cond, _ = dit_case()
    timed, tree = routed_case()
    tree = {**tree, "token_router": chosen_tokens(tree["token_router"])}
    masked, extras = compiled(timed.network.apply)(tree, x, t, cond)
    kept = models.by_path(extras["ledger"])["blocks/block/mlp/kept"]
    assert kept.min() < 1
    roomy = adapters.routed(network, GROUPS, tokens=True, capacity=float(kept.max()))
    np.testing.assert_allclose(jax.jit(roomy.network.apply)(tree, x, t, cond)[0], masked, atol=1e-5)
    narrow = adapters.routed(network, GROUPS, tokens=True, capacity=1 / 6)
    out, extras = compiled(narrow.network.apply)(tree, x, t, cond)
    assert np.abs(out - masked).max() > 1e-3
    # One of six tokens runs through feed-forward layers, whatever was chosen.
    attention, feed_forward = 4 * 6 * 16**2 + 2 * 6**2 * 16, 8 * 6 * 16**2
    expected = (attention + feed_forward / 6) / (attention + feed_forward)
    np.testing.assert_allclose(models.executed_ratio(extras["ledger"]), expected, rtol=1e-5)


def test_the_ledger_counts_by_hand():
    _, params, x, t, cond, _ = dit_case()
    timed, tree = routed_case(tokens=False)
    gates = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), jax.eval_shape(timed.fill, tree, t)["gates"])
    half = jax.tree_util.tree_map_with_path(
        lambda path, leaf: changed(leaf, np.s_[:, :, 1:], 0) if "attention" in jax.tree_util.keystr(path) else leaf,
        gates,
    )
    _, extras = jax.jit(timed.opened.apply)({"params": params, "gates": half}, x, t, cond)
    # 6 tokens, 16 channels: one of two heads is on, which halves attention and leaves feed-forward layers alone.
    attention, feed_forward = 4 * 6 * 16**2 + 2 * 6**2 * 16, 8 * 6 * 16**2
    expected = (attention / 2 + feed_forward) / (attention + feed_forward)
    np.testing.assert_allclose(models.executed_ratio(extras["ledger"]), expected, rtol=1e-6)


def test_masks_are_of_the_time_alone():
    _, _, x, _, cond, _ = dit_case()
    timed, tree = routed_case()
    tree = {**tree, "routers": scramble(jax.tree.map(np.zeros_like, tree["routers"]), 2, 1.0)}
    fill = jax.jit(timed.fill)
    same, other = (jax.device_get(fill(tree, np.float32(t)))["gates"] for t in ([300.0, 300.0], T))
    for leaf in jax.tree.leaves(same):
        np.testing.assert_array_equal(leaf[:, 0], leaf[:, 1])
    assert any(np.any(leaf[:, 0] != leaf[:, 1]) for leaf in jax.tree.leaves(other))
    assert all(np.all(leaf[..., 0] == 1) for leaf in jax.tree.leaves(other))
    ratios = [jax.jit(timed.network.apply)(tree, x, T, given)[1]["ledger"] for given in (cond, labels(1, 1))]
    np.testing.assert_array_equal(*map(models.executed_ratio, ratios))


def test_routers_learn_and_evaluation_does_not_draw():
    _, _, x, t, cond, _ = dit_case()
    timed, tree = routed_case()
    zeros = jax.tree.map(np.zeros_like, tree["routers"])
    tree = {**tree, "routers": scramble(zeros, 2, 0.1), "token_router": chosen_tokens(tree["token_router"])}

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(tree, key, train):
        def loss(tree):
            out, extras = timed.network.apply(tree, x, t, cond, train, key)
            return jnp.mean(out**2) + models.executed_ratio(extras["ledger"]).mean(), out

        return jax.grad(loss, has_aux=True)(tree)

    keys = jax.random.split(jax.random.key(4), 3)
    grads, drawn = gradient(tree, keys[0], True)
    for entry in ("routers", "token_router"):
        assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads[entry]))
    assert np.abs(drawn - gradient(tree, keys[1], True)[1]).max() > 1e-3
    np.testing.assert_array_equal(gradient(tree, keys[0], False)[1], gradient(tree, keys[1], False)[1])


def test_straight_through_gates_are_exact_and_have_the_gradient_of_a_sigmoid():
    logits = jnp.array([-3.0, -0.1, 0.1, 3.0])
    np.testing.assert_array_equal(models.gumbel_sigmoid_st(None, logits, 5.0), [0, 0, 1, 1])
    slope = jax.grad(lambda u: models.gumbel_sigmoid_st(None, u, 5.0).sum())(logits)
    soft = jax.nn.sigmoid(logits / 5)
    np.testing.assert_allclose(slope, soft * (1 - soft) / 5, rtol=1e-5)
    often = models.gumbel_sigmoid_st(jax.random.key(0), jnp.full((4000,), 1.0), 5.0)
    assert set(np.unique(often)) == {0.0, 1.0}
    # P[1 + logistic > 0] = sigmoid(1).
    np.testing.assert_allclose(often.mean(), jax.nn.sigmoid(1.0), atol=0.03)


CASES = {
    "video": (
        lambda: models.video_dit(width=16, depth=4, heads=2, conditions=(models.label(3),)),
        (2, 3, 4, 4, 1),
        None,
    ),
    "joint": (
        lambda: models.joint_transformer({"image": (2, 2), "text": (1,)}, width=16, depth=2, heads=2),
        {"image": (2, 4, 4, 1), "text": (2, 3, 4)},
        "image",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_clips_and_joint_data_are_routed_by_the_same_edits(name):
    make, shape, clock = CASES[name]
    network, key = make(), jax.random.key(0)
    x = jax.tree.map(image, shape, is_leaf=lambda s: isinstance(s, tuple))
    t, cond = (T, labels(0, 2)) if clock is None else ({"image": T, "text": T[::-1]}, None)
    params = drawn_params(network, x, t, cond)
    read = {} if clock is None else {"clock": lambda t: t[clock]}
    timed = adapters.routed(network, GROUPS, tokens=True, **read)
    tree = {"params": params, **jax.jit(timed.init)(key, params, x, t, cond)}
    out, extras = jax.jit(timed.network.apply)(tree, x, t, cond)
    expected = jax.jit(network.apply)(params, x, t, cond)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), out, expected)
    np.testing.assert_array_equal(models.executed_ratio(extras["ledger"]), jnp.ones(2))
    if clock is None:
        plain = adapters.routed(network, GROUPS)
        gates = random_gates(jax.jit(plain.fill)(tree, t)["gates"], 0)
        masked = jax.jit(plain.opened.apply)({"params": params, "gates": gates}, x, t, cond)[0]
        cut = models.sliced(network, [jax.tree.map(lambda a: a[:, 0] > 0, gates)])
        given = {"params": params, "slices": cut.cut(params), "bucket": jnp.int32(0), "gates": gates}
        np.testing.assert_allclose(jax.jit(cut.network.apply)(given, x, t, cond)[0], masked, atol=1e-5)


def test_what_cannot_be_routed_is_told():
    network, params, x, t, cond, _ = dit_case()
    with pytest.raises(InvalidInput, match="capacity is 0"):
        models.token_router(0)
    with pytest.raises(InvalidInput, match="one time a sample"):
        adapters.embedded_time(network, params, jnp.zeros((2, 6)))
    with pytest.raises(InvalidInput, match="one embedding for all blocks"):
        adapters.embedded_time(network, {}, t)
    with pytest.raises(InvalidInput, match="groups is 5"):
        adapters.routed(network, 5).init(jax.random.key(0), params, x, t, cond)


def test_the_largest_heads_and_groups_are_kept():
    network, params, _, t, *_ = dit_case()
    timed, tree = routed_case(tokens=False)
    like = jax.eval_shape(lambda: timed.fill(tree, t)["gates"])
    block = params["blocks"]["block"]
    # Of the second head's and the first group's rows of the output matrices, a hundredth is left.
    out, down = (
        block[a][b][c]["kernel"] for a, b, c in (("attention", "attention", "out"), ("mlp", "feed_forward", "down"))
    )
    small = changed(out, np.s_[:, 8:], 0.01 * np.asarray(out)[:, 8:])
    smaller = changed(down, np.s_[:, :16], 0.01 * np.asarray(down)[:, :16])
    block = {
        **block,
        "attention": {"attention": {**block["attention"]["attention"], "out": {"kernel": small}}},
        "mlp": {"feed_forward": {**block["mlp"]["feed_forward"], "down": {"kernel": smaller}}},
    }
    weights = {**params, "blocks": {"block": block}}
    heads, groups = (
        models.by_path(models.largest_gates(network, weights, like, kept))[f"blocks/block/{path}/gate"]
        for kept, path in ((1, "attention/attention/attend"), (2, "mlp/feed_forward/up"))
    )
    np.testing.assert_array_equal(heads, np.broadcast_to([[[1, 0]]], (3, 1, 2)))
    assert not groups[..., 0].any() and (groups.sum(axis=-1) == 2).all()
    with pytest.raises(InvalidInput, match="from 1 to 2"):
        models.largest_gates(network, params, like, 3)


def test_the_complete_network_is_the_one_without_routers():
    _, _, x, t, cond, output = dit_case()
    timed, tree = routed_case()
    np.testing.assert_array_equal(jax.jit(timed.complete.apply)(tree, x, t, cond)[0], output)
