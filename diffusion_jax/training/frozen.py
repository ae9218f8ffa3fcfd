"""What an objective's state holds that does not learn (`typing.Frozen`): kept apart from what a run saves.

A step is given these trees as one more argument, on the mesh where the rules place them. A checkpoint holds their
fingerprints alone, so a run does not go on with another teacher.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh

from diffusion_jax.distributed import Rules, path_name, shardings
from diffusion_jax.errors import InvalidInput
from diffusion_jax.typing import Batch, Frozen, Objective


def _is_frozen(node: Any) -> bool:
    return isinstance(node, Frozen)


def without_frozen(state: Any) -> Any:
    """The state of an objective with `Frozen(None)` where it holds a frozen tree."""
    return jax.tree.map(lambda node: Frozen(None) if _is_frozen(node) else node, state, is_leaf=_is_frozen)


def complete_state(state: Any, frozen: Mapping[str, Any]) -> Any:
    """The whole state of `without_frozen(state)`, each tree put back where `frozen` names its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, node: Frozen(frozen[path_name(path)]) if _is_frozen(node) else node, state, is_leaf=_is_frozen
    )


def frozen_trees(
    objective: Objective, params: Any, batch: Batch, mesh: Mesh | None = None, rules: Rules | None = None
) -> dict[str, Any]:
    """The trees that the state of `objective` holds `Frozen`, by their path, laid out on `mesh` by the rules.

    params, batch: arrays or their shapes; nothing is computed. Raises InvalidInput for a tree that `init` computes.
    """
    found: dict[str, Any] = {}

    def init(params, batch):
        state = objective.init(jax.random.key(0), params, batch)
        for path, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_frozen)[0]:
            if _is_frozen(node):
                found[path_name(path)] = node.value
        return without_frozen(state)

    jax.eval_shape(init, params, batch)
    for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]:
        if isinstance(leaf, Tracer):
            raise InvalidInput(
                f"The frozen tree {path_name(path)} is computed by the objective's init: compute it before, and give "
                "the objective its values."
            )
    return found if mesh is None else _placed(found, mesh, rules)


def _placed(frozen: dict[str, Any], mesh: Mesh, rules: Rules | None) -> dict[str, Any]:
    def put(leaf, place):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        return jax.device_put(leaf, place)

    return {path: jax.tree.map(put, tree, shardings(tree, mesh, rules)) for path, tree in frozen.items()}
