"""Training of a part: some parameters learn, the others are the objective's state and stay as they are.

So the optimiser, the averages and the gradients are those of the part alone, and a checkpoint still holds everything.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from diffusion_jax.errors import invalid
from diffusion_jax.typing import Objective


class Frozen(NamedTuple):
    """params: what does not learn. inner: the state of the objective itself."""

    params: Any
    inner: Any


def with_frozen(objective: Objective, params: Mapping[str, Any], trained: str | Sequence[str]) -> Objective:
    """`objective` on `{**params, trained: learned}`, of which only `learned` is trained.

    params: entries that do not learn, such as `{"params": base}`. trained: the name of the entry that does, "lora" for
    the factors of `adapters.lora`, whose network takes both; of several names, `("lora", "mixers")`, what learns is a
    dict with these entries. Gradients do not flow into `params`.
    Raises InvalidInput where `trained` is among `params`.
    """
    names = (trained,) if isinstance(trained, str) else tuple(trained)
    for name in names:
        if name in params:
            raise invalid("trained", name, f"it must not be among what is frozen: {', '.join(params)}")

    def whole(learned, frozen):
        entries = {trained: learned} if isinstance(trained, str) else {name: learned[name] for name in names}
        return {**jax.lax.stop_gradient(frozen), **entries}

    def init(key, learned, batch):
        return Frozen(dict(params), objective.init(key, whole(learned, params), batch))

    def loss(learned, state, batch, key):
        losses, aux = objective.loss(whole(learned, state.params), state.inner, batch, key)
        return losses, aux._replace(state=Frozen(state.params, aux.state))

    prepare = objective.prepare
    return Objective(init, loss, prepare and (lambda state, batch, key: prepare(state.inner, batch, key)))
