"""What a person sees of a long run: "compiling", then a bar or lines with the rate of finished steps and the time left.

JAX returns before a step is done, so a step counts when its result is there. What else a run does (compiling, drawing
pictures, saving) is kept apart: it changes neither the rate nor, but for its own share, the time left.
"""

import contextlib
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tqdm.auto import tqdm

from diffusion_jax.typing import Number

AHEAD = 8
"""Steps that may be waiting for the device: enough to keep it busy, few enough that their batches fit."""

HALF_LIFE = 30.0
"""Seconds after which a step counts half in the rate that a bar shows."""

REFRESH = 0.5
"""Seconds between two changes of the figures beside a bar."""


def duration(seconds: Number) -> str:
    """`0:45`, `2:10`, `1:03:20` or `2 d 03:10:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def per_second(rate: Number, unit: str) -> str:
    """A rate with three digits: `12.3 steps/s`, `1,574 examples/s`; of slow ones the seconds of each: `4.2 s/step`."""
    if rate >= 1:
        return f"{rate:,.{0 if rate >= 100 else 1}f} {unit}s/s"
    return f"{1 / rate:.3g} s/{unit}" if rate > 0 else f"0 {unit}s/s"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


@contextlib.contextmanager
def announced(what: str, shown: bool = True) -> Iterator[None]:
    """Prints `what ...` at once, and behind it how long it took: `Compiling the training step ... 12.3 s`."""
    begun = time.perf_counter()
    if shown:
        print(f"{what} ...", end="", flush=True)
    ending = ""
    try:
        yield
        ending = f" {time.perf_counter() - begun:.1f} s"
    finally:
        if shown:
            print(ending, flush=True)


class Pace:
    """How fast steps are finished, and what the time was spent on.

    now: a clock in seconds. The rate counts the seconds in which steps ran; `apart` keeps everything else out of it.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.spent: Counter[str] = Counter()
        self._now, self._waiting = now, deque()
        self._since = now()
        self._smooth_steps, self._smooth_seconds = 0.0, 0.0
        self._steps, self._seconds = 0, 0.0
        self._least: dict[str, float] = {}

    def started(self, result: Any) -> int:
        """Takes note of a step that was started, by a result of it; returns how many steps have finished since.

        It waits, if at all, for a step that was started `AHEAD` steps before, so that the device never idles for it.
        """
        self._waiting.append(result)
        if len(self._waiting) > AHEAD:
            self._waiting[0].block_until_ready()
        return self._finished()

    def finish(self) -> int:
        """Waits for all steps that were started; returns how many have finished since the last call."""
        if self._waiting:
            self._waiting[-1].block_until_ready()
        return self._finished()

    def _finished(self) -> int:
        count = 0
        while self._waiting and self._waiting[0].is_ready():
            self._waiting.popleft()
            count += 1
        if count:
            now = self._now()
            seconds, self._since = max(now - self._since, 0.0), now
            kept = 0.5 ** (seconds / HALF_LIFE)
            self._smooth_steps = self._smooth_steps * kept + count
            self._smooth_seconds = self._smooth_seconds * kept + seconds
            self._steps, self._seconds = self._steps + count, self._seconds + seconds
            self.spent["steps"] += seconds  # pyright: ignore[reportArgumentType]: counts of seconds
        return count

    @contextlib.contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """What happens within is no step. Call `finish` before."""
        begun = self._now()
        try:
            yield
        finally:
            self._since = self._now()
            seconds = self._since - begun
            self.spent[what] += seconds  # pyright: ignore[reportArgumentType]
            # The first one compiles: it says nothing of the others.
            self._least[what] = min(seconds, self._least[what] or seconds) if what in self._least else 0.0

    def window(self) -> float | None:
        """Steps a second since the last call; None where none was finished."""
        steps, seconds, self._steps, self._seconds = self._steps, self._seconds, 0, 0.0
        return steps / max(seconds, 1e-9) if steps else None

    def smooth(self) -> float | None:
        """Steps a second of the last half minute or so."""
        return self._smooth_steps / max(self._smooth_seconds, 1e-9) if self._smooth_steps else None

    def left(self, at: int, total: int, breaks: Mapping[str, int]) -> float | None:
        """Seconds from step `at` to step `total`; breaks: every how many steps something `apart` comes, by its name."""
        rate = self.smooth()
        if rate is None:
            return None
        between = sum((total // every - at // every) * self._least.get(what, 0.0) for what, every in breaks.items())
        return (total - at) / rate + between


class Progress:
    """Shows steps as they are finished: a bar in a terminal or a notebook, and else a line for each `log`.

    total, at: steps in all, and those made before. examples: in a step. breaks: see `Pace.left`. peak_share: the share
    of the devices' peak that one step a second would be; None where that is not known.
    shown: whether to show anything; the pace is measured anyway.
    """

    def __init__(
        self,
        total: int,
        at: int,
        examples: int,
        breaks: Mapping[str, int],
        *,
        peak_share: Number | None = None,
        shown: bool = True,
        stream: Any = None,
    ):
        self._total, self._at, self._examples = total, at, examples
        self._breaks, self._peak_share, self._shown = breaks, peak_share, shown
        self._stream = sys.stderr if stream is None else stream
        self._loss, self._drawn = "", -REFRESH
        self._pace, self._bar = Pace(), None

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Around the first step of this process, until it is finished; the bar begins behind it."""
        with announced("Compiling the training step", self._shown), self._pace.apart("compiling"):
            yield
        self._at += 1
        if self._shown and (self._stream.isatty() or in_notebook()):
            self._bar = tqdm(
                total=self._total, initial=self._at, unit="step", dynamic_ncols=True, file=self._stream,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )  # fmt: skip

    def started(self, result: Any) -> None:
        """A step was started; result: an array that is there when the step is done."""
        self._advance(self._pace.started(result))

    @contextlib.contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """What happens within is no step: its time is told at the end under `what`."""
        self._advance(self._pace.finish())
        with self._pace.apart(what):
            yield

    def _advance(self, count: int) -> None:
        self._at += count
        if self._bar is None or not count:
            return
        if time.monotonic() - self._drawn > REFRESH or self._at >= self._total:
            self._drawn = time.monotonic()
            figures = [self._loss, *self._figures(self._pace.smooth())]
            self._bar.set_postfix_str(", ".join(filter(None, figures)), refresh=False)
        self._bar.update(count)

    def rates(self) -> dict[str, float]:
        """What is logged of the steps since the last call; all steps that were started are waited for."""
        self._advance(self._pace.finish())
        rate = self._pace.window()
        if rate is None:
            return {}
        values = {"steps_per_second": rate, "examples_per_second": rate * self._examples}
        return values if self._peak_share is None else {**values, "mfu": rate * self._peak_share}

    def log(self, loss: Number, rates: Mapping[str, Number]) -> None:
        """Shows a record of the log: beside the bar of a notebook, above the bar of a terminal, or as a line."""
        self._loss = f"loss {loss:.4g}"
        if not self._shown or (self._bar is not None and in_notebook()):
            return
        width = len(f"{self._total:,}")
        head = f"step {self._at:>{width},} of {self._total:,}   loss {loss:<10.4g}"
        line = "   ".join([head, *self._figures(rates.get("steps_per_second"))]).rstrip()
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line)

    def _figures(self, rate: Number | None) -> list[str]:
        if rate is None:
            return []
        told = [per_second(rate, "step"), per_second(rate * self._examples, "example")]
        if self._peak_share is not None:
            told.append(f"MFU {rate * self._peak_share:.1%}")
        left = self._pace.left(self._at, self._total, self._breaks)
        return told if left is None or self._at >= self._total else [*told, f"{duration(left)} left"]

    def close(self) -> None:
        """Ends the bar, and says what the time was spent on."""
        if self._bar is not None:
            self._bar.close()
        spent = [f"{what} {duration(seconds)}" for what, seconds in self._pace.spent.most_common() if seconds >= 0.5]
        if self._shown and len(spent) > 1:
            print(f"Time spent: {', '.join(spent)}.", flush=True)
