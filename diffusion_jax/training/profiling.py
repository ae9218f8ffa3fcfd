"""A profiler trace of some steps of a run, by `jax.profiler`."""

import os
from typing import Any

import jax

from diffusion_jax.errors import invalid


def check_profile(profile: tuple[int, int] | None, steps: int, workdir: Any) -> None:
    """Raises InvalidInput for a trace that does not lie within the run, or has no folder to be written to."""
    if profile is None:
        return
    first, last = profile
    if not 0 <= first < last <= steps:
        told = f"two steps are needed, the first below the second, within 0 .. {steps}, the steps of the run"
        raise invalid("profile", f"{first}:{last}", told)
    if workdir is None:
        raise invalid("profile", f"{first}:{last}", "a trace is written into the workdir, and there is none")


class Profile:
    """A trace of what runs from the end of step `first` to that of step `last`, in `workdir/profile`.

    It is for TensorBoard (with its plugin `xprof`), and `perfetto_trace.json.gz` for https://ui.perfetto.dev.
    Raises InvalidInput where the run goes on behind `first`.
    """

    def __init__(self, profile: tuple[int, int] | None, workdir: str | os.PathLike | None, at: int, steps: int):
        self._first, self._last = profile or (-1, -1)
        self._folder = os.path.join(os.fspath(workdir or ""), "profile")
        self._running = False
        if profile is not None and self._first < at < steps:
            told = f"the run goes on at step {at}: only later steps can be traced"
            raise invalid("profile", f"{self._first}:{self._last}", told)

    def due(self, at: int) -> bool:
        """Whether the trace begins or ends after step `at`."""
        return at == (self._last if self._running else self._first)

    def turn(self) -> None:
        """Begins the trace, or ends it. All steps before must be finished."""
        if self._running:
            self.close()
            return
        jax.profiler.start_trace(self._folder, create_perfetto_trace=jax.process_index() == 0)
        self._running = True

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self._running:
            self._running, self._first = False, -1
            jax.profiler.stop_trace()
