"""Checkpoints of a run: everything that matters, written by Orbax in the background, complete or not there at all.

What lies where is in `storage`, what damage is in `damage`; parameters alone, for sampling, are read by `weights`.
"""

import errno
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from diffusion_jax.distributed import Rules, first_said, said_by_all
from diffusion_jax.errors import Halted, InvalidInput, invalid
from diffusion_jax.training import ema as averages
from diffusion_jax.training.damage import Damaged, reading, set_aside, system_error, writing
from diffusion_jax.training.data_position import DataPosition
from diffusion_jax.training.lock import FolderLock
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.storage import (
    FORMAT,
    check_fingerprints,
    check_frozen,
    check_items,
    described,
    folder,
    items_of,
    made_folder,
    meta_of,
    one_copy,
    placed,
    plain,
    read_meta,
    readable,
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

    workdir: created if missing, and locked for this run. keep: how many checkpoints stay, the newest ones.
    frozen: what the run is trained beside (`frozen_trees`), of which fingerprints are kept.

    Raises InvalidInput if `workdir` is a file, read-only or in use by another run, or `keep` is not positive; Halted,
    here and when saving, if the system refuses to write. Earlier checkpoints are then as they were.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 3, frozen: Mapping[str, Any] | None = None):
        if keep < 1:
            raise invalid("keep", keep, "at least 1 checkpoint must be kept")
        self._frozen = {path: described(one_copy(plain(tree))) for path, tree in (frozen or {}).items()}
        self._root, self._lock = _locked(workdir)
        self._keep = keep
        try:
            self._open()
        except BaseException:
            self._unlock()
            raise
        self._snapshots: ocp.CheckpointManager | None = None

    def _open(self) -> None:
        with writing(f"{self._root}", "its checkpoints are as they were"):
            self._manager = writable(self._root / "checkpoints", self._keep)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None and issubclass(kind, (Halted, KeyboardInterrupt)):
            # What is being written may never end: a process that is waited for is gone, or nobody wants to wait.
            self._unlock()
        else:
            self.close()

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Any = None, *, wait: bool = False) -> None:
        """Starts to write `state` and the position `data`; returns when the device buffers may be reused.

        data: what the iterator's `get_state()` gave: bytes or a tree of plain values and arrays; None: no position.
        """
        step = int(state.step)
        if step not in self._manager.all_steps():
            items = one_copy(items_of(state))
            args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            meta = ocp.args.JsonSave(meta_of(items, **({"frozen": self._frozen} if self._frozen else {})))
            composite = ocp.args.Composite(**args, meta=meta, data=DataPosition(data))
            with self._writing():
                self._manager.save(step, args=composite)
        if wait:
            self.wait()

    def _writing(self):
        return writing(
            f"A checkpoint of {self._root}", "the earlier ones are as they were, and the run goes on from them"
        )

    def save_snapshot(self, step: int, tracks: Mapping[str, averages.Ema], ema: Mapping[str, Any]) -> None:
        """Keeps the power-function tracks of this step for good; the others are left out."""
        widths = {name: track.sigma_rel for name, track in tracks.items() if track.sigma_rel is not None}
        if not widths:
            return
        items = one_copy({f"ema_{name}": plain(ema[name]) for name in widths})
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        meta = ocp.args.JsonSave(meta_of(items, sigma_rel=widths))
        with self._writing():
            if self._snapshots is None:
                self._snapshots = writable(self._root / "snapshots", None)
            if step not in self._snapshots.all_steps():
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

        abstract: `jax.eval_shape` of the initial state. Of a damaged checkpoint a warning tells; the one before it is
        tried, and if that is whole, the damaged one is set aside: its folder gets a name that says so.

        Raises InvalidInput if the checkpoint is of another model or optimiser, was trained beside other frozen
        parameters or cannot be read now, or if all are damaged; then nothing is changed.
        """
        target = placed(abstract, mesh, rules)
        damaged = []
        # All processes try those that the first one sees.
        for step in json.loads(said_by_all(json.dumps(self.steps()[::-1]))[0]):
            try:
                restored = self._restore(step, abstract, target)
            except Damaged as problem:
                damaged.append(step)
                warnings.warn(
                    f"Checkpoint {step} in {self._root} is damaged ({problem}); trying the one before.", stacklevel=2
                )
                continue
            if damaged:
                # The run will reach these steps again and must be able to save them.
                self._set_aside(damaged)
            return restored
        if damaged:
            raise InvalidInput(f"all checkpoints in {self._root} are damaged: {damaged}; remove them to start anew.")
        return None

    def _restore(self, step: int, abstract: TrainState, target: TrainState) -> Restored:
        found, problem = None, ""
        try:
            found = self._read(step, target)
        except Damaged as error:
            problem = f"damaged {error}"
        except InvalidInput as error:
            problem = f"refused {error}"
        # Each process reads its own part, and all of them do the same.
        kind, _, told = first_said(problem).partition(" ")
        if kind == "refused":
            raise InvalidInput(told)
        if kind == "damaged" or found is None:
            raise Damaged(told)
        items, data, meta = found
        for name, item in items.items():
            check_fingerprints(name, item, meta)
        return Restored(state_from_items(items, abstract), data, step)

    def _read(self, step: int, target: TrainState) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """The items of a checkpoint, its position in the data and its meta, as far as this process can see whole."""
        wanted = items_of(target)
        args = {name: ocp.args.StandardRestore(item) for name, item in wanted.items()}
        with readable(self._root / "checkpoints") as manager:
            meta = read_meta(manager, step, (FORMAT,))
            check_items(step, wanted, meta)
            check_frozen(step, self._frozen, meta)
            with reading(f"checkpoint {step} in {self._root}"):
                found = manager.restore(step, args=ocp.args.Composite(**args, data=DataPosition(None)))
                return {name: found[name] for name in wanted}, found["data"], meta

    def _set_aside(self, steps: list[int]) -> None:
        problem = ""
        if jax.process_index() == 0:
            try:
                for step in steps:
                    aside = set_aside(self._root / "checkpoints" / str(step))
                    warnings.warn(f"What was left of checkpoint {step} is kept as {aside}.", stacklevel=3)
            except OSError as error:
                problem = f"the damaged checkpoints {steps} in {self._root} cannot be set aside ({error})."
        if problem := first_said(problem):
            raise InvalidInput(problem)
        self._manager.close()
        self._open()

    def wait(self) -> None:
        """Returns when everything has been written."""
        with self._writing():
            self._manager.wait_until_finished()
            if self._snapshots is not None:
                self._snapshots.wait_until_finished()

    def close(self) -> None:
        """Finishes the writing, and lets go of the threads and of the lock."""
        try:
            self.wait()
            with self._writing():
                self._manager.close()
                if self._snapshots is not None:
                    self._snapshots.close()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _locked(workdir: str | os.PathLike) -> tuple[Any, FolderLock | None]:
    """The folder of a run and, in the first of its processes, the lock on it."""
    root, lock, problem = folder(workdir), None, ""
    if jax.process_index() == 0:
        try:
            made_folder(workdir)
            lock = FolderLock(root)
        except InvalidInput as error:
            problem = f"refused {error}"
        except OSError as error:
            told = system_error(error) or str(error)
            refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            problem = f"{'refused' if refused else 'halted'} nothing can be written in workdir {root} ({told})."
    kind, _, told = first_said(problem).partition(" ")
    if kind:
        raise {"refused": InvalidInput, "halted": Halted}[kind](told)
    return root, lock
