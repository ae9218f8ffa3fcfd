"""Interception: changes modules of a network from outside, without changing its code.

`intercepted(network, *edits)` runs a network with some of its modules read (`taps`), replaced (`override`, `edit`),
scaled (`gates`), skipped and cached (`cached`), left early (`exits`), or run with other weights (`reweighted`,
`adapters.lora`). Blocks are scanned over depth and share one trace and one
path, so what differs from layer to layer is *data*: collections with the paths of the network's parameters and a
leading depth axis. Three kinds of collections:

    state and data   made by `init`, handed to `apply`, which returns them updated: caches, policies, gates, weights
    reports          what a call has to tell, in its `extras`: taps
    `flow`           passes from block to block within a call, which it begins as zeros, and is in its `extras` at the
                     end: which samples have left

A skipped computation is really skipped: `nn.cond` becomes an HLO conditional. Where several edits select the same
module, the first in the list is the outermost.

Networks may stand within others (`wrapped`): edits enter at the module within, and whatever stands around it, its
conditions, its parameters, its own edits, stays in force.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.anatomy import collects
from diffusion_jax.models.layers.branches import CARRIED
from diffusion_jax.models.network import dropout_rngs
from diffusion_jax.typing import Anatomy, Inside, Network

Select = str | tuple[str | Callable[[nn.Module], bool], ...] | Callable[[nn.Module], bool]
"""Which modules: a pattern on the end of the path ("cross_attention", "blocks/*/mlp", "attend"), several of them, each
of which must select something, or a test of the module, which may be a `ByAnatomy`."""

_FLOW_START = "flow_start"
_LEFT = "collections behind the call"


@dataclass(frozen=True)
class ByAnatomy:
    """A test of a module that also depends on what is known of the network: `test(module, anatomy or None)`.

    path: of the module that it selects, of an anatomy, where it is one.
    """

    test: Callable[[nn.Module, Anatomy | None], bool]
    path: Callable[[Anatomy], str] | None = None

    def __call__(self, module: nn.Module, anatomy: Anatomy | None = None) -> bool:
        return self.test(module, anatomy)


def located(path: Callable[[Anatomy], str]) -> ByAnatomy:
    """Selects the module at a path that the anatomy knows."""

    def test(module, anatomy):
        return bool(module.path) and anatomy is not None and "/".join(module.path) == path(anatomy)

    return ByAnatomy(test, path)


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

    def run_with(self, params: Mapping[str, Any], *args, **fields):
        """The output of a module without submodules under other parameters, and with other `fields` of its own."""
        variables = {**self.module.variables, "params": params}
        return self._run(self.module.clone(parent=None, name=None, **fields).bind(variables), *args)

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
        made = _FLOW_START if collection == CARRIED else collection
        if not self.module.is_mutable_collection(made):
            path = "/".join((*self.module.path, name))
            raise InvalidInput(f"The collection {collection!r} cannot hold {path}: another edit runs it by itself.")
        value = jax.tree.map(jnp.asarray, start())
        self.module.put_variable(made, name, value)
        return value

    def put(self, collection: str, name: str, value: Any) -> None:
        """Writes this layer's entry of a collection, where the call hands it on."""
        if self.module.is_mutable_collection(collection) and not (self._measuring and collection == CARRIED):
            self.module.put_variable(collection, name, value)

    @property
    def _measuring(self) -> bool:
        """Whether this call is made to see which collections there are."""
        return self.module.is_mutable_collection(_FLOW_START)

    def key(self) -> Any:
        """A random key of this layer, while the collections are being made."""
        return self.module.make_rng("edits")


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


def wrapped(
    network: Network,
    around: Callable[..., tuple[Any, dict]],
    init: Callable[..., Any] | None = None,
    at: tuple[str, ...] = (),
    anatomy: Anatomy | None = None,
    collections: tuple[str, ...] = (),
) -> Network:
    """The network with something around it, which can be opened as well as the network itself:

        def around(inner, params, x, t, cond, train, key):
            return inner(params["network"], x, t, {"pooled": ...}, train, key)      # -> (output, extras)

        wrapped(network, around, init=lambda key, x, t, cond=None: {"network": ..., ...}, at=("network",))

    inner: `network.apply`, or the same with edits entered in its module; it takes further `edits=`, and `collections=`
        that those read, and what it says in `extras` has to be handed on. It is to be called once.
    init: `(key, x, t, cond) -> params`; the network's own when absent. at: the keys under which the network's
        parameters lie in these. anatomy: where it is another than the network's. collections: of `edits` given to it.
    """
    inside = network.inside

    def apply(params, x, t, cond=None, train=False, key=None):
        def inner(params, x, t, cond=None, train=False, key=None, *, edits=(), collections=None):
            if edits:
                opened = intercepted(network, *edits)
                return opened.apply(params, collections or {}, x, t, cond, train, key)[:2]
            return network.apply(params, x, t, cond, train=train, key=key)

        return around(inner, params, x, t, cond, train, key)

    way = Network(init or network.init, apply, network.module, anatomy or network.anatomy)
    if inside is None:
        return way

    def run(call, params, x, t, cond, train, key):
        def inner(params, x, t, cond=None, train=False, key=None, *, edits=(), collections=None):
            ours = _resolved(edits, network.anatomy)

            def passed(variables, theirs, *inputs):
                return call({**variables, **(collections or {})}, (*ours, *theirs), *inputs)

            return inside.run(passed, params, x, t, cond, train, key)

        return around(inner, params, x, t, cond, train, key)

    return way._replace(inside=Inside(run, (*at, *inside.weights), (*collections, *inside.collections)))


def intercepted(network: Network, *edits: Edit) -> Intercepted:
    """Opens `network` (whose own edits, where it has some, then are the inner ones) for `edits`.

    Raises InvalidInput if there is no module within the network; its functions do when a pattern selects nothing.
    """
    module, inside = network.module, network.inside
    if module is None or inside is None:
        raise InvalidInput("intercepted needs a network made from a module: network.module is missing.")
    edits = _resolved(edits, network.anatomy)
    state = tuple(dict.fromkeys(name for one in edits for name in one.collections if name != CARRIED))
    if clash := sorted(set(inside.collections) & set(state)):
        raise InvalidInput(f"The collections {', '.join(clash)} are used by the network already: name others.")
    joined = collects(network)

    def through(call, params, *inputs):
        """`(output, extras, what is left in the collections)` of the network with `call` in place of its module."""
        answer = inside.run(call, params, *inputs)
        if not (isinstance(answer, tuple) and len(answer) == 2 and _LEFT in answer[1]):
            raise InvalidInput(
                "What stands around the network does not return (output, extras), with the extras of what it calls, "
                "so it cannot be opened."
            )
        output, extras = answer
        return output, {name: extras[name] for name in extras if name != _LEFT}, extras[_LEFT]

    def run(variables, inner, mutable, initialising, rngs, *inputs):
        every = tuple(one._replace(apply=partial(_enter, one.apply, initialising)) for one in edits)
        every += tuple(one._replace(apply=partial(_enter, one.apply, False)) for one in inner)
        matched, seen = set(), set()
        with nn.intercept_methods(_dispatcher(every, matched, seen)):
            result = module.apply(variables, *inputs, rngs=rngs, mutable=mutable)
        # The inner ones were checked where they were made, and may stand in what these leave out.
        for index, one in enumerate(edits):
            for pattern in _patterns(one.select):
                if (index, pattern) not in matched:
                    raise InvalidInput(
                        f"select={_name(pattern)} selects no module; there are {', '.join(sorted(seen - {''}))}."
                    )
        return result

    def begun(variables, inner, key, x, t, cond):
        """What the collections and reports are at first."""
        mutable = [*state, *_reports(edits, inner), _FLOW_START]
        return run(variables, inner, mutable, True, {"edits": key}, x, t, cond, False)

    @jax.jit
    def start(key, params, x, t, cond):
        def call(variables, inner, x, t, cond, train, _):
            (output, extras), made = begun(variables, inner, key, x, t, cond)
            return output, {**extras, _LEFT: made}

        return through(call, params, x, t, cond, False, None)[2]

    def init(key, params, x, t, cond=None):
        made = start(key, params, x, t, cond)
        return {name: made[name] for name in state if name in made}

    def apply(params, collections, x, t, cond=None, train=False, key=None):
        def call(variables, inner, x, t, cond, train, key):
            every, reports = (*edits, *inner), _reports(edits, inner)
            given = {**variables, **collections}
            if any(CARRIED in one.collections for one in every) or (reports and any(one.skips for one in every)):
                # Both sides of a conditional must report, so there has to be something where nothing was computed.
                shapes = jax.eval_shape(
                    lambda *inputs: begun(inputs[0], inner, jax.random.key(0), *inputs[1:])[1], variables, x, t, cond
                )
                empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
                given |= {name: empty[name] for name in reports if name in empty}
                # Recorded once per layer, but passed from one to the next.
                given[CARRIED] = jax.tree.map(lambda leaf: leaf[0], empty.get(_FLOW_START, {}))
            mutable = [*state, *reports, CARRIED]
            (output, extras), new = run(given, inner, mutable, False, dropout_rngs(key), x, t, cond, train)
            if silent := [name for name in _reports(edits) if name not in new]:
                raise InvalidInput(
                    f"There is nothing to read in {', '.join(silent)}: another edit runs what is selected, by itself."
                )
            told = {name: new[name] for name in (*reports, CARRIED) if name in new}
            left = {name: new[name] for name in state if name in new}
            return output, {**extras, **told, _LEFT: left}

        output, extras, left = through(call, params, x, t, cond, train, key)
        return output, extras, {name: left.get(name, collections[name]) for name in collections}

    def network_init(key, x, t, cond=None):
        first, second = jax.random.split(key)
        params = network.init(first, x, t, cond)
        return {**(params if joined else {"params": params}), **init(second, params, x, t, cond)}

    def parted(params):
        """The network's own parameters, and the collections."""
        if not isinstance(params, Mapping) or "params" not in params:
            expected = ", ".join(("params", *state))
            raise InvalidInput(
                f"An opened network needs parameters with the entries {expected}: see lora or intercepted."
            )
        collections = {name: params[name] for name in params if name in state or not (joined or name == "params")}
        return {n: params[n] for n in params if n not in collections} if joined else params["params"], collections

    def network_apply(params, x, t, cond=None, train=False, key=None):
        return apply(*parted(params), x, t, cond, train, key)[:2]

    def around(inner, params, x, t, cond, train, key):
        own, collections = parted(params)
        return inner(own, x, t, cond, train, key, edits=edits, collections=collections)

    opened = wrapped(network, around, network_init, () if joined else ("params",), collections=state)
    return Intercepted(init, apply, opened._replace(apply=network_apply))


def _resolved(edits, anatomy):
    """Edits whose selects are those of this network."""

    def known(pattern):
        return partial(pattern, anatomy=anatomy) if isinstance(pattern, ByAnatomy) else pattern

    return tuple(
        one._replace(select=tuple(map(known, one.select)) if isinstance(one.select, tuple) else known(one.select))
        for one in edits
    )


def _name(pattern):
    select = getattr(pattern, "func", None)
    if not isinstance(select, ByAnatomy):
        return getattr(pattern, "__name__", repr(pattern))
    anatomy = pattern.keywords["anatomy"]
    return repr(select.path(anatomy)) if select.path and anatomy else select.test.__name__


def _reports(*groups):
    return tuple(name for edits in groups for one in edits for name in one.reports)


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
