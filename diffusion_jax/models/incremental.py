"""Block by block: causal video networks with the keys and values of past blocks kept.

A cache is an explicit carry, made and changed by pure functions. The network's code is unchanged, since the attention
over time is intercepted. Keys are kept turned to their place within their own block and turned on at
use, so every angle is a distance: block 10 and block 10 000 compute the same numbers. One cache serves one noise level
(a history at the level of the block, Live Avatar's timestep forcing) or, refreshed with clean blocks, all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models.anatomy import anatomy_of
from diffusion_jax.models.interception import Edit, intercepted, located
from diffusion_jax.models.layers.temporal import moved
from diffusion_jax.typing import Network


class KVCache(NamedTuple):
    """What is kept of the past, of constant size: a pytree.

    blocks: a ring of the last w blocks, in the tree of the network's attention modules: `keys` and `values`
        `[depth, B', w, T, H, D]` (T tokens of a block at each of B' places).
    sink: the same of the reference frames, turned to positions 0, 1, ...; or None.
    count: how many blocks were pushed.
    """

    blocks: Any
    sink: Any
    count: Any


class Incremental(NamedTuple):
    """A causal network block by block, as pure functions.

    init: (params, x, cond) -> KVCache                 empty, for blocks like `x [B, block, H, W, C]`; with
                                                       `cond["reference"]` its keys and values, computed once at time 0
    apply: (params, cache, x, t, cond, sink_at=None) -> (output, extras, kept)
                                                       one block, which sees itself, the blocks in the cache and the
                                                       sink; `kept` holds its own keys and values
    push: (cache, kept, keep=True) -> KVCache          the cache one block later, the oldest gone; `keep` may be traced
    """

    init: Callable[..., KVCache]
    apply: Callable[..., tuple[Any, dict, Any]]
    push: Callable[..., KVCache]


def incremental(network: Network, window: int | None = None) -> Incremental:
    """`network`, a `video_dit` with blocks (or what stands around one, LoRA and the like), with kept keys and values.

    window: w, blocks of the past that are kept; the network's own when absent. Evaluating blocks one after the other at
    one level, each pushed after it was evaluated, is the network on the whole clip with its masks.

    The condition is of the block alone (`audio [B, block, M, C]`); the reference is known by its keys. `sink_at`: the
    temporal position of the first reference seen from the block's first frame, a number or traced. When absent it is
    where the reference of a clip that began with block 0 stands; a constant is rolling RoPE (Live Avatar): the
    distance is then the same for every block, however many there were. To replace the sink, `init` anew with another
    reference and take its `sink`. Gradients flow into `kept`: stop them before `push` where the past is given.

    Raises InvalidInput for a network without blocks, one with sinusoidal temporal positions, and where no window is
    known; its functions do for clips that are not one block.
    """
    causal = anatomy_of(network).causal
    if not causal or not causal.block:
        raise InvalidInput(
            "incremental needs a video_dit with blocks, block= at least 1, or another with anatomy.causal."
        )
    if causal.positions == "sincos":
        raise invalid("temporal_positions", "sincos", "incremental needs positions that are distances, 'rotary'")
    window = causal.window if window is None else window
    if window < 1:
        raise invalid("window", window, "a cache of a known number of past blocks is needed")
    select = located(lambda _: causal.attend)

    def turned(keys, by):
        return moved(keys, by, causal.axes) if causal.positions == "rotary" else keys

    def reports(read):
        def apply(site, q, k, v, mask):
            entries = read(q, k, v)
            site.put("kept", "keys", entries[0])
            site.put("kept", "values", entries[1])
            return site.run(q, k, v, mask)

        return Edit(select, apply, (), ("kept",))

    def init(params, x, cond=None):
        _check(x)
        cond = dict(cond or {})
        reference = cond.get("reference")
        t = jnp.zeros(x.shape[:2])

        def sink(reference):
            references = 1 if reference.ndim == 4 else reference.shape[1]
            tokens = references * (_patches(x) if causal.patch else 1)

            def read(q, k, v):
                return turned(k[:, :tokens], -causal.reference_at), v[:, :tokens]

            return intercepted(network, reports(read)).apply(params, {}, x, t, cond)[1]["kept"]

        shapes = jax.eval_shape(
            lambda x, cond: intercepted(network, reports(lambda q, k, v: (k, v))).apply(params, {}, x, t, cond)[1],
            x,
            {name: value for name, value in cond.items() if name != "reference"},
        )["kept"]
        blocks = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:2], window, *leaf.shape[2:]), leaf.dtype), shapes)
        return KVCache(blocks, None if reference is None else sink(reference), jnp.int32(0))

    def apply(params, cache, x, t, cond=None, sink_at=None):
        _check(x)
        cond = {name: value for name, value in (cond or {}).items() if name != "reference"} or None
        if sink_at is None:
            sink_at = causal.reference_at - causal.block * cache.count.astype(jnp.float32)
        age, filled = _ages(cache.count, window)

        def attend(site, q, k, v, mask):
            site.put("kept", "keys", k)
            site.put("kept", "values", v)
            tokens = k.shape[1]
            shown = jnp.ones((tokens,), bool) if mask is None else mask
            past = site.module.get_variable("blocks", "keys"), site.module.get_variable("blocks", "values")
            old_k, old_v = (leaf.reshape(leaf.shape[0], window * tokens, *leaf.shape[3:]) for leaf in past)
            parts = [(turned(old_k, jnp.repeat(-causal.block * age, tokens)), old_v, jnp.repeat(filled, tokens))]
            if cache.sink is not None:
                sink_k, sink_v = (site.module.get_variable("sink", name) for name in ("keys", "values"))
                parts.insert(0, (turned(sink_k, sink_at), sink_v, jnp.ones((sink_k.shape[1],), bool)))
            parts.append((k, v, shown))
            keys, values = (jnp.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))
            seen = jnp.concatenate([part[2] for part in parts])[None, None, None]
            return site.run(q, keys, values, seen)

        collections = {"blocks": cache.blocks}
        if cache.sink is not None:
            collections["sink"] = cache.sink
        opened = intercepted(network, Edit(select, attend, (), ("kept",)))
        output, extras, _ = opened.apply(params, collections, x, t, cond)
        kept = extras.pop("kept")
        return output, extras, kept

    def _check(x):
        if x.ndim != 5 or x.shape[1] != causal.block:
            raise invalid("x.shape", x.shape, f"one block of {causal.block} frames, [B, {causal.block}, H, W, C], fits")

    def _patches(x):
        return (x.shape[2] // causal.patch) * (x.shape[3] // causal.patch)

    return Incremental(init, apply, _push)


def _push(cache: KVCache, kept: Any, keep: Bool[Array, ""] | bool = True) -> KVCache:
    """The cache with one block more, in the place of the oldest; where `keep` is False, as it was."""
    window = jax.tree.leaves(cache.blocks)[0].shape[2]
    slot = cache.count % window

    def put(ring, new):
        old = jax.lax.dynamic_index_in_dim(ring, slot, 2, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(ring, jnp.where(keep, new, old), slot, 2)

    return cache._replace(
        blocks=jax.tree.map(put, cache.blocks, kept), count=cache.count + jnp.asarray(keep, jnp.int32)
    )


def _ages(count, window):
    """How many blocks ago each place of the ring was written, float32 `[w]`, and whether it was."""
    slot = jnp.arange(window)
    age = (count - 1 - slot) % window + 1
    return age.astype(jnp.float32), slot < count
