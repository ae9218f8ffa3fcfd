"""Training of a part: some parameters learn, the others stay as they are.

The optimiser, the averages, the gradients and the checkpoints are those of the part alone; what does not learn is
`typing.Frozen` in the objective's state, of which a checkpoint keeps fingerprints.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from diffusion_jax.distributed import path_name
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.objectives.batches import refuse_gradient
from diffusion_jax.typing import Frozen, Objective, Params


class PartState(NamedTuple):
    """frozen: what does not learn. inner: the state of the objective itself."""

    frozen: Frozen
    inner: Any


def with_frozen(objective: Objective, params: Mapping[str, Any], trained: str | Sequence[str]) -> Objective:
    """`objective` on `{**params, trained: learned}`, of which only `learned` is trained.

    params: entries that do not learn, such as `{"params": base}`. trained: the name of the entry that does, "lora" for
    the factors of `adapters.lora`, whose network takes both; of several names, `("lora", "mixers")`, what learns is a
    dict with these entries. Gradients do not flow into `params`.
    Raises InvalidInput where `trained` is among `params`.
    """
    refuse_gradient(objective, "with_frozen")
    names = (trained,) if isinstance(trained, str) else tuple(trained)
    for name in names:
        if name in params:
            raise invalid("trained", name, f"it must not be among what is frozen: {', '.join(params)}")

    def whole(learned, frozen):
        entries = {trained: learned} if isinstance(trained, str) else {name: learned[name] for name in names}
        return {**jax.lax.stop_gradient(frozen), **entries}

    def init(key, learned, batch):
        return PartState(Frozen(dict(params)), objective.init(key, whole(learned, params), batch))

    def loss(learned, state, batch, key):
        losses, aux = objective.loss(whole(learned, state.frozen.value), state.inner, batch, key)
        return losses, aux._replace(state=PartState(state.frozen, aux.state))

    prepare = objective.prepare
    return Objective(init, loss, prepare and (lambda state, batch, key: prepare(state.inner, batch, key)))


class TrainedPart(NamedTuple):
    """Training of some of the arrays of a network's parameters.

    objective: of the chosen arrays alone. init: `key -> chosen arrays` as they are now: `init_params` of
    `training.train`. whole: `chosen arrays -> parameters` of the network.
    """

    objective: Objective
    init: Callable[[Any], Params]
    whole: Callable[[Params], Params]


def trained_part(objective: Objective, params: Params, chosen: Callable[[str], bool]) -> TrainedPart:
    """`objective` of the parameters `params`, of which those learn whose path is `chosen`; the others are frozen.

    chosen: a function of a path such as "blocks/block/attention/q/kernel": `lambda path: "attention" in path`.
    What learns is a dict like `params` with the chosen arrays alone. Raises InvalidInput where none or all are chosen.
    """
    refuse_gradient(objective, "trained_part")
    named = jax.tree_util.tree_flatten_with_path(params)[0]
    taken = [path_name(path) for path, _ in named if chosen(path_name(path))]
    if len(taken) in (0, len(named)):
        told = "none" if not taken else "all"
        raise InvalidInput(f"chosen takes {told} of the {len(named)} arrays, such as {path_name(named[0][0])}.")
    learned, frozen = (_picked(params, lambda path, which=which: (path in taken) == which) for which in (True, False))

    def init(key, trained, batch):
        return PartState(Frozen(frozen), objective.init(key, _joined(trained, frozen), batch))

    def loss(trained, state, batch, key):
        whole = _joined(trained, jax.lax.stop_gradient(state.frozen.value))
        losses, aux = objective.loss(whole, state.inner, batch, key)
        return losses, aux._replace(state=PartState(state.frozen, aux.state))

    prepare = objective.prepare
    part = Objective(init, loss, prepare and (lambda state, batch, key: prepare(state.inner, batch, key)))
    return TrainedPart(part, lambda key: learned, lambda trained: _joined(trained, frozen))


def _picked(tree: Any, chosen: Callable[[str], bool], prefix: str = "") -> Any:
    """A nested dict with the chosen leaves alone, and no empty dicts."""
    found = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        if isinstance(node, Mapping):
            inner = _picked(node, chosen, f"{path}/")
            found |= {name: inner} if inner else {}
        elif chosen(path):
            found[name] = node
    return found


def _joined(one: Any, other: Any) -> Any:
    """Two nested dicts without a common leaf as one, in the order of their names."""
    return {
        name: _joined(one[name], other[name]) if name in one and name in other else one.get(name, other.get(name))
        for name in sorted({*one, *other})
    }
