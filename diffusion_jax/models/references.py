"""Reference images that a network attends to, encoded once for a whole run (FastFit, Chong et al. 2025).

The network itself encodes them: a reference k passes through all its layers as an image of its own, with a learned
embedding of what kind of item it is in the place of the time's, and behind an input layer of its own. At every
self-attention layer, with that layer's projections,

    reference k:  Attn(q_k, k_k, v_k);      x:  Attn(q_x, [k_1 .. k_K, k_x], [v_1 .. v_K, v_x])                (1)

(semi-attention), so keys and values of the references depend neither on t nor on x nor on each other, and caching them
changes nothing. All of this is interception, for any U-Net or diffusion transformer; other conditions stay as they are.
`coupled` is the usual way, in which everything sees everything and references know the time; nothing can be cached.

    forms = referenced(network, items=5)                       # train forms.encoding on cond with `REFERENCES`
    told = cache_references(forms, params, cond, null=True)    # K passes, once for a whole run of any solver
    denoiser = guided(denoisers.denoiser(forms.cached, process), 2.5, null=null_cache)
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.models.anatomy import anatomy_of, module_params
from diffusion_jax.models.edits import of_condition
from diffusion_jax.models.interception import ByAnatomy, Edit, intercepted, located, wrapped
from diffusion_jax.models.layers.attention import Attend, key_mask
from diffusion_jax.models.paths import at_path
from diffusion_jax.typing import Anatomy, Network, Params

REFERENCES = ("references", "items", "present")
"""What `cond` says of references: float `[B, K, H, W, C]`, like x but for channels that they lack, which are zero;
int `[B, K]`, the kind of each; bool `[B, K]`, whether it is there at all: what is absent is seen by nobody."""

FORMS = ("cached", "encoding", "joint", "coupled")
"""The networks of a `Referenced`."""

_KEPT = "reference_kv"


class ReferenceCache(NamedTuple):
    """Keys and values of K references: a pytree whose every axis of the batch is the first, so it goes into `cond`.

    layers: in the tree of the network's attention modules, `keys` and `values` `[B, depth, K, N, H, D]`.
    present: `[B, K]`; attention is masked, so a place that is False may hold anything.
    """

    layers: Any
    present: Bool[Array, "B K"]


class Referenced(NamedTuple):
    """A network with references. Parameters are `{"network": ..., "references": ...}` for all of these.

    encode: (params, references, items, present, cond=None) -> ReferenceCache   K passes of the network, once
    cached: the network whose `cond["cache"]` is a `ReferenceCache`       no pass for references
    encoding: the network whose `cond` has `REFERENCES`                   the same with K passes in each call
    joint: the same function as `encoding` as one pass over x and references: the masked forward. It reports its
        references' keys and values as `extras["cache"]`.
    coupled: `joint` without the mask and with the embedding of time added to that of items, another function.

    Opening `cached` and `encoding` enters at the pass of x; `joint` and `coupled` are opened before, by `referenced` of
    the opened network.
    """

    encode: Callable[..., ReferenceCache]
    cached: Network
    encoding: Network
    joint: Network
    coupled: Network


def referenced(network: Network, items: int, concat: bool = False) -> Referenced:
    """`network`, a `unet` or `dit` (or one opened for LoRA and the like), with references of so many kinds. Any other
    whose anatomy says how x and the time enter is one too.

    concat: whether all forms read `cond["concat"]` behind x, see `concatenating`: for a network that has no channels of
        its own for it.
    Conditions other than references are the network's own (they enter the vector of reference tokens as well, where
    they are part of it): in `encode` they are `cond`. Where the network has channels for `cond["concat"]`, those of
    the references are zero. Guidance, for which the references' pixels are zeroed and their kinds kept:
    `guided(denoiser, null={"references": 0.0})` in front of `encoding`, or `null_cache` in front of `cached`.

    Raises InvalidInput for other networks and fewer than one kind; its functions do for references that do not fit.
    """
    anatomy = anatomy_of(network)
    if anatomy.axes != 4 or not (anatomy.entrance and anatomy.time and anatomy.width):
        raise InvalidInput(
            "referenced needs a unet or a dit, or a network of images whose anatomy has axes=4, entrance, time, width."
        )
    first, width, patch, channels = anatomy.entrance, anatomy.width, anatomy.patch, anatomy.concat
    if items < 1:
        raise invalid("items", items, "at least one kind of references is needed")

    def checked(params, references, items, present):
        """The same with as many channels as the input layer has."""
        kernel, given = params["references"]["input"]["kernel"].shape, references.shape[-1]
        taken = kernel[-2] // patch**2 - channels
        if references.ndim != 5 or given > taken:
            raise invalid("references.shape", references.shape, f"[B, K, H, W, C] with at most {taken} channels fits")
        for name, value in (("items", items), ("present", present)):
            if value.shape != references.shape[:2]:
                raise invalid(f"{name}.shape", value.shape, f"[B, K], here {references.shape[:2]}, fits")
        return jnp.pad(references, ((0, 0),) * 4 + ((0, taken - given),)), items, present

    def encode(params, references, items, present, cond=None):
        references, items, present = checked(params, references, items, present)
        batch, count, *_ = references.shape
        own = _own({name: value for name, value in (cond or {}).items() if name != "concat"}, count, 0)
        rows = references.reshape(batch * count, *references.shape[2:])
        if channels:
            own["concat"] = jnp.zeros((*rows.shape[:3], channels), rows.dtype)
        told = params["references"]

        def enter(site, h):
            return site.run_with(told["input"], h)

        def know(site, t, *added):
            return told["item"][items.reshape(-1)]

        def attend(site, q, k, v, mask):
            _report(site, k, v)
            return site.run(q, k, v, mask)

        edits = _references_pass(enter, know, attend)
        kept = _asked(network, edits, params, rows, jnp.zeros(len(rows)), own)[1][_KEPT]
        return ReferenceCache(jax.tree.map(lambda leaf: _opened(leaf, count), kept), present)

    def read(inner, params, x, t, cond, train, key):
        cond = dict(cond or {})
        if "cache" not in cond:
            raise InvalidInput(f"cond has {sorted(cond)}, but this network needs cond['cache'], made by encode.")
        cache, own = cond["cache"], _own(cond)

        def attend(site, q, k, v, _):
            past = (site.module.get_variable(_KEPT, name) for name in ("keys", "values"))
            keys, values = (_joined(old, new) for old, new in zip(past, (k, v), strict=True))
            seen = jnp.repeat(cache.present, (keys.shape[1] - k.shape[1]) // cache.present.shape[1], axis=1)
            seen = jnp.concatenate([seen, jnp.ones(k.shape[:2], bool)], axis=1)
            return site.run(q, keys, values, key_mask(seen))

        layers = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), cache.layers)
        edits = (Edit(_sees_itself, attend, (_KEPT,)),)
        return inner(params["network"], x, t, own or None, train, key, edits=edits, collections={_KEPT: layers})

    def read_anew(inner, params, x, t, cond, train, key):
        references, items, present = _given(cond)
        kept = encode(params, references, items, present, cond)
        return read(inner, params, x, t, {**_own(cond), "cache": kept}, train, key)

    def together(coupled, params, x, t, cond, train, key):
        references, items, present = checked(params, *_given(cond))
        batch, count, *_ = references.shape
        groups = count + 1
        own = _own(cond, groups, 1)
        if channels:
            own["concat"] = _rows(cond["concat"], jnp.zeros((batch, count, *cond["concat"].shape[1:])))
        told = params["references"]
        visible = _visible(present, coupled)

        def enter(site, h):
            h = h.reshape(batch, groups, *h.shape[1:])
            ours, theirs = h[:, 0], h[:, 1:].reshape(batch * count, *h.shape[2:])
            theirs = site.run_with(told["input"], theirs)
            return _rows(site.run(ours), theirs.reshape(batch, count, *theirs.shape[1:]))

        def know(site, t, *added):
            vector = site.run(t, *added).reshape(batch, groups, width)
            kinds = told["item"][items].astype(vector.dtype)
            return _rows(vector[:, 0], vector[:, 1:] + kinds if coupled else kinds)

        def attend(site, q, k, v, _):
            _report(site, *(a.reshape(batch, groups, *a.shape[1:])[:, 1:].reshape(-1, *a.shape[1:]) for a in (k, v)))
            tokens = q.shape[1]
            merged = (a.reshape(batch, groups * tokens, *a.shape[2:]) for a in (q, k, v))
            mask = jnp.repeat(jnp.repeat(visible, tokens, axis=1), tokens, axis=2)[:, None]
            return site.run(*merged, mask).reshape(v.shape)

        rows = _rows(x, references.astype(x.dtype))
        times = jnp.repeat(jnp.broadcast_to(t, (batch,)), groups)
        edits = _references_pass(enter, know, attend)
        output, extras = _asked(network, edits, params, rows, times, own, train, key)
        kept = extras.pop(_KEPT)
        extras = jax.tree.map(lambda leaf: leaf.reshape(batch, groups, *leaf.shape[1:])[:, 0], extras)
        cache = ReferenceCache(jax.tree.map(lambda leaf: _opened(leaf, count), kept), present)
        return output.reshape(batch, groups, *output.shape[1:])[:, 0], {**extras, "cache": cache}

    def init(key, x, t, cond=None):
        keys = jax.random.split(key, 3)
        own = _own(cond) or None
        params, other = network.init(keys[0], x, t, own), network.init(keys[1], x, t, own)
        layer = at_path(module_params(network, other), first)
        # Gates start at zero and grow with this vector: with a small one references would be deaf for long.
        item = jax.random.normal(keys[2], (items, width))
        return {"network": params, "references": {"input": layer, "item": item}}

    # Rows are references as well as samples, and what an image enters through is not where x does.
    beyond = anatomy._replace(entrance="")

    def one_pass(around):
        return wrapped(network, around, init, ("network",), beyond, (_KEPT,))

    def whole(coupled):
        def apply(params, x, t, cond=None, train=False, key=None):
            return together(coupled, params, x, t, cond, train, key)

        return Network(init, apply)

    networks = one_pass(read), one_pass(read_anew), whole(False), whole(True)
    return Referenced(encode, *(concatenating(one) if concat else one for one in networks))


def with_references(network: Network, items: int, form: str = "encoding", concat: bool = False) -> Network:
    """One of the forms of `referenced`, `FORMS`: what a config trains. Raises InvalidInput for another name."""
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    return getattr(referenced(network, items, concat), form)


def cache_references(forms: Referenced, params: Params, cond: Mapping[str, Any], null: bool = False) -> dict[str, Any]:
    """`cond` with its `REFERENCES` encoded, as `cond["cache"]`: the condition of `forms.cached` in all steps of a run.

    null: also `cond["null_cache"]`, the same kinds of references with zeros for pixels, for guidance by `null_cache`.
    """
    references, items, present = _given(cond)
    own = _own(cond)
    told = {**own, "cache": forms.encode(params, references, items, present, own)}
    if null:
        told["null_cache"] = forms.encode(params, jnp.zeros_like(references), items, present, own)
    return told


def null_cache(cond: dict) -> dict:
    """The condition with `cond["null_cache"]`, made of zeroed references, in the place of `cond["cache"]`: a null for
    `denoisers.guided`."""
    return {**cond, "cache": cond["null_cache"]}


def concatenating(network: Network) -> Network:
    """`network` whose input is x and behind it the channels of `cond["concat"] [B, H, W, C]`; its output is for x.

    What a U-Net has as `concat`, for a network that answers with as many channels as it is given: mask and image of
    inpainting, say. Raises InvalidInput for a condition without it.
    """

    def split(x, cond):
        cond = dict(cond or {})
        if "concat" not in cond:
            raise InvalidInput(f"cond has {sorted(cond)}, but this network needs cond['concat'].")
        others = cond.pop("concat")
        return jnp.concatenate([x, others.astype(x.dtype)], axis=-1), cond or None

    def init(key, x, t, cond=None):
        x, cond = split(x, cond)
        return network.init(key, x, t, cond)

    def around(inner, params, x, t, cond, train, key):
        channels = x.shape[-1]
        x, cond = split(x, cond)
        output, extras = inner(params, x, t, cond, train, key)
        return output[..., :channels], extras

    anatomy = network.anatomy and network.anatomy._replace(entrance="")
    return wrapped(network, around, init, anatomy=anatomy)


@ByAnatomy
def _sees_itself(module: nn.Module, anatomy: Anatomy | None) -> bool:
    """Whether `module` is the product attention of a self-attention layer of the network (not of its text encoder)."""
    self_attention = isinstance(module, Attend) and module.path[-3:-1] == ("attention", "attention")
    return self_attention and not of_condition(module, anatomy)


def _references_pass(enter, know, attend):
    """The input layer, the embedding of time and self-attention, replaced."""
    entrance, time = located(lambda anatomy: anatomy.entrance), located(lambda anatomy: anatomy.time)
    return Edit(entrance, enter), Edit(time, know), Edit(_sees_itself, attend, (), (_KEPT,))


def _asked(network, edits, params, x, t, cond, *training):
    """`(output, extras)` of the network within, with these edits."""
    return intercepted(network, *edits).apply(params["network"], {}, x, t, cond or None, *training)[:2]


def _report(site, k, v):
    site.put(_KEPT, "keys", k)
    site.put(_KEPT, "values", v)


def _given(cond):
    cond = cond or {}
    if missing := [name for name in REFERENCES if name not in cond]:
        raise InvalidInput(f"cond has {sorted(cond)}, but lacks {', '.join(missing)} of the references.")
    return tuple(jnp.asarray(cond[name]) for name in REFERENCES)


def _own(cond, rows=1, offset=0):
    """What the network itself is told, for `rows` images of each sample."""
    taken = (*REFERENCES, "cache", "null_cache")
    own = {name: value for name, value in (cond or {}).items() if name not in taken}
    return own if rows == 1 and not offset else jax.tree.map(lambda leaf: jnp.repeat(leaf, rows, axis=0), own)


def _rows(ours: Float[Array, "B ..."], theirs: Float[Array, "B K ..."]) -> Float[Array, "R ..."]:
    """Images of x and its references one after the other, sample by sample: `[B (1 + K), ...]`."""
    both = jnp.concatenate([ours[:, None], theirs.astype(ours.dtype)], axis=1)
    return both.reshape(-1, *both.shape[2:])


def _opened(leaf, count):
    """`[depth, B K, N, H, D]` as a cache has it, `[B, depth, K, N, H, D]`."""
    return jnp.moveaxis(leaf.reshape(leaf.shape[0], -1, count, *leaf.shape[2:]), 0, 1)


def _joined(past, new):
    """Keys (or values) of references `[B, K, N, H, D]` before those of x `[B, M, H, D]`."""
    past = past.reshape(len(new), -1, *new.shape[2:]).astype(new.dtype)
    return jnp.concatenate([past, new], axis=1)


def _visible(present: Bool[Array, "B K"], coupled: bool) -> Bool[Array, "B G G"]:
    """Which image sees which, x the first: by (1), or (`coupled`) all that are there; each sees itself."""
    there = jnp.concatenate([jnp.ones((len(present), 1), bool), present], axis=1)
    itself = jnp.eye(there.shape[1], dtype=bool)
    by_x = jnp.arange(there.shape[1])[:, None] == 0
    return itself | (there[:, None, :] & (by_x | coupled))
