"""The clock of a run: the steps of a grid, how many are left, and the random keys; and how networks are called.

Every loop (`sampling`, `streaming`, `pipelined`) uses a `Clock`. All code that calls a network, in sampling and in
training, uses `network_inputs` and `to_prediction`.

A grid is `[S + 1, *t_shape]`: every time of the run, explicit. `t_shape` is a prefix of the data's shape, batch
included (`[]`, `[B]`, `[B, N]`; axes of size 1 broadcast). Joint data has a dict of grids.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffusion_jax import randomness
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.time_axes import fill
from diffusion_jax.typing import ONE_EVALUATION, Cost, Plan, Prediction, Step, Times


def as_grid(grid: Any) -> Any:
    """The grid as floating-point arrays.

    Raises InvalidInput unless it stays in [0, 1] and never rises; values of traced grids are not inspected.
    """
    grid = {name: _times(name, g) for name, g in grid.items()} if isinstance(grid, Mapping) else _times("grid", grid)
    for name, values in grid.items() if isinstance(grid, Mapping) else [("grid", grid)]:
        if values.ndim < 1 or values.shape[0] < 2:
            raise invalid(f"{name}.shape", values.shape, "a grid needs at least two times along its first axis")
        if isinstance(values, Tracer):
            continue
        # NumPy, for a known grid may be inspected while something else is being traced.
        values = np.asarray(values)
        if not bool(np.all((values >= 0) & (values <= 1))):
            raise InvalidInput(f"{name} must lie in [0, 1]; it spans [{np.min(values):g}, {np.max(values):g}].")
        steps = np.diff(values, axis=0)
        if not bool(np.all(steps <= 0)):
            entry = int(np.argmax(np.any((steps > 0).reshape(steps.shape[0], -1), axis=1)))
            raise InvalidInput(f"{name} must decrease from 1 to 0; entry {entry + 1} is larger than entry {entry}.")
    num_steps(grid)
    return grid


def _times(name: str, values: Any) -> Any:
    try:
        return jnp.asarray(values, jnp.result_type(float))
    except (TypeError, ValueError):
        raise invalid(name, values, "falling times from 1 to 0 were expected, an array [S + 1, ...]") from None


def num_steps(grid: Plan | Times) -> int:
    """S. Raises InvalidInput where the grids of joint data have different ones."""
    leaves: Any = grid.values() if isinstance(grid, Mapping) else [grid]
    # Lists of times are grids too: not trees of numbers.
    lengths = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in leaves}
    if len(lengths) != 1:
        raise invalid("grid", sorted(lengths), "the grids of all modalities must have the same number of entries")
    return lengths.pop() - 1


def remaining(grid: Plan) -> Any:
    """How many steps of non-zero length are left, `[S, *t_shape]`, counted at each step and for each entry."""
    return jax.tree.map(lambda g: jnp.cumsum((g[1:] != g[:-1])[::-1], axis=0, dtype=jnp.int32)[::-1], grid)


class Clock(NamedTuple):
    """A grid `[S + 1, *t_shape]`, the steps `remaining` at each of its steps, and the keys of a run, `[B]` each."""

    grid: Any
    remaining: Any
    solver_keys: Any = None
    denoiser_keys: Any = None

    def with_keys(self, keys: Any) -> "Clock":
        """The clock of the run of the samples with these `keys [B]`."""
        solver_keys, denoiser_keys = randomness.solver_key(keys), randomness.denoiser_key(keys)
        return self._replace(solver_keys=solver_keys, denoiser_keys=denoiser_keys)

    def step(self, index: Any) -> Step:
        """Step `index` of the run."""
        t, t_next = (jax.tree.map(lambda g, shift=shift: g[index + shift], self.grid) for shift in (0, 1))
        left = jax.tree.map(lambda r: r[index], self.remaining)
        return Step(index, t, t_next, jnp.int32(num_steps(self.grid)), left, self.denoiser_keys)

    def solver_key(self, index: Any) -> Any:
        """The keys `[B]` of the solver's own noise at step `index`."""
        return randomness.fold(self.solver_keys, index)


def clock(grid: Plan | Times) -> Clock:
    """The clock of a grid, or of a dict of grids, whose runs have no keys yet."""
    whole = {name: _times(name, g) for name, g in grid.items()} if isinstance(grid, Mapping) else _times("grid", grid)
    return Clock(whole, remaining(whole))


def single_step(t: Any, t_next: Any = None) -> Step:
    """The only step of a run from t to t_next, which is t when absent: for calling a denoiser outside of a run."""
    return Step(jnp.int32(0), t, t if t_next is None else t_next, jnp.int32(1))


def some_step(x: Any, num_steps: int = 1) -> Step:
    """A step for `x`, one time a sample: for the shapes of what a denoiser returns, before a run begins."""
    t = jax.tree.map(lambda leaf: jnp.ones(leaf.shape[:1], jnp.float32), x)
    ones = jax.tree.map(lambda leaf: leaf.astype(jnp.int32), t)
    return Step(jnp.int32(0), t, jax.tree.map(jnp.zeros_like, t), jnp.int32(num_steps), ones)


def network_inputs(process: Any, x: Any, t: Any) -> tuple[Any, Any]:
    """The inputs that the network of `process` gets for x and t."""
    t = fill(t, x)
    return process.network_input(x, t), process.network_time(t)


def to_prediction(
    process: Any, output: Any, x: Any, t: Any, extras: Mapping[str, Any], cost: Cost = ONE_EVALUATION
) -> Prediction:
    """The prediction that the network's output for x and t means, with its extras and its cost."""
    return process.predict(output, x, fill(t, x))._replace(extras=extras, cost=cost)
