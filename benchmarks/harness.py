"""How two programs are compared: interleaved turns, medians and spreads, and a bootstrap interval of their ratio.

A contender is a function without arguments that does the work and returns when the work is done. Contenders take turns
within each round, so whatever else the machine does falls on all of them alike; ratios are taken over whole rounds.
What is compared is in `benchmarks.cases`; the table is in `benchmarks.report`.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

PAUSE = 0.05
"""Seconds between two turns: threads of the library that has just run may spin for a while before they sleep."""

TURN = 0.05
"""A turn lasts at least about this many seconds: short work is called several times, and the mean is recorded."""


SETTLED = 5.0
"""Work shorter than this many seconds is called once, untimed, at the start of each turn: the other library has just
had the memory and the caches, and what is compared is each one's own steady state. Longer work settles by itself."""


class Summary(NamedTuple):
    """Seconds of one call: the median and the quartiles around it, over `count` turns."""

    median: float
    low: float
    high: float
    count: int


class Ratio(NamedTuple):
    """How many times faster ours is: the peer's median over ours, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def calls_per_turn(seconds: float, turn: float = TURN) -> int:
    """How often work of `seconds` is called in one turn."""
    return max(1, round(turn / max(seconds, 1e-6)))


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    pause: float = PAUSE,
    turn: float = TURN,
    settled: float = SETTLED,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one entry per round.

    Each round gives every contender one turn; the order is turned by one from round to round, so that nobody always
    follows the same neighbour. `warmup` untimed calls come first (compilation, caches, thread pools); the last of them
    says how many calls make a turn, and whether a turn begins with an untimed one (see `SETTLED`).
    """
    calls, settles = {}, {}
    for name, call in contenders.items():
        seconds = 0.0
        for _ in range(max(warmup, 1)):
            start = clock()
            call()
            seconds = clock() - start
        calls[name] = calls_per_turn(seconds, turn)
        settles[name] = seconds < settled
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            sleep(pause)
            call = contenders[name]
            if settles[name]:
                call()
            start = clock()
            for _ in range(calls[name]):
                call()
            times[name].append((clock() - start) / calls[name])
    return times


def summarise(seconds: Sequence[float]) -> Summary:
    """Median and quartiles."""
    low, median, high = np.percentile(np.asarray(seconds, np.float64), [25, 50, 75])
    return Summary(float(median), float(low), float(high), len(seconds))


def ratio(peer: Sequence[float], ours: Sequence[float], resamples: int = 4000, seed: int = 0) -> Ratio:
    """median(peer) / median(ours), and the 2.5 and 97.5 percentiles of it when *rounds* are drawn with replacement.

    Rounds stay whole: what slowed one contender in a round may have slowed the other too.
    """
    peer, ours = np.asarray(peer, np.float64), np.asarray(ours, np.float64)
    if peer.shape != ours.shape or peer.ndim != 1 or not peer.size:
        raise ValueError(f"both need the same number of rounds, at least one; got {peer.shape} and {ours.shape}.")
    rounds = np.random.default_rng(seed).integers(0, len(ours), (resamples, len(ours)))
    ratios = np.median(peer[rounds], axis=1) / np.median(ours[rounds], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Ratio(float(np.median(peer) / np.median(ours)), float(low), float(high))


def processor() -> str:
    """The name of the processor, as the operating system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


VECTORS = {"avx512f": 512, "avx2": 256, "avx": 256, "sse2": 128, "sve": 128, "asimd": 128}
"""What Linux calls a processor's vector instructions, the widest first, and the bits of a vector."""


def vector_bits() -> int | None:
    """The vector width of the processor in bits, where Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next(line for line in lines if line.startswith(("flags", "Features"))).split()
    except (OSError, StopIteration):
        return None
    return next((bits for name, bits in VECTORS.items() if name in flags), None)
