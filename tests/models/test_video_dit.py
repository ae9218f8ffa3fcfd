"""Video transformers: a time for every frame, who sees whom, and the laws of decoding block by block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.adapters import lora
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path, incremental
from diffusion_jax.models.layers.temporal import frame_mask, moved
from tests.models.shared import T, changed, compiled, drawn_params, image, labels

SHAPE = (2, 4, 4, 4, 3)
LABEL = labels(0, 2)


def tiny(**fields):
    return models.video_dit("S/2", **{"width": 16, "depth": 4, "heads": 2, "num_classes": 3, **fields})


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
    network = models.video_dit("XL/2", num_classes=101, learn_sigma=True)
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
    network = tiny(audio=True, context=True)
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
    network = tiny(audio=True)
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
    assert models.empty_condition(cond, 3)["audio"].shape == audio.shape
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
    network = tiny(attention=attention, reference=True, temporal_positions="rotary", depth=4)
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
    network, reference = tiny(reference=True, temporal_positions="rotary"), np.asarray(clip((2, 4, 4, 3), seed=8))
    params, apply = ready(network, {**LABEL, "reference": reference})
    x, t = clip(), times()
    there = apply(x, t)
    assert np.abs(apply(x, t, LABEL) - there).max() > 1e-4
    np.testing.assert_array_equal(apply(x, t, {**LABEL, "reference": reference[:, None]}), there)
    two = {**LABEL, "reference": np.stack([reference, reference + 1.0], axis=1)}
    assert jax.eval_shape(network.apply, params, x, t, two)[0].shape == x.shape


def test_channels_may_join():
    network = tiny(concat=True, learn_sigma=True)
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


def in_blocks(step, params, x, t, cond, block, sink_at=None):
    """All blocks of a clip one after the other at one level, in one scan: the outputs and the last cache."""
    count = x.shape[1] // block

    def cut(leaf):
        return jnp.moveaxis(leaf.reshape(leaf.shape[0], count, block, *leaf.shape[2:]), 1, 0)

    parts = {name: cut(cond[name]) for name in cond if name == "audio"}
    whole = {name: cond[name] for name in cond if name != "audio"}
    first = {**whole, **{name: part[0] for name, part in parts.items()}}

    def body(cache, entry):
        x, t, own = entry
        output, _, kept = step.apply(params, cache, x, t, {**whole, **own}, sink_at)
        return step.push(cache, kept), output

    cache = step.init(params, cut(x)[0], first)
    cache, out = jax.lax.scan(body, cache, (cut(x), cut(t), parts))
    return jnp.moveaxis(out, 0, 1).reshape(x.shape), cache


CASES = {
    "factorised": {},
    "audio and a sink": {"reference": True, "audio": True, "reference_at": 5.0},
    "joint": {"attention": "joint", "positions": "rotary", "reference": True},
    "joint, frames only": {"attention": "joint"},
    "a set": {"temporal_positions": "none"},
}


@pytest.mark.parametrize("case, window", [*((case, 2) for case in CASES), ("factorised", 5)])
def test_block_by_block_is_the_masked_whole(case, window):
    fields = {"temporal_positions": "rotary", "qk_norm": True, "block": 2, "window": window, **CASES[case]}
    network, shape = tiny(**fields), (2, 10, 4, 4, 3)
    cond = dict(LABEL)
    if fields.get("audio"):
        cond["audio"] = clip((2, 10, 2, 5), seed=7)
    if fields.get("reference"):
        cond["reference"] = clip((2, 4, 4, 3), seed=8)
    params, apply = ready(network, cond, shape)
    x, t = clip(shape), np.broadcast_to(np.asarray(times((2, 1))), (2, 10))
    step = incremental(network)
    out, cache = compiled(lambda params, x, t, cond: in_blocks(step, params, x, t, cond, 2))(params, x, t, cond)
    np.testing.assert_allclose(out, apply(x, t, cond), atol=1e-5 * max(1.0, np.abs(out).max()))
    assert cache.count == 5
    assert {leaf.shape[2] for leaf in jax.tree.leaves(cache.blocks)} == {window}


def test_an_adapted_network_decodes_block_by_block():
    """Low-rank factors are one edit, the kept keys another; both are at work."""
    network = tiny(temporal_positions="rotary", block=1, window=2, depth=2)
    adapted = lora(network, rank=2)
    x, t = clip(), np.broadcast_to(np.asarray(times((2, 1))), SHAPE[:2])
    both = drawn_params(adapted.network, x, times(), LABEL)
    apply = compiled(lambda both, x, t: adapted.network.apply(both, x, t, LABEL)[0])
    whole = apply(both, x, t)
    out, _ = compiled(lambda x, t: in_blocks(incremental(adapted.network), both, x, t, LABEL, 1))(x, t)
    np.testing.assert_allclose(out, whole, atol=1e-5 * max(1.0, np.abs(whole).max()))
    silent = jax.tree.map(np.zeros_like, jax.device_get(both["lora"]))
    assert np.abs(apply({**both, "lora": silent}, x, t) - whole).max() > 1e-2


@functools.cache
def rolling():
    """An incremental network with a reference, its parameters, a block of two frames, an empty cache, what it keeps."""
    network = tiny(temporal_positions="rotary", block=2, window=2, reference=True)
    cond = {**LABEL, "reference": clip((2, 4, 4, 3), seed=8)}
    params, step = drawn_params(network, clip(), times(), cond), incremental(network)
    x, t = clip((2, 2, 4, 4, 3)), times((2, 2))

    @jax.jit
    def begin(cond):
        empty = step.init(params, x, cond)
        return empty, step.apply(params, empty, x, t, LABEL)[2]

    return step, params, x, t, *begin(cond)


def test_a_push_that_is_not_kept_changes_nothing_and_memory_is_constant():
    step, _, _, _, empty, kept = rolling()
    push = jax.jit(step.push)
    full = functools.reduce(lambda cache, _: push(cache, kept, True), range(5), empty)
    assert jax.tree.map(jnp.shape, full) == jax.tree.map(jnp.shape, empty) and int(full.count) == 5
    same = push(full, jax.tree.map(lambda leaf: plus(leaf, ..., 1), kept), False)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_rolling_sink_is_as_far_at_block_10_000_as_at_block_10():
    step, params, x, t, empty, kept = rolling()

    @jax.jit
    def apply(count, at):
        cache = step.push(step.push(empty, kept), kept)._replace(count=count)
        return [step.apply(params, cache, x, t, LABEL, *where)[0] for where in ((at,), ())]

    (early, fixed), (late, far), (near, _) = (
        jax.device_get(apply(*given)) for given in ((10, 3.0), (10_000, 3.0), (10, 1.0))
    )
    np.testing.assert_array_equal(early, late)
    assert np.abs(fixed - far).max() > 1e-4
    assert np.abs(early - near).max() > 1e-4


def test_logits_of_moved_keys_depend_on_distances():
    q, k = clip((1, 3, 2, 8), seed=3), clip((1, 3, 2, 8), seed=4)

    @compiled
    def logits(q_at, k_at):
        return jnp.einsum("bnhd,bmhd->bhnm", moved(q, q_at), moved(k, k_at))

    np.testing.assert_allclose(logits(2.0, 5.0), logits(12.0, 15.0), atol=1e-5)
    np.testing.assert_allclose(compiled(lambda k: moved(moved(k, 3.0), -3.0))(k), k, atol=1e-6)
    assert np.abs(logits(2.0, 5.0) - logits(2.0, 9.0)).max() > 1e-2


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
    network = tiny(block=2, temporal_positions="rotary", audio=True)

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
