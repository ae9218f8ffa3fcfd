"""Video transformers block by block: the masked whole, with kept keys and values that do not grow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.adapters import lora
from diffusion_jax.models import incremental
from diffusion_jax.models.layers.temporal import moved
from tests.models.shared import compiled, drawn_params
from tests.models.test_video_dit import LABEL, SHAPE, clip, plus, ready, times, tiny


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


REFERRING = (models.label(3), models.reference())
CASES = {
    "factorised": {},
    "audio and a sink": {"conditions": (models.label(3), models.reference(5.0), models.audio())},
    "joint": {"attention": "joint", "positions": "rotary", "conditions": REFERRING},
    "joint, frames only": {"attention": "joint"},
    "a set": {"temporal_positions": "none"},
}


@pytest.mark.parametrize("case, window", [*((case, 2) for case in CASES), ("factorised", 5)])
def test_block_by_block_is_the_masked_whole(case, window):
    fields = {"temporal_positions": "rotary", "qk_norm": True, "block": 2, "window": window, **CASES[case]}
    network, shape = tiny(**fields), (2, 10, 4, 4, 3)
    cond = dict(LABEL)
    told = fields.get("conditions", ())
    if models.audio() in told:
        cond["audio"] = clip((2, 10, 2, 5), seed=7)
    if told:
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
    network = tiny(temporal_positions="rotary", block=2, window=2, conditions=REFERRING)
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
