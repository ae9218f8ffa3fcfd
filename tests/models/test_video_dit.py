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
from tests.models.shared import scramble

SHAPE = (2, 4, 4, 4, 3)
LABEL = {"label": jnp.array([0, 2])}


def tiny(**fields):
    return models.video_dit("S/2", **{"width": 16, "depth": 4, "heads": 2, "num_classes": 3, **fields})


def clip(shape=SHAPE, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def times(shape=SHAPE[:2], seed=2):
    return 1000 * jax.random.uniform(jax.random.key(seed), shape)


def ready(network, cond=LABEL, shape=SHAPE):
    """The network's weights, nowhere zero, and the network compiled: `(x, t, cond) -> output`."""
    params = jax.jit(lambda key: scramble(network.init(key, clip(shape), times(shape[:2]), cond)))(jax.random.key(0))
    return params, jax.jit(lambda x, t, cond=cond: network.apply(params, x, t, cond)[0])


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
    x, t = clip(), jnp.array([100.0, 700.0])
    scalar = apply(x, t)
    assert scalar.shape == x.shape
    every = jnp.broadcast_to(t[:, None], SHAPE[:2])
    np.testing.assert_array_equal(apply(x, every), scalar)
    per_pixel = jnp.broadcast_to(t[:, None, None, None], SHAPE[:4])
    np.testing.assert_allclose(apply(x, per_pixel), scalar, atol=2e-5)
    assert float(jnp.abs(apply(x, every.at[:, 1].add(200.0)) - scalar).max()) > 1e-3
    own = models.param_shapes(tiny(attention=attention), SHAPE, LABEL)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, own)


@pytest.mark.parametrize("attention", ["factorised", "joint"])
def test_without_temporal_positions_frames_are_a_set(attention):
    _, apply = plain(attention=attention, temporal_positions="none")
    x, t, order = clip(), times(), np.array([2, 0, 3, 1])
    np.testing.assert_allclose(apply(x[:, order], t[:, order]), apply(x, t)[:, order], atol=2e-5)
    # A tau that is handed to the wrong frame is another function.
    assert float(jnp.abs(apply(x[:, order], t) - apply(x, t)[:, order]).max()) > 1e-3


def test_modulation_is_local_to_the_frame():
    network = tiny()
    params, _ = plain()
    closed = models.intercepted(network, models.gates("temporal_attention"))
    x, t = clip(), times()
    gates = models.per_layer(closed.init(jax.random.key(0), params, x, t, LABEL), 0.0)
    apply = jax.jit(lambda t: closed.apply(params, gates, x, t, LABEL)[0])
    changed = np.abs(np.asarray(apply(t.at[:, 2].set(50.0)) - apply(t))).max(axis=(0, 2, 3, 4))
    assert changed[2] > 1e-3 and (changed[[0, 1, 3]] == 0).all()


def test_branches_are_found_by_their_names():
    network = tiny(audio=True, context=True)
    cond = {**LABEL, "audio": clip((2, 4, 2, 5)), "context": clip((2, 3, 6))}
    params, _ = ready(network, cond)
    assert {path.split("/")[2] for path in by_path(params) if path.startswith("blocks")} == {
        "attention",
        "cross_attention",
        "audio_attention",
        "mlp",
        "temporal_attention",
        "temporal_mlp",
    }
    tapped = models.intercepted(network, models.taps("temporal_attention/attention/attend", lambda y, q, k, v, m: q))
    _, extras, _ = jax.jit(tapped.apply)(params, {}, clip(), times(), cond)
    assert [leaf.shape for leaf in jax.tree.leaves(extras["taps"])] == [(2, 2 * 4, 4, 2, 8)]
    adapted = lora(network, rank=2, select="temporal_attention/attention/q")
    factors = jax.eval_shape(adapted.init, jax.random.key(0), params, clip(), times(), cond)
    assert len(jax.tree.leaves(factors)) == 2


def test_unrolled_and_rematerialised_it_is_the_same_network():
    params, apply = plain()
    x, t = clip(), times()
    for fields in ({"scan": False}, {"remat": "full"}):
        again = jax.jit(tiny(**fields).apply)(params, x, t, LABEL)[0]
        np.testing.assert_allclose(again, apply(x, t), atol=1e-5)


def test_each_frame_hears_its_own_audio():
    network = tiny(audio=True)
    audio = clip((2, 4, 2, 5), seed=7)
    cond = {**LABEL, "audio": audio}
    params, _ = ready(network, cond)
    closed = models.intercepted(network, models.gates("temporal_attention"))
    gates = models.per_layer(closed.init(jax.random.key(0), params, clip(), times(), cond), 0.0)
    apply = jax.jit(lambda audio: closed.apply(params, gates, clip(), times(), {**LABEL, "audio": audio})[0])
    changed = np.abs(np.asarray(apply(audio.at[:, 1].add(1.0)) - apply(audio))).max(axis=(0, 2, 3, 4))
    assert changed[1] > 1e-3 and (changed[[0, 2, 3]] == 0).all()
    # The features of a frame are told apart by their place, and a single one needs no axis.
    assert float(jnp.abs(apply(audio[:, :, ::-1]) - apply(audio)).max()) > 1e-4
    assert models.empty_condition(cond, 3)["audio"].shape == audio.shape
    one = jax.jit(network.apply)(params, clip(), times(), {**LABEL, "audio": audio[:, :, :1]})[0]
    same = jax.jit(network.apply)(params, clip(), times(), {**LABEL, "audio": audio[:, :, 0]})[0]
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


@pytest.mark.parametrize("attention", ["factorised", "joint"])
@pytest.mark.parametrize("block, window, unseen", [(1, 0, [0, 1]), (2, 0, [0, 1]), (1, 1, [0, 1])])
def test_later_frames_are_not_seen(attention, block, window, unseen):
    _, apply = plain(attention=attention, block=block, window=window, temporal_positions="rotary")
    x, t = clip(), times()
    there = apply(x, t)
    other = apply(x.at[:, 2].add(1.0), t.at[:, 2].set(3.0))
    changed = np.abs(np.asarray(other - there)).max(axis=(0, 2, 3, 4))
    assert (changed[unseen] == 0).all() and (changed[2:] > 1e-4).all()
    if block == 2:
        # Within a block all frames see each other.
        assert float(jnp.abs(apply(x.at[:, 3].add(1.0), t) - there)[:, 2].max()) > 1e-4
    if window == 1:
        # Two temporal blocks reach two frames back, and no further.
        reach = np.abs(np.asarray(apply(x.at[:, 0].add(1.0), t) - there)).max(axis=(0, 2, 3, 4))
        assert (reach[:3] > 1e-6).all() if attention == "factorised" else reach[1] > 1e-6
        assert reach[3] == 0 or attention == "joint"


@pytest.mark.parametrize("attention", ["factorised", "joint"])
def test_references_are_seen_by_all_and_see_only_themselves(attention):
    network = tiny(attention=attention, reference=True, temporal_positions="rotary", depth=4)
    reference = clip((2, 4, 4, 3), seed=8)
    params, apply = ready(network, {**LABEL, "reference": reference})
    x, t = clip(), times()
    there = apply(x, t)
    other = apply(x, t, {**LABEL, "reference": reference + 1.0})
    assert (np.abs(np.asarray(other - there)).max(axis=(0, 2, 3, 4)) > 1e-4).all()
    # It may be left out, and several may be given.
    assert float(jnp.abs(apply(x, t, LABEL) - there).max()) > 1e-4
    np.testing.assert_array_equal(apply(x, t, {**LABEL, "reference": reference[:, None]}), there)
    two = {**LABEL, "reference": jnp.stack([reference, reference + 1.0], axis=1)}
    assert apply(x, t, two).shape == x.shape
    # What references compute does not depend on the clip.
    select = "attention/attend" if attention == "joint" else "temporal_attention/attention/attend"
    tapped = models.intercepted(network, models.taps(select, lambda y, q, k, v, mask: k[:, :1]))
    keys = [
        jax.tree.leaves(tapped.apply(params, {}, clip(seed=seed), t, {**LABEL, "reference": reference})[1]["taps"])[0]
        for seed in (1, 9)
    ]
    np.testing.assert_array_equal(*keys)


def test_channels_may_join():
    network = tiny(concat=True, learn_sigma=True)
    joined = clip((2, 4, 4, 4, 2), seed=4)
    params, apply = ready(network, {**LABEL, "concat": joined})
    output, extras = jax.jit(network.apply)(params, clip(), times(), {**LABEL, "concat": joined})
    assert output.shape == extras["log_variance"].shape == SHAPE
    assert float(jnp.abs(apply(clip(), times(), {**LABEL, "concat": joined + 1}) - output).max()) > 1e-4


def test_bfloat16_is_close():
    params, apply = plain()
    there = apply(clip(), times())
    low = jax.jit(tiny(dtype="bfloat16").apply)(params, clip(), times(), LABEL)[0]
    assert low.dtype == jnp.float32
    assert float(jnp.linalg.norm(low - there) / jnp.linalg.norm(there)) < 2e-2


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


@pytest.mark.parametrize("window", [2, 5])
@pytest.mark.parametrize("case", CASES)
def test_block_by_block_is_the_masked_whole(case, window):
    fields = {"temporal_positions": "rotary", "qk_norm": True, "block": 2, "window": window, **CASES[case]}
    network, shape = tiny(**fields), (2, 10, 4, 4, 3)
    cond = dict(LABEL)
    if fields.get("audio"):
        cond["audio"] = clip((2, 10, 2, 5), seed=7)
    if fields.get("reference"):
        cond["reference"] = clip((2, 4, 4, 3), seed=8)
    params, apply = ready(network, cond, shape)
    x, t = clip(shape), jnp.broadcast_to(times((2, 1)), (2, 10))
    step = incremental(network)
    out, cache = jax.jit(lambda params, x, t, cond: in_blocks(step, params, x, t, cond, 2))(params, x, t, cond)
    np.testing.assert_allclose(out, apply(x, t, cond), atol=1e-5 * max(1.0, float(jnp.abs(out).max())))
    assert int(cache.count) == 5
    assert {leaf.shape[2] for leaf in jax.tree.leaves(cache.blocks)} == {window}


def test_an_adapted_network_decodes_block_by_block():
    """Low-rank factors are one edit, the kept keys another; both are at work."""
    network = tiny(temporal_positions="rotary", block=1, window=2, depth=2)
    params, _ = ready(network)
    adapted = lora(network, rank=2)
    x, t = clip(), jnp.broadcast_to(times((2, 1)), SHAPE[:2])
    factors = jax.jit(lambda key: scramble(adapted.init(key, params, x, t, LABEL), size=0.5))(jax.random.key(0))
    both = {"params": params, "lora": factors}
    whole = jax.jit(adapted.network.apply)(both, x, t, LABEL)[0]
    out, _ = jax.jit(lambda x, t: in_blocks(incremental(adapted.network), both, x, t, LABEL, 1))(x, t)
    np.testing.assert_allclose(out, whole, atol=1e-5 * max(1.0, float(jnp.abs(whole).max())))
    assert float(jnp.abs(jax.jit(network.apply)(params, x, t, LABEL)[0] - whole).max()) > 1e-2


def test_a_push_that_is_not_kept_changes_nothing_and_memory_is_constant():
    network = tiny(temporal_positions="rotary", block=2, window=2, reference=True)
    cond = {**LABEL, "reference": clip((2, 4, 4, 3), seed=8)}
    params, _ = ready(network, cond)
    step = incremental(network)
    x, t = clip((2, 2, 4, 4, 3)), times((2, 2))
    empty = jax.jit(step.init)(params, x, cond)
    kept = jax.jit(step.apply)(params, empty, x, t, LABEL)[2]
    full = functools.reduce(lambda cache, _: jax.jit(step.push)(cache, kept), range(5), empty)
    assert jax.tree.map(jnp.shape, full) == jax.tree.map(jnp.shape, empty) and int(full.count) == 5
    same = jax.jit(step.push)(full, jax.tree.map(lambda leaf: leaf + 1, kept), False)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_rolling_sink_is_as_far_at_block_10_000_as_at_block_10():
    network = tiny(temporal_positions="rotary", block=2, window=2, reference=True, depth=2)
    cond = {**LABEL, "reference": clip((2, 4, 4, 3), seed=8)}
    params, _ = ready(network, cond)
    step = incremental(network)
    x, t = clip((2, 2, 4, 4, 3)), times((2, 2))
    cache = jax.jit(step.init)(params, x, cond)
    kept = jax.jit(step.apply)(params, cache, x, t, LABEL)[2]
    cache = step.push(step.push(cache, kept), kept)
    apply = jax.jit(lambda cache, at: step.apply(params, cache, x, t, LABEL, at)[0])
    fixed = jax.jit(lambda cache: step.apply(params, cache, x, t, LABEL)[0])
    early, late = (cache._replace(count=jnp.int32(count)) for count in (10, 10_000))
    np.testing.assert_array_equal(apply(early, 3.0), apply(late, 3.0))
    assert float(jnp.abs(fixed(early) - fixed(late)).max()) > 1e-4
    assert float(jnp.abs(apply(early, 3.0) - apply(early, 1.0)).max()) > 1e-4


def test_logits_of_moved_keys_depend_on_distances():
    q, k = clip((1, 3, 2, 8), seed=3), clip((1, 3, 2, 8), seed=4)

    def logits(q_at, k_at):
        return jnp.einsum("bnhd,bmhd->bhnm", moved(q, q_at), moved(k, k_at))

    np.testing.assert_allclose(logits(2.0, 5.0), logits(12.0, 15.0), atol=1e-5)
    np.testing.assert_allclose(moved(moved(k, 3.0), -3.0), k, atol=1e-6)
    assert float(jnp.abs(logits(2.0, 5.0) - logits(2.0, 9.0)).max()) > 1e-2


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
