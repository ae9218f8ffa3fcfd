"""How a run is asked to stop, and what it says when the system or one of its processes gives way."""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from diffusion_jax.errors import Halted
from diffusion_jax.reading import first_line
from diffusion_jax.training.damage import system_error

LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|heartbeat|coordination|barrier|preempt|peer|"
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b",
    re.IGNORECASE,
)
"""How the collectives and the coordination of JAX speak of a process that is gone."""


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Gives `at -> whether to stop now`: after SIGTERM or SIGINT, and at the same step in all processes.

    A second SIGINT raises KeyboardInterrupt. Outside of the main thread nobody is asked.
    """
    asked = threading.Event()
    several = jax.process_count() > 1
    if several:
        from jax.experimental.multihost_utils import reached_preemption_sync_point as reached
    else:
        reached = lambda at: asked.is_set()  # noqa: E731
    if threading.current_thread() is not threading.main_thread():
        yield reached
        return
    interrupted = threading.Event()

    def interrupt(*_: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        asked.set()
        with contextlib.suppress(OSError):
            # Not by print: the signal may have come in the middle of one.
            os.write(2, b"\nInterrupted: the run saves after this step and leaves; once more to leave at once.\n")
        if several:
            # What agrees on a step with the other processes listens to this signal alone.
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {signal.SIGINT: interrupt}
    if not several:
        handlers[signal.SIGTERM] = lambda *_: asked.set()
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield reached
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def going_on(workdir: Any) -> str:
    return "nothing was kept." if workdir is None else f"the same command goes on from what is in {workdir}."


@contextlib.contextmanager
def halting(workdir: Any) -> Iterator[None]:
    """Around steps: raises Halted, in a sentence, for a process that was lost and for what the system refuses."""
    try:
        yield
    except Exception as error:
        rest = f"; {going_on(workdir)}"
        count = jax.process_count()
        if count > 1 and isinstance(error, jax.errors.JaxRuntimeError | RuntimeError) and LOST.search(str(error)):
            raise Halted(f"One of the {count} processes of this run was lost ({first_line(error)}){rest}") from error
        if not isinstance(error, Halted) and isinstance(error, OSError) and (told := system_error(error)):
            raise Halted(f"The run stopped: {told}{rest}") from error
        raise
