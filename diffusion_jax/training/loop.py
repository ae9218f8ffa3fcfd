"""The loop: batches in, steps, logs, checkpoints and callbacks out. It knows nothing about diffusion.

Killed at any instant it resumes from its last checkpoint bit for bit: the state and the position in the data are saved
together, and the step's randomness is a function of (seed, step, example). SIGTERM and SIGINT save and leave.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from diffusion_jax.config import differences
from diffusion_jax.costs import peak_flops, training_flops
from diffusion_jax.distributed import Rules, init_sharded, make_mesh, shard_batch, shardings
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.progress import Progress
from diffusion_jax.reading import first_line
from diffusion_jax.training import by_time
from diffusion_jax.training import ema as averages
from diffusion_jax.training.checkpoint import Checkpointer, Restored
from diffusion_jax.training.finite import paths_not_finite
from diffusion_jax.training.frozen import complete_state
from diffusion_jax.training.logging import Several, Writer, check_log_to, default_writer
from diffusion_jax.training.optimizers import Optimizer
from diffusion_jax.training.peers import watched
from diffusion_jax.training.profiling import Profile, check_profile
from diffusion_jax.training.signals import going_on, halting, stop_requests
from diffusion_jax.training.state import TrainState, make_init
from diffusion_jax.training.step import TrainStep, make_train_step
from diffusion_jax.training.weights import read_config, write_config
from diffusion_jax.typing import Objective


class Callback(NamedTuple):
    """Something done every so many steps.

    every: after steps every, 2 every, ...; and after the last step if `at_end`.
    function: `(state, writer) -> scalars or None`; scalars are logged. The state's buffers belong to the loop: whoever
        wants to keep them beyond the call copies them.
    check: called once with the abstract state, before the first step and before anything is written; raises
        InvalidInput for what `function` could not do.
    name: under which the time that it takes is told.
    """

    every: int
    function: Callable[[TrainState, Writer], Mapping[str, Any] | None]
    at_end: bool = False
    check: Callable[[TrainState], Any] | None = None
    name: str = "callbacks"


class Diverged(RuntimeError):
    """Too many steps in a row were not finite, or all of them; the parameters are those of the last good one."""


def train(
    objective: Objective,
    optimizer: optax.GradientTransformation | Optimizer,
    data: Iterable,
    *,
    init_params: Callable[[Any], Any],
    steps: int,
    workdir: str | os.PathLike | None = None,
    seed: int = 0,
    ema: Mapping[str, averages.Ema] | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    callbacks: Sequence[Callback] = (),
    log_every: int = 50,
    checkpoint_every: int = 1000,
    keep: int = 3,
    snapshot_every: int | None = None,
    max_skipped: int = 100,
    config: Any = None,
    writer: Writer | None = None,
    log_to: Sequence[str] = ("jsonl", "tensorboard"),
    profile: tuple[int, int] | None = None,
    progress: bool = True,
) -> TrainState:
    """Trains until `steps` batches have been consumed (since the run's beginning, not since this call).

    data: an iterable of batches (dicts of host arrays `[b, ...]`, b being this process's share) whose iterator has
        `get_state` and `set_state`, as grain's have.
    init_params: `key -> params`.
    workdir: checkpoints and logs go there, and if it holds a checkpoint, the run goes on from it. None keeps nothing.
    ema: name -> track; power-function tracks are also kept for later every `snapshot_every` steps.
    mesh: all devices along `data` when absent. rules: see `distributed`.
    log_every, checkpoint_every: in steps; a checkpoint is always made at the end.
    keep: how many checkpoints stay.
    max_skipped: so many non-finite steps in a row end the run. They are looked for when logging.
    config: written to `workdir/config.json`.
    writer: further place for figures and pictures, besides `workdir`.
    log_to: how the log is kept in `workdir`, of `logging.WRITERS`.
    profile: `(a, b)` traces what runs between the ends of steps a and b, into `workdir/profile`.
    progress: shows a bar in a terminal or a notebook, and elsewhere a line for each record of the log.

    Returns the last state. After SIGTERM or SIGINT it is that of an early step: `state.step < steps`; a second SIGINT
    raises KeyboardInterrupt at once.

    Raises InvalidInput for values that cannot work, before anything is compiled or written; `Diverged`, with the last
    good state saved, after `max_skipped` non-finite steps, or if no step at all could be applied; Halted, with all
    checkpoints as they were, if the system refuses to write or a process of several is lost.
    """
    numbers = {"steps": steps, "log_every": log_every, "checkpoint_every": checkpoint_every, "max_skipped": max_skipped}
    numbers |= {} if snapshot_every is None else {"snapshot_every": snapshot_every}
    for field, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise invalid(field, value, "a whole number of at least 1 is needed")
    for number, callback in enumerate(callbacks):
        if callback.every < 1:
            raise invalid(f"callbacks[{number}].every", callback.every, "it must be at least 1")
    check_log_to(log_to)
    check_profile(profile, steps, workdir)
    mesh = make_mesh() if mesh is None else mesh
    tracks = dict(ema or {})

    step = make_train_step(
        objective, optimizer, mesh, rules, ema=tracks, accumulate=accumulate, clip_norm=clip_norm, seed=seed
    )
    iterator, first = _start(data, must_resume=workdir is not None)
    begun = shard_batch(first, mesh)
    initial = make_init(objective, optimizer, init_params, begun, ema=tracks, seed=seed)
    abstract = jax.eval_shape(initial)
    shardings(abstract.params, mesh, rules, strict=True)
    if snapshot_every is not None and all(track.sigma_rel is None for track in tracks.values()):
        raise invalid("snapshot_every", snapshot_every, "there is no power-function track in ema to be kept")
    for number, callback in enumerate(callbacks):
        _check(callback, number, abstract)

    with contextlib.ExitStack() as stack:
        asked_to_stop = stack.enter_context(stop_requests())
        stack.enter_context(watched(going_on(workdir)))
        stack.enter_context(halting(workdir))
        checkpointer, restored = None, None
        if workdir is not None:
            frozen = step.frozen(abstract, begun)
            checkpointer = stack.enter_context(Checkpointer(workdir, keep=keep, frozen=frozen))
            try:
                restored = checkpointer.restore(abstract, mesh, rules)
                if restored is not None:
                    _set_position(iterator, restored)
            except InvalidInput as problem:
                raise InvalidInput(f"{problem}{_changes(workdir, config)}") from None
            # Only a run that goes on may replace what is stored of it.
            if config is not None and (restored is None or restored.step < steps):
                write_config(workdir, config)
        if restored is None:
            state, at = init_sharded(initial, mesh=mesh, rules=rules), 0
        else:
            state, at = restored.state, restored.step
        begun_so = paths_not_finite(_kept_of(state))
        if checkpointer is not None:
            checkpointer.drop_snapshots_after(at)
        trace = Profile(profile, workdir, at, steps)
        stack.callback(trace.close)
        written = default_writer(workdir, at, log_to if at < steps else (), config)
        writers = Several((written, *((writer,) if writer else ())))
        stack.callback(writers.close)
        breaks = {callback.name: callback.every for callback in callbacks}
        seen = Progress(
            steps, at, jax.tree.leaves(begun)[0].shape[0],
            breaks if checkpointer is None else {**breaks, "checkpoints": checkpoint_every},
            peak_share=_peak_share(objective, step, abstract, begun, mesh) if at < steps else None,
            shown=progress and jax.process_index() == 0,
        )  # fmt: skip
        stack.callback(seen.close)
        # Within what waits for the other processes on leaving: those must not be waited for once one is lost.
        stack.enter_context(halting(workdir))
        leaving, compiled = asked_to_stop(at), False

        while at < steps and not leaving:
            if trace.due(at):
                with seen.apart("profile"):
                    trace.turn()
            batch = shard_batch(_next(iterator, at, steps), mesh)
            if compiled:
                state, metrics = step(state, batch)
                seen.started(metrics["loss"])
            else:
                with seen.compiling():
                    state, metrics = step(state, batch)
                    jax.block_until_ready(metrics["loss"])
                compiled = True
            at += 1
            last = at == steps
            if last or at % log_every == 0:
                rates = seen.rates()
                values = by_time.without_empty({name: float(value) for name, value in jax.device_get(metrics).items()})
                writers.scalars(at, {**values, **rates})
                seen.log(values["loss"], rates)
                if values["skipped_in_a_row"] >= max_skipped:
                    if checkpointer is not None:
                        checkpointer.save(state, iterator.get_state(), wait=True)
                    raise Diverged(
                        "The loss, the gradient or the update was not finite for "
                        f"{int(values['skipped_in_a_row'])} steps in a row, up to step {at}; lower the learning rate "
                        "or look at the data. The parameters are the last good ones."
                    )
            for callback in callbacks:
                if at % callback.every == 0 or (last and callback.at_end):
                    with seen.apart(callback.name):
                        values = callback.function(state, writers)
                        if values:
                            writers.scalars(
                                at, {name: float(value) for name, value in jax.device_get(dict(values)).items()}
                            )
            leaving = asked_to_stop(at)
            saves = last or leaving or at % checkpoint_every == 0
            snapshot = snapshot_every is not None and at % snapshot_every == 0
            if not saves and not snapshot:
                continue
            with seen.apart("checkpoints"):
                if saves:
                    _check_finite(state, at, begun_so)
                if checkpointer is not None and snapshot:
                    checkpointer.save_snapshot(at, tracks, state.ema)
                if checkpointer is not None and saves:
                    checkpointer.save(state, iterator.get_state(), wait=last or leaving)
        if at >= steps and int(state.skipped) == at:
            raise Diverged(
                f"Nothing was learned: the loss, the gradient or the update was not finite in any of {at} steps, so "
                "none was applied. Lower the learning rate or look at the data, and begin in another workdir."
            )
    return state


def _peak_share(objective: Objective, step: TrainStep, abstract: TrainState, batch: Any, mesh: Mesh) -> float | None:
    """The share of the devices' peak that one step a second is; None where the peak is not known."""
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    if peak is None:
        return None
    state = complete_state(abstract.objective_state, step.frozen(abstract, batch))
    return training_flops(objective, abstract.params, state, batch) / (peak * mesh.size)


def _kept_of(state: TrainState) -> Any:
    return {"params": state.params, "ema": state.ema, "opt_state": state.opt_state, "objective": state.objective_state}


def _check_finite(state: TrainState, at: int, begun_so: Sequence[str]) -> None:
    """Raises Diverged where an array is not finite that was when the run began: it is not kept."""
    lost = [name for name in paths_not_finite(_kept_of(state)) if name not in begun_so]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise Diverged(
            f"{lost[0]}{more} is not finite after step {at}, so the state is not saved: what was saved before is as it "
            "was. Look at the optimiser and the averages, whose moments overflow or whose rates are not finite."
        )


def _check(callback: Callback, number: int, abstract: TrainState) -> None:
    try:
        if callback.check is not None:
            callback.check(abstract)
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"callbacks[{number}], due every {callback.every} steps, cannot run: {error}") from error


def _set_position(iterator: Any, restored: Restored) -> None:
    try:
        iterator.set_state(restored.data)
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(
            f"the data do not take the position that checkpoint {restored.step} holds ({first_line(error)}): it was "
            "written by data of another kind."
        ) from error


def _changes(workdir: Any, config: Any) -> str:
    """In which fields `config` differs from that of the run in `workdir`, as a sentence."""
    try:
        fields = [] if config is None else differences(read_config(workdir), config)
    except InvalidInput:
        return ""
    return f" The config differs from the one stored there in {', '.join(fields)}." if fields else ""


def _start(data: Iterable, must_resume: bool) -> tuple[Any, Any]:
    """An iterator at the beginning, and its first batch."""
    iterator: Any = iter(data)
    if hasattr(iterator, "get_state") and hasattr(iterator, "set_state"):
        beginning = iterator.get_state()
        first = _next(iterator, 0, 1)
        iterator.set_state(beginning)
        return iterator, first
    if must_resume:
        raise InvalidInput(
            f"data gives a {type(iterator).__name__}, which has no get_state and set_state: "
            "a run with a workdir could not resume; use a grain source, or workdir=None."
        )
    first = _next(iterator, 0, 1)
    return itertools.chain([first], iterator), first


def _next(iterator: Any, at: int, steps: int) -> Any:
    try:
        return next(iterator)
    except StopIteration:
        raise InvalidInput(
            f"the data ended after {at} batches, but {steps} steps were asked for; repeat it, e.g. num_epochs=None."
        ) from None
