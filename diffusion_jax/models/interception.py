"""The one mechanism that opens networks: edits of named modules, entered inside the applied function.

`intercepted(network, *edits)` runs a network whose code knows nothing of it with some of its modules changed: read
(`taps`), replaced (`override`, `edit`), scaled (`gates`), skipped and remembered (`cached`), cut short (`exits`), or
run with other weights (`reweighted`, `adapters.lora`). Blocks are scanned over depth and share one trace and one
path, so what differs from layer to layer is *data*: collections with the paths of the network's parameters and a
leading depth axis. Three kinds of collections:

    state and data   made by `init`, handed to `apply`, which returns them updated: caches, policies, gates, weights
    reports          what a call has to tell, in its `extras`: taps
    `flow`           passes from block to block within a call, which it begins as zeros, and is in its `extras` at the
                     end: which samples have left

A skipped computation is really skipped: `nn.cond` becomes an HLO conditional. Where several edits select the same
module, the first in the list is the outermost.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.layers.branches import CARRIED
from diffusion_jax.models.network import dropout_rngs
from diffusion_jax.typing import Network

Select = str | tuple[str, ...] | Callable[[nn.Module], bool]
"""Which modules: a pattern on the end of the path ("cross_attention", "blocks/*/mlp", "attend"), several of them, each
of which must select something, or a test of the module."""

_FLOW_START = "flow_start"


class Edit(NamedTuple):
    """A change of the modules that `select` selects.

    apply: (site, *args) -> output, in place of the module's call; see `Site`.
    collections: those that the edit reads or writes; reports: those that it only writes.
    skips: whether it may leave modules out (`Site.run_if`): what they would have reported is then zero.
    """

    select: Select
    apply: Callable[..., Any]
    collections: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()
    skips: bool = False


class Site:
    """A module at the moment it is called: what an edit works with."""

    def __init__(self, module: nn.Module, run: Callable[..., Any], initialising: bool):
        self.module = module
        self.initialising = initialising
        self._run = run
        self._outputs = []

    def run(self, *args):
        """The module's own output (with the edits that come later in the list).

        While collections are being made it is computed once and given again: flax lets a module run only once.
        """
        if not self.initialising:
            return self._run(self.module, *args)
        if not self._outputs:
            self._outputs.append(self._run(self.module, *args))
        return self._outputs[0]

    def run_if(self, predicate, otherwise: Callable[..., Any], *args):
        """`run(*args)` where the scalar `predicate` is True, else `otherwise(*args)`; only one of them is computed.

        Both have the same structure and shapes; the dtypes are those of `otherwise`.
        """
        if self.initialising or self._measuring:
            return self.run(*args)
        kinds = jax.eval_shape(otherwise, *args)
        return nn.cond(
            predicate,
            lambda module, *inputs: jax.tree.map(lambda a, b: a.astype(b.dtype), self._run(module, *inputs), kinds),
            lambda module, *inputs: otherwise(*inputs),
            self.module,
            *args,
        )

    def run_with(self, params: Mapping[str, Any], *args):
        """The output of a module without submodules under other parameters."""
        variables = {**self.module.variables, "params": params}
        return self._run(self.module.clone(parent=None, name=None).bind(variables), *args)

    @property
    def params(self) -> Mapping[str, Any]:
        """The module's parameters, of this layer."""
        return self.module.variables.get("params", {})

    def get(self, collection: str, name: str, start: Callable[[], Any]) -> Any:
        """This layer's entry of a collection; `start()` when the collections are being made.

        Of the collection `flow` only the shape and dtype of `start()` count: a call begins with zeros.
        """
        if self.module.has_variable(collection, name):
            return self.module.get_variable(collection, name)
        if not (self._measuring if collection == CARRIED else self.initialising):
            path = "/".join((*self.module.path, name))
            raise InvalidInput(f"The collection {collection!r} lacks {path}: make it with init.")
        value = jax.tree.map(jnp.asarray, start())
        self.module.put_variable(_FLOW_START if collection == CARRIED else collection, name, value)
        return value

    def put(self, collection: str, name: str, value: Any) -> None:
        """Writes this layer's entry of a collection."""
        if not (self._measuring and collection == CARRIED):
            self.module.put_variable(collection, name, value)

    @property
    def _measuring(self) -> bool:
        """Whether this call is made to see which collections there are."""
        return self.module.is_mutable_collection(_FLOW_START)

    def key(self) -> Any:
        """A random key of this layer, while the collections are being made."""
        return self.module.make_rng("edits")


class Opened(NamedTuple):
    """A linen module with edits that belong to it: the `module` of a network made by `Intercepted.network`."""

    module: nn.Module
    edits: tuple[Edit, ...]


class Intercepted(NamedTuple):
    """A network with edits, as pure functions.

    init: (key, params, x, t, cond) -> collections
    apply: (params, collections, x, t, cond, train=False, key=None) -> (output, extras, collections)
    network: the same as a `Network`, whose parameters are `{"params": params, **collections}`; writes to the
        collections are dropped. It can be intercepted again.
    """

    init: Callable[..., dict[str, Any]]
    apply: Callable[..., tuple[Any, dict, dict[str, Any]]]
    network: Network


def intercepted(network: Network, *edits: Edit) -> Intercepted:
    """Opens `network` (or a network that is open already, whose own edits then are the inner ones) for `edits`.

    Raises InvalidInput if the network is not made from a module; its functions do when a pattern selects nothing.
    """
    if isinstance(network.module, Opened):
        module, inner = network.module
    elif isinstance(network.module, nn.Module):
        module, inner = network.module, ()
    else:
        raise InvalidInput("intercepted needs a network made from a module: network.module is missing.")
    state = tuple(dict.fromkeys(name for one in edits for name in one.collections if name != CARRIED))
    flows = any(CARRIED in one.collections for one in (*edits, *inner))
    kept = {name for one in inner for name in one.collections if name != CARRIED}
    reports = tuple(name for one in (*edits, *inner) for name in one.reports)
    if clash := sorted(kept & set(state)):
        raise InvalidInput(f"The collections {', '.join(clash)} are used by the network already: name others.")

    def variables(params):
        return dict(params) if inner else {"params": params}

    def run(given, mutable, initialising, rngs, *args):
        every = tuple(one._replace(apply=partial(_enter, one.apply, initialising)) for one in edits)
        every += tuple(one._replace(apply=partial(_enter, one.apply, False)) for one in inner)
        matched, seen = set(), set()
        with nn.intercept_methods(_dispatcher(every, matched, seen)):
            result = module.apply(given, *args, rngs=rngs, mutable=mutable)
        # The inner ones were checked where they were made, and may stand in what these leave out.
        for index, one in enumerate(edits):
            for pattern in _patterns(one.select):
                if (index, pattern) not in matched:
                    raise InvalidInput(f"select={pattern!r} selects no module; there are {', '.join(sorted(seen))}.")
        return result

    @jax.jit
    def start(key, params, x, t, cond):
        rngs = {"edits": key}
        _, made = run(variables(params), [*state, *reports, _FLOW_START], True, rngs, x, t, cond, False)
        return {name: made[name] for name in (*state, *reports, _FLOW_START) if name in made}

    def init(key, params, x, t, cond=None):
        made = start(key, params, x, t, cond)
        return {name: made[name] for name in state if name in made}

    def apply(params, collections, x, t, cond=None, train=False, key=None):
        mutable = [*state, *reports, CARRIED]
        given = {**variables(params), **collections}
        if flows or (reports and any(one.skips for one in (*edits, *inner))):
            # Both sides of a conditional must report, so there has to be something where nothing was computed.
            shapes = jax.eval_shape(start, jax.random.key(0), params, x, t, cond)
            empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            given |= {name: empty[name] for name in reports}
            # Recorded once per layer, but passed from one to the next.
            given[CARRIED] = jax.tree.map(lambda leaf: leaf[0], empty.get(_FLOW_START, {}))
        (output, extras), new = run(given, mutable, False, dropout_rngs(key), x, t, cond, train)
        told = {name: new[name] for name in (*reports, CARRIED) if name in new}
        collections = {name: new[name] if name in new and name in state else collections[name] for name in collections}
        return output, {**extras, **told}, collections

    def network_init(key, x, t, cond=None):
        first, second = jax.random.split(key)
        params = network.init(first, x, t, cond)
        return {**variables(params), **init(second, params, x, t, cond)}

    def network_apply(params, x, t, cond=None, train=False, key=None):
        collections = {name: params[name] for name in params if name not in variables(params) or name in state}
        own = {name: params[name] for name in params if name not in collections}
        output, extras, _ = apply(own if inner else own["params"], collections, x, t, cond, train, key)
        return output, extras

    return Intercepted(init, apply, Network(network_init, network_apply, Opened(module, (*edits, *inner))))


def _enter(apply, initialising, run, module, *args):
    return apply(Site(module, run, initialising), *args)


def _dispatcher(edits, matched, seen):
    """One interceptor for all edits. A lifted transformation (`nn.cond`) hands an edit a copy of its module, and
    calling that enters here again: `passing` lets the copy through to its own code."""
    passing = []

    def interceptor(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or (passing and passing[-1] is module):
            return next_fun(*args, **kwargs)
        seen.add("/".join(module.path))
        hits = [
            (index, pattern)
            for index, one in enumerate(edits)
            for pattern in _patterns(one.select)
            if _selects(pattern, module)
        ]
        if not hits:
            return next_fun(*args, **kwargs)
        matched.update(hits)

        def run(target, *inputs):
            if target is module:
                return next_fun(*inputs, **kwargs)
            passing.append(target)
            try:
                return target(*inputs, **kwargs)
            finally:
                passing.pop()

        for index in sorted({index for index, _ in hits}, reverse=True):
            run = partial(edits[index].apply, run)
        return run(module, *args)

    return interceptor


def _patterns(select: Select) -> tuple:
    return select if isinstance(select, tuple) else (select,)


def _selects(pattern: str | Callable[[nn.Module], bool], module: nn.Module) -> bool:
    if callable(pattern):
        return pattern(module)
    parts = pattern.split("/")
    ending = module.path[len(module.path) - len(parts) :]
    return len(ending) == len(parts) and all(fnmatchcase(name, part) for name, part in zip(ending, parts))


def by_path(collection: Mapping[str, Any]) -> dict[str, Any]:
    """A collection as `{"blocks/block/attention/output": array}`."""
    leaves = jax.tree_util.tree_leaves_with_path(collection)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def depth_axes(collection: Mapping[str, Any]) -> Any:
    """How many leading axes of each leaf are depth: 1 within a stack of blocks, 0 elsewhere."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sum(getattr(part, "key", None) == "block" for part in path), collection
    )


def per_layer(collection: Any, values: Any) -> Any:
    """A collection whose every entry is filled with `values`, one per layer `[L]` (or one scalar for all)."""
    values = jnp.asarray(values)

    def filled(leaf):
        return jnp.broadcast_to(values.reshape(values.shape + (1,) * (leaf.ndim - values.ndim)), leaf.shape).astype(
            leaf.dtype
        )

    return jax.tree.map(filled, collection)
