"""Video transformers: a time for every frame, and who sees whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.adapters import lora
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path, incremental
from diffusion_jax.models.layers.temporal import frame_mask
from tests.models.shared import T, changed, compiled, drawn_params, image, labels

SHAPE = (2, 4, 4, 4, 3)
LABEL = labels(0, 2)
HEARING, REFERRING = (models.label(3), models.audio()), (models.label(3), models.reference())


def tiny(**fields):
    return models.video_dit("S/2", **{"width": 16, "depth": 4, "heads": 2, "conditions": (models.label(3),), **fields})


def clip(shape=SHAPE, seed=1):
    return image(shape, seed)


def times(shape=SHAPE[:2], seed=2):
    return jax.device_put(np.random.default_rng(seed).uniform(0, 1000, shape).astype(np.float32))


def plus(array, index, value):
    """A copy with `value` added at `index`."""
    return changed(array, index, np.asarray(array)[index] + value)


def ready(network, cond=LABEL, shape=SHAPE):
    """The network's weights, nowhere zero, and the network compiled: `(x, t, cond) -> output`."""
    params = drawn_params(network, clip(shape), times(shape[:2]), cond)
    apply = compiled(lambda x, t, cond: network.apply(params, x, t, cond)[0])
    return params, lambda x, t, cond=cond: apply(x, t, cond)


def moves(found, there):
    """The largest change of each frame."""
    return np.abs(found - there).max(axis=(0, 2, 3, 4))


def without_time(network, params, cond):
    """The network without attention over time, `(x, t, cond) -> output`."""
    closed = models.intercepted(network, models.gates("temporal_attention"))
    shapes = jax.eval_shape(closed.init, jax.random.key(0), params, clip(), times(), cond)
    gates = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return compiled(lambda x, t, cond: closed.apply(params, gates, x, t, cond)[0])


@functools.cache
def plain(**fields):
    return ready(tiny(**fields))


def test_the_preset_has_the_parameters_of_the_image_network():
    """As many as DiT-XL/2: the blocks are shared out between space and time, and vector times add none."""
    network = models.video_dit("XL/2", conditions=(models.label(101),), learn_sigma=True)
    shapes = models.param_shapes(network, (1, 16, 32, 32, 4), {"label": jax.ShapeDtypeStruct((1,), jnp.int32)})
    assert models.count_params(shapes) == pytest.approx(675e6, rel=0.01)


@pytest.mark.parametrize("attention", ["factorised", "joint"])
def test_equal_times_are_the_scalar_time_bit_for_bit(attention):
    params, apply = plain(attention=attention)
    x, t = clip(), np.asarray(T)
    scalar = apply(x, t)
    assert scalar.shape == x.shape
    every = np.broadcast_to(t[:, None], SHAPE[:2])
    np.testing.assert_array_equal(apply(x, every), scalar)
    if attention == "factorised":
        per_pixel = np.broadcast_to(t[:, None, None, None], SHAPE[:4])
        np.testing.assert_allclose(apply(x, per_pixel), scalar, atol=2e-5)
    assert np.abs(apply(x, plus(every, np.s_[:, 1], 200.0)) - scalar).max() > 1e-3
    own = models.param_shapes(tiny(attention=attention), SHAPE, LABEL)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, own)


@pytest.mark.parametrize("attention", ["factorised", "joint"])
def test_without_temporal_positions_frames_are_a_set(attention):
    _, apply = plain(attention=attention, temporal_positions="none")
    x, t, order = np.asarray(clip()), np.asarray(times()), np.array([2, 0, 3, 1])
    np.testing.assert_allclose(apply(x[:, order], t[:, order]), apply(x, t)[:, order], atol=2e-5)
    # A tau that is handed to the wrong frame is another function.
    assert np.abs(apply(x[:, order], t) - apply(x, t)[:, order]).max() > 1e-3


def test_modulation_is_local_to_the_frame():
    apply, x, t = without_time(tiny(), plain()[0], LABEL), clip(), times()
    change = moves(apply(x, changed(t, np.s_[:, 2], 50.0), LABEL), apply(x, t, LABEL))
    assert change[2] > 1e-3 and (change[[0, 1, 3]] == 0).all()


def test_branches_are_found_by_their_names():
    network = tiny(conditions=(models.label(3), models.audio(), models.context()))
    cond = {**LABEL, "audio": clip((2, 4, 2, 5)), "context": clip((2, 3, 6))}
    params = drawn_params(network, clip(), times(), cond)
    assert {path.split("/")[2] for path in by_path(params) if path.startswith("blocks")} == {
        "attention",
        "cross_attention",
        "audio_attention",
        "mlp",
        "temporal_attention",
        "temporal_mlp",
    }
    tapped = models.intercepted(network, models.taps("temporal_attention/attention/attend", lambda y, q, k, v, m: q))
    _, extras, _ = jax.eval_shape(tapped.apply, params, {}, clip(), times(), cond)
    assert [leaf.shape for leaf in jax.tree.leaves(extras["taps"])] == [(2, 2 * 4, 4, 2, 8)]
    adapted = lora(network, rank=2, select="temporal_attention/attention/q")
    factors = jax.eval_shape(adapted.init, jax.random.key(0), params, clip(), times(), cond)
    assert len(jax.tree.leaves(factors)) == 2


def test_unrolled_and_rematerialised_it_is_the_same_network():
    params, apply = plain()
    x, t = clip(), times()
    again = compiled(tiny(scan=False, remat="full").apply)(params, x, t, LABEL)[0]
    np.testing.assert_allclose(again, apply(x, t), atol=1e-5)


def test_each_frame_hears_its_own_audio():
    network = tiny(conditions=HEARING)
    audio = clip((2, 4, 2, 5), seed=7)
    cond = {**LABEL, "audio": audio}
    params, whole = ready(network, cond)
    run = without_time(network, params, cond)

    def apply(audio):
        return run(clip(), times(), {**LABEL, "audio": audio})

    change = moves(apply(plus(audio, np.s_[:, 1], 1.0)), apply(audio))
    assert change[1] > 1e-3 and (change[[0, 2, 3]] == 0).all()
    # The features of a frame are told apart by their place, and a single one needs no axis.
    audio = np.asarray(audio)
    assert np.abs(apply(audio[:, :, ::-1]) - apply(audio)).max() > 1e-4
    assert models.empty_condition(HEARING, cond)["audio"].shape == audio.shape
    one, same = (whole(clip(), times(), {**LABEL, "audio": audio[:, :, index]}) for index in (slice(1), 0))
    np.testing.assert_array_equal(one, same)


def test_masks_of_frames():
    assert frame_mask(4) is None and frame_mask(4, block=4) is None
    np.testing.assert_array_equal(frame_mask(3, block=1), np.tril(np.ones((3, 3))))
    np.testing.assert_array_equal(frame_mask(4, 2), np.kron(np.tril(np.ones((2, 2))), np.ones((2, 2))))
    np.testing.assert_array_equal(frame_mask(4, 1, window=1)[3], [0, 0, 1, 1])
    np.testing.assert_array_equal(
        frame_mask(2, 1, references=2), [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    )
    np.testing.assert_array_equal(frame_mask(2, references=1)[0], [1, 0, 0])


@pytest.mark.parametrize("attention, block, window", [("factorised", 1, 1), ("factorised", 2, 0), ("joint", 1, 1)])
def test_later_frames_are_not_seen(attention, block, window):
    _, apply = plain(attention=attention, block=block, window=window, temporal_positions="rotary")
    x, t = clip(), times()
    there = apply(x, t)
    change = moves(apply(plus(x, np.s_[:, 2], 1.0), changed(t, np.s_[:, 2], 3.0)), there)
    assert (change[:2] == 0).all() and (change[2:] > 1e-4).all()
    if block == 2:
        # Within a block all frames see each other.
        assert np.abs(apply(plus(x, np.s_[:, 3], 1.0), t) - there)[:, 2].max() > 1e-4
    if window == 1:
        # Two temporal blocks reach two frames back, and no further.
        reach = moves(apply(plus(x, np.s_[:, 0], 1.0), t), there)
        assert (reach[:3] > 1e-6).all() if attention == "factorised" else reach[1] > 1e-6
        assert reach[3] == 0 or attention == "joint"


@pytest.mark.parametrize("attention", ["factorised", "joint"])
def test_references_are_seen_by_all_and_see_only_themselves(attention):
    network = tiny(attention=attention, conditions=REFERRING, temporal_positions="rotary", depth=4)
    reference = clip((2, 4, 4, 3), seed=8)
    params = drawn_params(network, clip(), times(), {**LABEL, "reference": reference})
    select = "attention/attend" if attention == "joint" else "temporal_attention/attention/attend"
    tapped = models.intercepted(network, models.taps(select, lambda y, q, k, v, mask: k[:, :1]))
    run = compiled(lambda x, reference: tapped.apply(params, {}, x, times(), {**LABEL, "reference": reference}))
    there, extras, _ = run(clip(), reference)
    assert (moves(run(clip(), plus(reference, ..., 1.0))[0], there) > 1e-4).all()
    # What references compute does not depend on the clip.
    other, told, _ = run(clip(seed=9), reference)
    assert np.abs(other - there).max() > 1e-4
    np.testing.assert_array_equal(*(jax.tree.leaves(each["taps"])[0] for each in (extras, told)))


def test_references_may_be_left_out_and_several_may_be_given():
    network, reference = tiny(conditions=REFERRING, temporal_positions="rotary"), np.asarray(clip((2, 4, 4, 3), seed=8))
    params, apply = ready(network, {**LABEL, "reference": reference})
    x, t = clip(), times()
    there = apply(x, t)
    assert np.abs(apply(x, t, LABEL) - there).max() > 1e-4
    np.testing.assert_array_equal(apply(x, t, {**LABEL, "reference": reference[:, None]}), there)
    two = {**LABEL, "reference": np.stack([reference, reference + 1.0], axis=1)}
    assert jax.eval_shape(network.apply, params, x, t, two)[0].shape == x.shape


def test_channels_may_join():
    network = tiny(conditions=(models.label(3), models.concat()), learn_sigma=True)
    joined = clip((2, 4, 4, 4, 2), seed=4)
    params = drawn_params(network, clip(), times(), {**LABEL, "concat": joined})
    run = compiled(lambda joined: network.apply(params, clip(), times(), {**LABEL, "concat": joined}))
    output, extras = run(joined)
    assert output.shape == extras["log_variance"].shape == SHAPE
    assert np.abs(run(plus(joined, ..., 1.0))[0] - output).max() > 1e-4


def test_bfloat16_is_close():
    params, apply = plain()
    there = apply(clip(), times())
    low = compiled(tiny(dtype="bfloat16").apply)(params, clip(), times(), LABEL)[0]
    assert low.dtype == np.float32
    assert np.linalg.norm(low - there) / np.linalg.norm(there) < 2e-2


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"attention": "jont"}, "did you mean 'joint'"),
        ({"depth": 3}, "it must be even"),
        ({"window": 2}, "block must be positive"),
        ({"temporal_positions": "learned"}, "Valid: none, rotary, sincos"),
        ({"blok": 1}, "did you mean 'block'"),
    ],
)
def test_fields_that_cannot_be(fields, told):
    with pytest.raises(InvalidInput, match=told):
        tiny(**fields)


def test_inputs_that_do_not_fit():
    network = tiny(block=2, temporal_positions="rotary", conditions=HEARING)

    def shapes(x=SHAPE, t=(2,), audio=(2, 4, 5), **cond):
        cond = {"label": jnp.zeros(2, int), "audio": jnp.zeros(audio), **cond}
        return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(x), jnp.zeros(t), cond)

    with pytest.raises(InvalidInput, match="clips"):
        shapes(SHAPE[1:])
    with pytest.raises(InvalidInput, match="prefix"):
        shapes(t=(2, 3))
    with pytest.raises(InvalidInput, match="blocks of 2 frames"):
        shapes((2, 3, 4, 4, 3), audio=(2, 3, 5))
    with pytest.raises(InvalidInput, match=r"cond\['audio'\]"):
        shapes(audio=(2, 3, 5))
    with pytest.raises(InvalidInput, match="'reference'"):
        shapes(reference=jnp.zeros((2, 4, 4, 3)))
    with pytest.raises(InvalidInput, match="positions that are distances"):
        incremental(tiny(block=2, window=1))
    with pytest.raises(InvalidInput, match="with blocks"):
        incremental(tiny())
    with pytest.raises(InvalidInput, match="known number of past blocks"):
        incremental(network)
