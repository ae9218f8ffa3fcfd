"""Networks in three stages, head, body and tail, so that a run can skip the body.

    z = body(params, head(params, x, t, cond), x, t, cond);        output, extras = tail(params, z, x, t, cond)

is the network. The head ends behind the first blocks; its output is a cheap probe of how the features change. The tail
begins before the last norm: it is exact in t whatever z is. In a stack of blocks (transformers, MLP) the cuts lie
between blocks; in a U-Net behind its first residual block and before its last norm, since its skip connections reach
across everything between. Which these are is in the network's anatomy. Nothing is computed twice but the embeddings of
time and condition.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models.anatomy import anatomy_of, required
from diffusion_jax.models.interception import Edit, Site, intercepted, located
from diffusion_jax.models.layers.branches import CARRIED, Block, Stack, constrain_activations
from diffusion_jax.models.paths import at_path, replaced_at
from diffusion_jax.typing import Network

_REPORT = "stage"


class Staged(NamedTuple):
    """A network in three stages.

    head: (params, x, t, cond) -> h               features behind the head
    body: (params, h, x, t, cond) -> z            features before the tail; of x, t and cond only what conditions blocks
    tail: (params, z, x, t, cond) -> (output, extras)
    depth: the number of blocks in the stack; None for what is not one, a U-Net.
    """

    head: Callable[..., Any]
    body: Callable[..., Any]
    tail: Callable[..., tuple[Any, dict]]
    depth: int | None


main_stack = located(lambda anatomy: anatomy.stack)
"""Selects the stack of blocks of a network, not the one of a text encoder within it."""

main_block = located(lambda anatomy: f"{anatomy.stack}/block")
"""Selects its block, of which all layers share one trace."""


def of_blocks(network: Network, tree: Any) -> Any:
    """What a tree with the paths of the network's module holds of the blocks of its stack."""
    return at_path(tree, f"{anatomy_of(network).stack}/block")


def for_blocks(network: Network, tree: Any) -> dict[str, Any]:
    """A tree with the paths of the network's module that holds `tree` of the blocks of its stack, and nothing else."""
    return replaced_at({}, f"{anatomy_of(network).stack}/block", tree)


def run_block_range(stack: Stack, first: Any, last: Any, h: Any, c: Any, side: Any) -> Any:
    """The residual stream behind the blocks `first` .. `last - 1` of a bound `stack`, one scan without copies.

    Other edits of what lies within the blocks stay in force, and read their collections; they write nothing.
    """
    return jax.lax.scan(lambda h, index: (run_block(stack, index, h, c, side), None), h, jnp.arange(first, last))[0]


def run_block(stack: Stack, index: Any, h: Any, c: Any, side: Any) -> Any:
    """The residual stream behind block `index` (which may be traced) of a bound `stack`."""

    def own(tree):
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)

    variables = {name: own(tree["block"]) for name, tree in stack.variables.items() if name != CARRIED}
    return Block(stack.branches).apply(variables, h, own(c) if stack.stacked else c, side.of_block(index))


def checked(site: Site, depth: int) -> Site:
    """The site of the main stack; raises InvalidInput unless it is a `Stack` of `depth` blocks."""
    stack = site.module
    if not isinstance(stack, Stack):
        raise invalid(
            "anatomy.stack", "/".join(stack.path), f"a layers.branches.Stack, not a {type(stack).__name__}, fits"
        )
    if stack.depth != depth:
        raise invalid("anatomy.depth", depth, f"there are {stack.depth} blocks")
    return site


def staged(network: Network, head: int = 1) -> Staged:
    """Cuts `network` behind its first `head` blocks (a U-Net behind its first residual block) and before the last norm.

    With head=0 the head is what enters the first block. Raises InvalidInput where the anatomy has neither one stack of
    blocks nor places to cut, and where there are fewer than `head`.
    """
    anatomy = anatomy_of(network)
    if anatomy.cuts and anatomy.tail:
        if not 0 <= head < len(anatomy.cuts):
            raise invalid("head", head, "the head of a U-Net is its first residual block, 1, or nothing, 0")
        return _staged_by_modules(
            network, located(lambda anatomy: anatomy.cuts[head]), located(lambda anatomy: anatomy.tail)
        )
    for field in ("stack", "depth"):
        required(network, field, "staged")
    if not 0 <= head <= anatomy.depth:
        raise invalid("head", head, f"the network has {anatomy.depth} blocks")
    return _staged_by_blocks(network, head, anatomy.depth)


def _staged_by_blocks(network, cut, depth):
    def head(params, x, t, cond=None):
        edit = _reporting(main_stack, lambda site, *args: _between(checked(site, depth), 0, cut, *args))
        return _asked(network, params, x, t, cond, edit)[1]

    def body(params, h, x, t, cond=None):
        edit = _reporting(main_stack, lambda site, _, *args: _between(checked(site, depth), cut, depth, h, *args))
        return _asked(network, params, x, t, cond, edit)[1]

    def tail(params, z, x, t, cond=None):
        return _asked(network, params, x, t, cond, Edit(main_stack, lambda site, *args: z))[0]

    return Staged(head, body, tail, depth)


def _staged_by_modules(network, first, last):
    def head(params, x, t, cond=None):
        return _asked(network, params, x, t, cond, _reporting(first, lambda site, *args: site.run(*args)))[1]

    def body(params, h, x, t, cond=None):
        given = Edit(first, lambda site, *args: h)
        # The input of the last norm is what is asked for; what comes after is dropped.
        seen = _reporting(last, lambda site, z, *args: site.run(z, *args), lambda output, z, *args: z)
        return _asked(network, params, x, t, cond, given, seen)[1]

    def tail(params, z, x, t, cond=None):
        return _asked(network, params, x, t, cond, Edit(last, lambda site, _, *args: site.run(z, *args)))[0]

    return Staged(head, body, tail, None)


def _between(site, first, last, h, c, side):
    return run_block_range(site.module, first, last, constrain_activations(h), c, side)


def _reporting(select, function, read=lambda output, *args: output):
    """An edit that puts `function(site, *args)` in place of a module's output, and reports what `read` makes of it."""

    def apply(site: Site, *args):
        output = function(site, *args)
        site.put(_REPORT, "value", read(output, *args))
        return output

    return Edit(select, apply, (), (_REPORT,))


def _asked(network, params, x, t, cond, *edits):
    """`((output, extras), what was reported)`."""
    output, extras, _ = intercepted(network, *edits).apply(params, {}, x, t, cond)
    report = jax.tree.leaves(extras.get(_REPORT))
    return (output, {name: extras[name] for name in extras if name != _REPORT}), report[0] if report else None
