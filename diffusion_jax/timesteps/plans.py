"""Plans: a time for each part of the data at each step of a run. The choice of the array is the task.

A plan is a grid with the axes of a vector time, `[S + 1, 1, N]` (the 1 broadcasts over the batch; `[S + 1, B, N]` has
one plan an example), or a dict of grids `[S + 1, ...]` for joint data, and `sample` takes it as it takes any grid.
Entries at 0 are given, entries at 1 are unknown, and entries in between are hints. Entries whose time does not change
come back bit for bit:

    task = which entries of t move, and which of the others stand at 0 or at 1                                  (1)

Plans are data: another task of the same shape runs the same compiled program. This module has the builders, the noise
with which a plan begins, and the part of a long clip that a window shows. Draws of training times are in `draws` and
`vector_draws`, the drivers of streams and long clips in `streaming`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffusion_jax import randomness
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.time_axes import batch_size, each, where
from diffusion_jax.timesteps.grids import scalar_times
from diffusion_jax.typing import Keys, Plan, Process, Times

ROLES: dict[str, float | None] = {"generate": None, "given": 0.0, "ignored": 1.0}
"""The time at which a modality stands in each role; None runs along the grid."""


def synchronous(grid: Times, frames: int) -> Any:
    """All frames run along `grid [S + 1]` together, `[S + 1, 1, frames]`: the run of the scalar time, bit for bit."""
    _positive("frames", frames)
    return multiplied(grid, np.ones(frames))


def multiplied(grid: Times, multipliers: Any) -> Any:
    """`t_i = m_i t` with the `multipliers [N]` in [0, 1], `[S + 1, 1, N]` (Liu et al. 2025, Pusa).

    1 generates, 0 is a clean condition, in between a soft one: it begins at the level `m_i t_1`, to which
    `noised_start` brings it, and is then denoised along its own path. Multipliers `[B, N]` give each example a
    task, `[S + 1, B, N]`. The level of an entry is this product, never the nearest one of a table. Raises InvalidInput
    for multipliers outside [0, 1].
    """
    times: Any = scalar_times(grid)
    shape = np.shape(multipliers)
    if len(shape) not in (1, 2):
        raise invalid("multipliers.shape", shape, "one multiplier an entry was expected, [N] or [B, N]")
    _within("multipliers", multipliers)
    multipliers = jnp.asarray(multipliers, times.dtype)
    return times[:, None, None] * multipliers.reshape(-1, shape[-1])


def frames(grid: Times, frames: int, given: Sequence[int] = (0,)) -> Any:
    """The frames with the indices `given` stay at 0, the others run along `grid`, `[S + 1, 1, frames]`.

    `given=(0,)` is image to video, `(0, -1)` interpolates between two frames, `range(m)` continues after m frames,
    `()` generates the whole clip (Liu et al. 2024, FVDM, table of tasks).
    """
    _positive("frames", frames)
    multipliers = np.ones(frames)
    for index in given:
        if not -frames <= index < frames:
            raise invalid("given", tuple(given), f"indices of {frames} frames were expected")
        multipliers[index] = 0.0
    return multiplied(grid, multipliers)


def roles(grid: Times, roles: Mapping[str, Any]) -> dict[str, Any]:
    """A grid for each modality from its role in the run: the query table of UniDiffuser (Bao et al. 2023) and UWM.

    roles: for each modality a key of `ROLES`: "generate" runs along `grid [S + 1]`, "given" stands at 0 (its clean
        value is a condition), "ignored" stands at 1 (pure noise is in its place, so it is integrated out); a number in
        [0, 1] for a modality known up to that level; a list or tuple of those, one an example; an array
        `[S + 1, ...]`, which is a plan of its own; or the name of another modality, whose role it shares (as in draws).

    With one role `[S + 1]`, with one an example `[S + 1, B]`. `roles(grid, {"image": "generate", "text": "given"})` is
    p(image | text), both "generate" the joint distribution, `{"image": "generate", "text": "ignored"}` p(image).
    Exact where the process ends in pure noise, alpha(1) = 0. Raises InvalidInput for another role or level.
    """
    times: Any = scalar_times(grid)
    named = {name: roles[role] if isinstance(role, str) and role in roles else role for name, role in roles.items()}
    return {name: _role_plan(times, f"roles[{name!r}]", role) for name, role in named.items()}


def _role_plan(grid, field, role):
    if isinstance(role, str):
        if role not in ROLES:
            raise unknown(field, role, ROLES)
        level = ROLES[role]
        return grid if level is None else jnp.full_like(grid, level)
    if isinstance(role, (list, tuple)):
        return jnp.stack([_role_plan(grid, field, one) for one in role], axis=1)
    if np.ndim(role) == 0:
        _within(field, role)
        return jnp.full_like(grid, role)
    if np.shape(role)[0] != grid.shape[0]:
        raise invalid(f"{field}.shape", np.shape(role), f"a plan with the {grid.shape[0]} entries of grid was expected")
    return jnp.asarray(role, grid.dtype)


def staircase_levels(steps: int, frames: int, width: int, chunk: int = 1) -> np.ndarray:
    """How many of the S = `steps` steps each frame has made, `[R + 1, frames]`: the AD scheduler of AR-Diffusion.

        n_i(r) = clip(r - s floor(i / chunk), 0, S),        R = S + (ceil(frames / chunk) - 1) s                    (2)

    with s = `width`: the next frame runs s steps noisier than the one before it until that one is clean, and then alone
    (Sun et al. 2025). Raises InvalidInput unless 0 <= width <= steps.
    """
    for name, value in (("steps", steps), ("frames", frames), ("chunk", chunk)):
        _positive(name, value)
    if not 0 <= width <= steps:
        raise invalid("width", width, f"it must lie in 0 (all together) .. {steps} (one after the other)")
    delay = width * (np.arange(frames) // chunk)
    return np.clip(np.arange(steps + delay[-1] + 1)[:, None] - delay, 0, steps)


def staircase(grid: Times, frames: int, width: int, chunk: int = 1) -> Any:
    """Frames that follow each other `width` steps behind, `[R + 1, 1, frames]` along `grid [S + 1]`; equation (2).

    width 0 is `synchronous`, width S is autoregressive; R = S + (frames - 1) width evaluations. chunk: so many
    neighbouring frames move together. Times never fall along the frames: those of training are `anchored` draws.
    """
    times: Any = scalar_times(grid)
    levels = staircase_levels(times.shape[0] - 1, frames, width, chunk)
    # Picked on the host where it is known: each width has a shape of its own, which would be compiled.
    return jnp.asarray((times if isinstance(times, Tracer) else np.asarray(times))[levels][:, None])


def chunk_levels(steps: int, entries: int, chunk: int, past: int = 0, given_past: bool = False) -> np.ndarray:
    """How many of the S = `steps` steps each entry of a rolling buffer has left in one call, `[M + 1, entries]`.

    h = (entries - past) // chunk chunks; entry n is in chunk i(n) = clip((n - past) // chunk, 0, h - 1), so the `past`
    entries join chunk 0 and an incomplete tail joins the last. Before a call chunk i has r_i = floor(S (i + 1) / h)
    steps left, after it r_(i - 1), and chunk 0 none (Høeg et al. 2024, SDP; its index k is one less than the steps
    left). Where h does not divide S, chunks with less to do wait at the end of the call, so that levels never drift.

    given_past: the past entries are known (executed actions): they stand at 0.
    Raises InvalidInput unless there is a whole chunk and at least one step a chunk.
    """
    for name, value in (("steps", steps), ("entries", entries), ("chunk", chunk)):
        _positive(name, value)
    if past < 0 or past + chunk > entries:
        raise invalid("past, chunk", (past, chunk), f"a chunk after the past must fit into the {entries} entries")
    chunks = (entries - past) // chunk
    if chunks > steps:
        raise invalid("steps", steps, f"at least one step for each of the {chunks} chunks is needed")
    index = np.clip((np.arange(entries) - past) // chunk, 0, chunks - 1)
    before, after = (steps * (index + 1)) // chunks, (steps * index) // chunks
    if given_past:
        before, after = (np.where(np.arange(entries) < past, 0, left) for left in (before, after))
    return np.maximum(before - np.arange((before - after).max() + 1)[:, None], after)


def chunk_staircase(grid: Times, entries: int, chunk: int, past: int = 0, given_past: bool = False) -> Any:
    """The times of a rolling buffer during one call, `[M + 1, 1, entries]` along `grid [S + 1]`; see `chunk_levels`.

    The first row holds the stationary levels, at which the buffer rests between calls. Without a past, and where h
    divides S, it is the stretch of `staircase(grid, entries, S / h, chunk)` in which every chunk moves.
    """
    times: Any = scalar_times(grid)
    steps = times.shape[0] - 1
    return times[steps - chunk_levels(steps, entries, chunk, past, given_past)][:, None]


def windows(plan: Plan, window: int) -> np.ndarray:
    """The first frame that a window of so many frames shows at each step of a plan `[K + 1, 1, N]`, int32 `[K]`.

    The window begins with the first frames and advances when a frame beyond its end begins to move. Frames that it has
    left are done, frames that it has not reached are noise. Raises InvalidInput where a frame still moves after the
    window has left it: every frame of a `staircase` finishes in the window if and only if S <= window * width.
    """
    if isinstance(plan, Tracer):
        raise InvalidInput(
            "plan is traced, but windows needs its values; find the starts outside of jit and hand them in."
        )
    plan = np.asarray(plan)
    if plan.ndim < 3:
        raise invalid("plan.shape", plan.shape, "a plan over frames, [K + 1, 1, N], was expected")
    count = plan.shape[2]
    if not 1 <= window <= count:
        raise invalid("window", window, f"it must lie in 1 .. {count}, the number of frames")
    moves = (plan[1:] != plan[:-1]).any(axis=(1, *range(3, plan.ndim)))
    last = np.where(moves, np.arange(count), -1).max(axis=1)
    starts = np.maximum(np.maximum.accumulate(last) + 1, window) - window
    late = moves & (np.arange(count) < starts[:, None])
    if late.any():
        row, frame = np.argwhere(late)[0]
        raise InvalidInput(
            f"window is {window}, but frame {frame} still moves at step {row}, when the window has left it; "
            "a staircase needs steps <= window * width."
        )
    return starts.astype(np.int32)


def noised_start(key: Keys, process: Process, plan: Plan, known: Any, index: Any = None) -> Any:
    """The x with which a plan begins, `x_init` of `sample`: `known` noised to the first row, entry by entry.

    Entries at 0 are `known` bit for bit. Entries at 1 are the process's prior, whatever `known` holds there: the one
    that `sample` draws for the same key and index. known: like x, batch included; a dict for joint data. index: `[B]`.
    """
    shape = {name: jnp.shape(leaf) for name, leaf in known.items()} if isinstance(known, Mapping) else jnp.shape(known)
    keys = randomness.sample_keys(key, jnp.arange(batch_size(known)) if index is None else index)
    t = jax.tree.map(lambda grid: grid[0], plan)
    noised, _ = process.corrupt(randomness.corruption_key(keys), known, t)
    noise = process.prior(randomness.prior_key(keys), shape)
    return each(_begin, known, t, noised, noise)


def _begin(known, t, noised, noise):
    return where(t == 0, known, where(t == 1, noise.astype(known.dtype), noised.astype(known.dtype)))


def _positive(field, value):
    if value < 1:
        raise invalid(field, value, "it must be at least 1")


def _within(field, values):
    if isinstance(values, Tracer):
        return
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.number) or not np.all((values >= 0) & (values <= 1)):
        raise invalid(field, values.tolist(), "numbers in [0, 1] were expected")
