"""Where a run's figures and pictures go: one protocol, and writers for JSONL, CSV, TensorBoard and Weights & Biases.

A writer that continues a run forgets what was written after the step it resumes from, so the log of a run that was
killed equals that of one that was not, but for what depends on the machine (`TIMINGS`).
"""

import csv
import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.reading import first_line, regular_file

WRITERS = ("jsonl", "tensorboard", "csv", "wandb")
"""What `log_to` can name. `metrics.jsonl` is always written: pictures of losses, `evaluate` and `report` read it."""

TIMINGS = ("steps_per_second", "examples_per_second", "mfu")
"""What a log says of the machine: it differs between runs that are otherwise equal bit for bit."""


@runtime_checkable
class Writer(Protocol):
    """Anything with these methods can be given to the loop."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Records figures of a step."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a picture, uint8 `[H, W, C]` or `[H, W]`."""

    def close(self) -> None:
        """Finishes writing."""


class JsonLines:
    """One JSON object a line: `{"step": 10, "loss": 0.5, ...}`; values that are not finite are written as strings.

    path: appended to; lines of steps after `resume_step`, and a line torn by a kill, are removed first.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int = 0):
        self._path = epath.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if (step := _step(line)) is not None and step <= resume_step]
        draft = self._path.parent / (self._path.name + ".tmp")
        draft.write_text("".join(line + "\n" for line in kept))
        draft.replace(self._path)
        self._file = self._path.open("a")

    def _lines(self) -> list[str]:
        return _text_lines(self._path) if self._path.exists() else []

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        record = {"step": step, **{name: _finite(value) for name, value in values.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Pictures have no place in this file."""

    def close(self) -> None:
        self._file.close()


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a JSONL log; a torn last line is left out."""
    return [json.loads(line) for line in _text_lines(epath.Path(path)) if _step(line) is not None]


def _text_lines(path: epath.Path) -> list[str]:
    """The lines of a log; what is no text stays in its line, which is then no record."""
    if "://" not in os.fspath(path):
        regular_file(path)
    return path.read_bytes().decode("utf-8", "replace").splitlines()


class Csv:
    """A table for spreadsheets: a row a record, a column for each name, empty where a record does not have it.

    path: appended to; rows of steps after `resume_step`, and a row torn by a kill, are removed first. A new name gets a
    column at the end, for which the file is written anew, in one go.

    Raises InvalidInput where `path` is another table: its first column is not `step`.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int = 0):
        self._path = epath.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = _text_lines(self._path) if self._path.exists() else []
        self._columns, *rows = list(csv.reader(lines)) or [["step"]]
        if self._columns[:1] != ["step"]:
            raise invalid(f"the first column of {self._path}", self._columns[:1], "the log of a run begins with 'step'")
        whole = [row for row in rows if len(row) == len(self._columns) and row[0].isdigit()]
        self._rewrite([row for row in whole if int(row[0]) <= resume_step])

    def _rewrite(self, rows: Sequence[Sequence[str]]) -> None:
        draft = self._path.parent / (self._path.name + ".tmp")
        with draft.open("w") as file:
            csv.writer(file, lineterminator="\n").writerows([self._columns, *rows])
        draft.replace(self._path)
        self._file = self._path.open("a")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        if new := [name for name in values if name not in self._columns]:
            self._file.close()
            _, *rows = csv.reader(_text_lines(self._path))
            self._columns = [*self._columns, *new]
            self._rewrite([[*row, *[""] * len(new)] for row in rows])
        record = {"step": step, **values}
        csv.writer(self._file, lineterminator="\n").writerow([record.get(name, "") for name in self._columns])
        self._file.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Pictures have no place in a table."""

    def close(self) -> None:
        self._file.close()


def _messages() -> tuple[Any, Any]:
    """The messages of TensorBoard's event files, which protobuf makes when they are imported."""
    from tensorboardX.proto import event_pb2, summary_pb2

    return event_pb2, summary_pb2


class TensorBoard:
    """Event files for TensorBoard in `directory`, whole up to the last record whenever the process is killed.

    What earlier files hold of steps after `resume_step` is hidden, as TensorBoard does it for runs that begin again.
    """

    def __init__(self, directory: str | os.PathLike, resume_step: int = 0):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.record_writer import directory_check

        directory_check(os.fspath(directory))
        # Its SummaryWriter hands events to a thread through a queue, which no flush waits for.
        # Its names count seconds, in which a run can be killed and started again: the older file would be emptied.
        self._file = EventsWriter(os.path.join(os.fspath(directory), "events"), f".{time.time_ns()}")
        events, _ = _messages()
        started = events.SessionLog(status=events.SessionLog.START)
        self._write(events.Event(wall_time=time.time(), step=resume_step + 1, session_log=started))

    def _write(self, event: Any) -> None:
        self._file.write_event(event)
        self._file.flush()

    def _add(self, step: int, summary: Any) -> None:
        events, _ = _messages()
        self._write(events.Event(wall_time=time.time(), step=step, summary=summary))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        _, summaries = _messages()
        entries = [summaries.Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._add(step, summaries.Summary(value=entries))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        from tensorboardX.summary import image as picture

        image = image[..., None] if image.ndim == 2 else image
        self._add(step, picture(name, image, dataformats="HWC"))

    def close(self) -> None:
        self._file.close()


class WeightsAndBiases:
    """A run of Weights & Biases (package `wandb`), whose local files lie in `directory/wandb`.

    A run that is continued is the same run there, by the id in `directory/wandb_id.txt`. Steps that it has already are
    not sent again: what follows from the checkpoint is equal, and its history cannot be changed. Where to and how is
    said by wandb's own variables: WANDB_PROJECT ("diffusion_jax" by default), WANDB_ENTITY, WANDB_MODE=offline.

    Raises InvalidInput where wandb is not installed or refuses, as without a key.
    """

    def __init__(self, directory: str | os.PathLike, config: Any = None):
        self._wandb = _wandb()
        root = epath.Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        stored = root / "wandb_id.txt"
        if not stored.exists():
            stored.write_text(uuid.uuid4().hex[:12] + "\n")
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "diffusion_jax"), id=stored.read_text().strip(), resume="allow",
                dir=os.fspath(root), name=root.name, config=config,
            )  # fmt: skip
        except Exception as error:
            raise InvalidInput(
                f"wandb does not start a run ({first_line(error)}): call `wandb login`, set WANDB_MODE=offline, or "
                "take wandb out of log_to."
            ) from error
        self._first = self._run.step

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self._first:
            self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        if step >= self._first:
            self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb() -> Any:
    """The package `wandb`; a folder `wandb`, which it leaves where it runs, is not it."""
    try:
        module = importlib.import_module("wandb")
    except ImportError:
        module = None
    if not hasattr(module, "init"):
        raise InvalidInput(
            "log_to names wandb, which is not installed: `pip install wandb`, or leave it out "
            f"(without it: {', '.join(name for name in WRITERS if name != 'wandb')})."
        )
    return module


class PictureFolder:
    """PNG files `<directory>/<name>_<step>.png`."""

    def __init__(self, directory: str | os.PathLike):
        self._directory = epath.Path(directory)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Figures have no place here."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        import imageio.v3 as iio

        self._directory.mkdir(parents=True, exist_ok=True)
        image = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        path = self._directory / f"{name.replace('/', '_')}_{step:07d}.png"
        path.write_bytes(iio.imwrite("<bytes>", image, extension=".png"))

    def close(self) -> None:
        """Every file is finished as it is written."""


class Several:
    """Hands everything to each of `writers`."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = tuple(writers)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        for writer in self.writers:
            writer.scalars(step, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        for writer in self.writers:
            writer.image(step, name, image)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def check_log_to(log_to: Sequence[str]) -> None:
    """Raises InvalidInput for a name that is not in `WRITERS`, and for `wandb` where it is not installed."""
    if isinstance(log_to, str) or not isinstance(log_to, Sequence):
        raise invalid("log_to", log_to, f"a list of names is needed, of {', '.join(WRITERS)}")
    for name in log_to:
        if name not in WRITERS:
            raise unknown("log_to", name, WRITERS)
    if "wandb" in log_to:
        _wandb()


def default_writer(
    workdir: str | os.PathLike | None,
    resume_step: int = 0,
    log_to: Sequence[str] = ("jsonl", "tensorboard"),
    config: Any = None,
) -> Several:
    """What a run writes to `workdir`; nothing without one, or on other processes.

    Always `metrics.jsonl` and the pictures; by name (`WRITERS`) further `tensorboard/`, `metrics.csv`, or a run of
    Weights & Biases, which is told the `config`.
    """
    if workdir is None or jax.process_index() != 0:
        return Several(())
    root = os.fspath(workdir)
    writers: list[Writer] = [JsonLines(os.path.join(root, "metrics.jsonl"), resume_step)]
    if "tensorboard" in log_to:
        writers.append(TensorBoard(os.path.join(root, "tensorboard"), resume_step))
    if "csv" in log_to:
        writers.append(Csv(os.path.join(root, "metrics.csv"), resume_step))
    if "wandb" in log_to:
        writers.append(WeightsAndBiases(root, config))
    return Several((*writers, PictureFolder(os.path.join(root, "pictures"))))
