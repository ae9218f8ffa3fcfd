"""Where a run's figures and pictures go: one protocol, and its JSONL, TensorBoard and memory forms.

A writer that continues a run forgets what was written after the step it resumes from, so the log of a run that was
killed equals that of one that was not.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath

from diffusion_jax.reading import regular_file


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


def default_writer(workdir: str | os.PathLike | None, resume_step: int = 0) -> Several:
    """`metrics.jsonl`, TensorBoard events and pictures in `workdir`; nothing without one, or on other processes."""
    if workdir is None or jax.process_index() != 0:
        return Several(())
    root = os.fspath(workdir)
    return Several(
        (
            JsonLines(os.path.join(root, "metrics.jsonl"), resume_step),
            TensorBoard(os.path.join(root, "tensorboard"), resume_step),
            PictureFolder(os.path.join(root, "pictures")),
        )
    )
