"""Checkpoints of a run: everything that matters, written by Orbax in the background, complete or not there at all.

What lies where is in `storage`; parameters alone, for sampling, are read by `weights`.
"""

import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from jax.sharding import Mesh

from diffusion_jax.distributed import Rules
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.training import ema as averages
from diffusion_jax.training.data_position import DataPosition
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.storage import (
    FORMAT,
    Damaged,
    check_fingerprints,
    check_items,
    described,
    first_line,
    items_of,
    made_folder,
    one_copy,
    placed,
    plain,
    read_meta,
    state_from_items,
    writable,
)


class Restored(NamedTuple):
    """state: on the mesh that was asked for. data: position in the data, None if none was saved. step: where it was."""

    state: TrainState
    data: Any
    step: int


class Checkpointer:
    """Saves and restores the states of one run. Close it, or use it in `with`, so that the last save is finished.

    workdir: created if missing. keep: how many checkpoints stay, the newest ones.

    Raises InvalidInput if `workdir` is a file or `keep` is not positive.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 3):
        if keep < 1:
            raise invalid("keep", keep, "at least 1 checkpoint must be kept")
        self._root = made_folder(workdir)
        self._manager = writable(self._root / "checkpoints", keep)
        self._snapshots: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Any = None, *, wait: bool = False) -> None:
        """Starts to write `state` and the position `data`; returns when the device buffers may be reused.

        data: what the iterator's `get_state()` gave: bytes or a tree of plain values and arrays; None: no position.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = one_copy(items_of(state))
        meta = {"format": FORMAT, "items": {name: described(item) for name, item in items.items()}}
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        composite = ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta), data=DataPosition(data))
        self._manager.save(step, args=composite)
        if wait:
            self.wait()

    def save_snapshot(self, step: int, tracks: Mapping[str, averages.Ema], ema: Mapping[str, Any]) -> None:
        """Keeps the power-function tracks of this step for good; the others are left out."""
        widths = {name: track.sigma_rel for name, track in tracks.items() if track.sigma_rel is not None}
        if not widths:
            return
        if self._snapshots is None:
            self._snapshots = writable(self._root / "snapshots", None)
        if step in self._snapshots.all_steps():
            return
        items = one_copy({f"ema_{name}": plain(ema[name]) for name in widths})
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        shapes = {name: described(item) for name, item in items.items()}
        meta = ocp.args.JsonSave({"format": FORMAT, "items": shapes, "sigma_rel": widths})
        self._snapshots.save(step, args=ocp.args.Composite(**args, meta=meta))

    def drop_snapshots_after(self, step: int) -> None:
        """Forgets snapshots of a later step than the one the run resumes from: it will make them again."""
        if (self._root / "snapshots").exists() and self._snapshots is None:
            self._snapshots = writable(self._root / "snapshots", None)
        if self._snapshots is not None:
            for later in self._snapshots.all_steps():
                if later > step:
                    self._snapshots.delete(later)

    def restore(self, abstract: TrainState, mesh: Mesh | None = None, rules: Rules | None = None) -> Restored | None:
        """The newest undamaged checkpoint, laid out on `mesh`; None if there is none at all.

        abstract: `jax.eval_shape` of the initial state. A damaged checkpoint is reported by a warning and removed,
        and the one before it is tried.

        Raises InvalidInput if the checkpoint is of another model or optimiser, or if all are damaged.
        """
        target = placed(abstract, mesh, rules)
        damaged = []
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, abstract, target)
            except Damaged as problem:
                damaged.append(step)
                warnings.warn(
                    f"Checkpoint {step} in {self._root} is damaged ({problem}); trying the one before.", stacklevel=2
                )
                continue
            for later in damaged:
                # The run will reach these steps again and must be able to save them.
                self._manager.delete(later)
            return restored
        if damaged:
            raise InvalidInput(f"all checkpoints in {self._root} are damaged: {damaged}; remove them to start anew.")
        return None

    def _restore(self, step: int, abstract: TrainState, target: TrainState) -> Restored:
        meta = read_meta(self._manager, step)
        wanted = items_of(target)
        check_items(step, wanted, meta)
        args = {name: ocp.args.StandardRestore(item) for name, item in wanted.items()}
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**args, data=DataPosition(None)))
        except InvalidInput:
            raise
        except Exception as error:
            raise Damaged(first_line(error)) from error
        items = {name: found[name] for name in wanted}
        for name, item in items.items():
            check_fingerprints(name, item, meta)
        return Restored(state_from_items(items, abstract), found["data"], step)

    def wait(self) -> None:
        """Returns when everything has been written."""
        self._manager.wait_until_finished()
        if self._snapshots is not None:
            self._snapshots.wait_until_finished()

    def close(self) -> None:
        """Finishes the writing and lets go of the threads."""
        self.wait()
        self._manager.close()
        if self._snapshots is not None:
            self._snapshots.close()
