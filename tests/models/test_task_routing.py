"""Task routing: the published window and block, the network's own parameters, and masks of each sample and position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.layers.branches import Side, transformer_branches
from diffusion_jax.typing import Network
from tests.models.shared import T, changed, compiled, dit_case, drawn_params, image, labels

SPAN = (0.0, 999.0)


def published(tasks, channels, exponent=4.0, ratio=0.8):
    """The table `[T, C]` of the reference, in NumPy."""
    width = int(ratio * channels)
    start = np.round((channels - width) * np.linspace(0, 1, tasks) ** exponent).astype(int)
    place = np.arange(channels)
    return (start[:, None] <= place) & (place < start[:, None] + width)


@pytest.mark.parametrize(("channels", "exponent", "ratio"), [(64, 4.0, 0.8), (384, 4.0, 0.8), (30, 1.0, 0.5)])
def test_the_window_is_the_published_table_and_reaches_every_channel(channels, exponent, ratio):
    tau = np.linspace(0, 1, 1000, dtype=np.float32)
    seen = np.asarray(models.channel_window(ratio, exponent)(tau, channels))
    np.testing.assert_array_equal(seen, published(1000, channels, exponent, ratio))
    assert (seen.sum(axis=1) == int(ratio * channels)).all() and seen.any(axis=0).all()
    start = seen.argmax(axis=1)
    assert (np.abs(np.diff(seen.astype(int), axis=1)).sum(axis=1) <= 2).all()
    assert start[0] == 0 and start[-1] == channels - int(ratio * channels) and (np.diff(start) >= 0).all()


def test_random_channels_are_as_many_and_neighbours_share_no_more_than_others():
    seen = np.asarray(models.random_channels(0.5, 50)(np.linspace(0, 1, 50, dtype=np.float32), 400)).astype(int)
    assert (seen.sum(axis=1) == 200).all()
    shared = seen @ seen.T
    near, far = np.diagonal(shared, 1).mean(), np.diagonal(shared, 25).mean()
    # Of two draws of 200 out of 400, 100 are shared, give or take 5.
    np.testing.assert_allclose([near, far], 100, atol=5)


def test_a_transformer_is_the_published_block_with_the_parameters_of_the_network():
    """Against blocks that are run one by one, with one mask for attention and feed-forward layer together."""
    network, params, x, t, cond, plain = dit_case()
    routed = models.task_routed(network, SPAN)
    ours = np.asarray(jax.jit(lambda *args: routed.apply(*args)[0])(params, x, t, cond))
    assert np.abs(ours - plain).max() > 1e-2
    assert jax.tree.structure(jax.eval_shape(routed.init, jax.random.key(0), x, t, cond)) == jax.tree.structure(params)
    mask = published(1000, 16)[np.asarray(t, int)][:, None].astype(np.float32)

    def block(h, c, weights):
        r = mask * h
        for name, make in transformer_branches(2, False, 4.0, False, jnp.float32, False):
            r = r + make().apply({"params": weights[name]}, r, c, Side())
        return r + (1 - mask) * h

    tapped = models.taps("blocks", lambda out, h, c, side: (out, h, c))

    @jax.jit
    def expected(params):
        _, extras, _ = models.intercepted(routed, tapped).apply(params, {}, x, t, cond)
        ((out, h, c),) = jax.tree.leaves(extras["taps"], is_leaf=lambda node: isinstance(node, tuple))
        return out, jax.lax.scan(lambda h, weights: (block(h, c, weights), None), h, params["blocks"]["block"])[0]

    out, h = expected(params)
    np.testing.assert_allclose(out, h, atol=1e-5)


def test_with_all_channels_output_and_gradient_are_those_of_the_network():
    network, params, x, t, cond, _ = dit_case()

    def answer(network):
        def loss(params):
            out = network.apply(params, x, t, cond)[0]
            return jnp.square(out).mean(), out

        return compiled(jax.value_and_grad(loss, has_aux=True))(params)

    ours, plain = answer(models.task_routed(network, SPAN, models.channel_window(1.0))), answer(network)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1.0, np.abs(b).max()))


def test_each_sample_has_its_own_mask_and_each_pixel_its_own():
    network, params, x, t, cond, _ = dit_case()
    run = compiled(lambda *args: models.task_routed(network, SPAN).apply(*args)[0])
    both = run(params, x, t, cond)
    for i in range(2):
        pair = np.repeat(np.asarray(x)[i : i + 1], 2, axis=0), np.repeat(np.asarray(t)[i], 2)
        alone = run(params, *pair, labels(*[[0, 2][i]] * 2))
        np.testing.assert_allclose(alone[0], both[i], atol=1e-5)
    pixels = np.broadcast_to(np.asarray(t)[:, None, None], x.shape[:3]).copy()
    np.testing.assert_allclose(run(params, x, pixels, cond), both, atol=1e-5)
    moved = run(params, x, changed(pixels, (0, slice(0, 2), slice(0, 2)), 990.0), cond)
    np.testing.assert_allclose(moved[1], both[1], atol=1e-5)
    assert np.abs(moved[0] - both[0]).max() > 1e-3


def test_in_a_unet_only_what_residual_branches_read_is_masked():
    network = models.unet("digits", channels=8, groups=4, multipliers=(1, 2), attention=(0, 1))
    x = image((2, 4, 4, 1))
    params = drawn_params(network, x, T)
    # Taps of the network within read what its modules are given, those of the network around what came to them.
    read = models.taps(("up_1_0/residual", "up_1_0/shortcut", "blocks/block"), lambda out, h, *args: h)
    came = models.taps("up_1_0/residual", lambda out, h, c, side: h, collection="came")
    within = models.task_routed(models.intercepted(network, read).network, SPAN)
    run = compiled(models.intercepted(within, came).network.apply)
    extras = run({"params": params}, x, T)[1]
    given, (h,) = models.by_path(extras["taps"]), jax.tree.leaves(extras["came"])
    mask = published(1000, h.shape[-1])[np.asarray(T, int)][:, None, None]
    assert mask.any(axis=1).sum() and not mask.all()
    np.testing.assert_array_equal(given["up_1_0/residual/output"], np.where(mask, h, 0))
    np.testing.assert_array_equal(given["up_1_0/shortcut/output"], h)
    assert all((leaf != 0).any(axis=(-3, -2)).all() for path, leaf in given.items() if "attention" in path)
    pixels = np.broadcast_to(np.asarray(T)[:, None, None], x.shape[:3])
    apply = compiled(lambda *args: models.task_routed(network, SPAN).apply(*args)[0])
    np.testing.assert_allclose(apply(params, x, pixels), apply(params, x, T), atol=1e-5)


def test_what_is_not_routed_stays_as_it_is_where_the_branches_add_nothing():
    """With zero gates every block is the identity, of all channels."""
    network, params, x, t, cond, _ = dit_case()
    still = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.zeros_like(leaf) if "modulation" in {getattr(k, "key", "") for k in path} else leaf,
        params,
    )
    run = compiled(lambda *args: models.task_routed(network, SPAN).apply(*args)[0])
    plain = compiled(lambda *args: network.apply(*args)[0])
    np.testing.assert_allclose(run(still, x, t, cond), plain(still, x, t, cond), atol=1e-6)


def test_wrong_values_are_told_in_a_sentence():
    network = dit_case()[0]
    for make, said in (
        (lambda: models.channel_window(0.0), "ratio is 0"),
        (lambda: models.channel_window(exponent=0.0), "exponent is 0"),
        (lambda: models.random_channels(tasks=1), "two tasks"),
        (lambda: models.task_routed(network, (1.0, 1.0)), "two different times"),
        (lambda: models.task_routed(Network(network.init, network.apply), SPAN), "module is missing"),
        (lambda: models.channel_window(0.01)(jnp.zeros(1), 16), "none of 16 channels"),
    ):
        with pytest.raises(InvalidInput, match=said):
            make()
