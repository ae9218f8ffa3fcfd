"""Further channels at the entrance change nothing until they are trained, and show what is given."""

import jax
import numpy as np
import pytest

from diffusion_jax import adapters, models
from diffusion_jax.adapters import masked_channels, with_channels
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path
from tests.models.shared import T, compiled, drawn_params, image, labels, tiny_dit

LABEL = models.label(3)
FEW = {"channels": 8, "groups": 4, "multipliers": (1, 1), "attention": (0, 0), "mid_attention": 0, "mid_residual": 0}
NETWORKS = {
    "dit": (lambda *joined: models.dit("S/2", width=16, depth=1, heads=2, conditions=(LABEL, *joined)), (2, 4, 6, 3)),
    "video": (
        lambda *joined: models.video_dit("S/2", width=16, depth=2, heads=2, conditions=(LABEL, *joined)),
        (2, 3, 4, 4, 2),
    ),
    "unet": (lambda *joined: models.unet("digits", **FEW, conditions=(LABEL, *joined)), (2, 8, 8, 1)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_further_channels_count_for_nothing_at_first(name):
    make, shape = NETWORKS[name]
    network, wide, x, cond = make(), make(models.concat()), image(shape), labels(0, 2)
    params = drawn_params(network, x, T, cond)
    more = {**cond, "concat": image((*shape[:-1], 3), seed=4)}
    widened = with_channels(network, params, 3)
    assert jax.tree.map(np.shape, widened) == jax.tree.map(
        lambda leaf: leaf.shape, jax.eval_shape(wide.init, jax.random.key(0), x, T, more)
    )
    apply = compiled(lambda params, cond: wide.apply(params, x, T, cond)[0])
    np.testing.assert_allclose(apply(widened, more), network.apply(params, x, T, cond)[0], atol=1e-5)
    kernel = next(path for path, leaf in by_path(widened).items() if leaf.shape != by_path(params)[path].shape)
    trained = jax.tree.map(np.array, widened)
    by_path(trained)[kernel][...] = np.random.default_rng(0).standard_normal(by_path(widened)[kernel].shape)
    assert np.abs(apply(trained, more) - apply(trained, {**cond, "concat": 0 * more["concat"]})).max() > 1e-3


def test_what_stands_around_a_network_stays():
    network, wide = tiny_dit(), tiny_dit(conditions=(LABEL, models.concat()))
    x, cond = image(), labels(0, 2)
    adapted, more = adapters.lora(network, rank=1), {**cond, "concat": image((2, 4, 6, 2), seed=4)}
    both = drawn_params(adapted.network, x, T, cond)
    output = adapters.lora(wide, rank=1).network.apply(with_channels(adapted.network, both, 2), x, T, more)[0]
    np.testing.assert_allclose(output, adapted.network.apply(both, x, T, cond)[0], atol=1e-5)


def test_given_frames_and_pixels_are_shown_with_their_mask():
    clips, given = image((2, 3, 4, 4, 2)), np.array([[1, 0, 0], [0, 0, 1]])
    channels = np.asarray(masked_channels(clips, given))
    assert channels.shape == (2, 3, 4, 4, 3)
    np.testing.assert_array_equal(channels[0, 1:], 0)
    np.testing.assert_array_equal(channels[1, 2, ..., :2], clips[1, 2])
    np.testing.assert_array_equal(channels[..., 2], np.broadcast_to(given[..., None, None], (2, 3, 4, 4)))
    pixels = np.arange(24).reshape(1, 4, 6) % 2 == 0
    one = np.asarray(masked_channels(image(), pixels))
    np.testing.assert_array_equal(one[..., 3], np.broadcast_to(pixels, (2, 4, 6)))


def test_what_cannot_be_widened_is_told():
    network = tiny_dit()
    with pytest.raises(InvalidInput, match="extra is 0"):
        with_channels(network, {}, 0)
    with pytest.raises(InvalidInput, match="entrance"):
        with_channels(models.network(network.module), {}, 1)
    with pytest.raises(InvalidInput, match="prefix"):
        masked_channels(image(), np.ones((2, 5)))
