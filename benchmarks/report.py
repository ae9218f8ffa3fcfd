"""What a benchmark writes: `results/<name>.json`, and the page `results/README.md` made from all of them."""

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness import Ratio, Summary, processor, vector_bits
from diffusion_jax.malloc import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
NO_TIMINGS = ("chaos", "fuzz", "parity", "students_digits", "students_fashion_mnist")
"""Results that are no times, and have no place on the page of timings."""

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "numpy")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: one program, against one peer or against a limit.

    case: what was run. peer: whom it was compared with, empty when nobody.
    ours, theirs: seconds. ratio: how many times faster ours is.
    aim: the smallest ratio that was hoped for, or with `limit` the largest number of seconds.
    compile_seconds: first call, nothing cached, minus a later call. memory, their_memory: peak resident MiB while
    running, libraries included. note: what else there is to say, in words.
    """

    case: str
    ours: Summary
    peer: str = ""
    theirs: Summary | None = None
    ratio: Ratio | None = None
    aim: float | None = None
    limit: float | None = None
    compile_seconds: float | None = None
    memory: float | None = None
    their_memory: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the aim is reached; None where there is none."""
        if self.limit is not None:
            return self.ours.median <= self.limit
        if self.aim is None or self.ratio is None:
            return None
        return self.ratio.value >= self.aim


@dataclasses.dataclass(frozen=True)
class Result:
    """All rows of one benchmark, and the conditions under which they were measured."""

    name: str
    command: str
    seconds: float
    environment: dict
    rows: Sequence[Row]


def environment(device: str) -> dict:
    """Hardware, versions, load of the machine at the start, and date."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "vector_bits": vector_bits(),
        "allocator": str(keep_freed_memory()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": device,
        "python": platform.python_version(),
        "versions": versions,
        "load_before": round(os.getloadavg()[0], 2),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write(result: Result, folder: Path = RESULTS) -> Path:
    """Writes `<folder>/<name>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    path.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> Result:
    """Reads what `write` wrote."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    return Result(**{**fields, "rows": tuple(_row(row) for row in fields["rows"])})


def _row(fields: dict) -> Row:
    def made(kind, name):
        return None if fields[name] is None else kind(*fields[name])

    return Row(
        **{**fields, "ours": made(Summary, "ours"), "theirs": made(Summary, "theirs"), "ratio": made(Ratio, "ratio")}
    )


def write_page(folder: Path = RESULTS) -> Path:
    """Writes `<folder>/README.md` from every `*.json` beside it."""
    path = folder / "README.md"
    files = [file for file in sorted(folder.glob("*.json")) if file.stem not in NO_TIMINGS]
    path.write_text(page([read(file) for file in files]), encoding="utf-8")
    return path


def page(results: Sequence[Result]) -> str:
    """The results in Markdown, those that miss their aim included."""
    lines = [
        "# Timings",
        "",
        "Written by `python -m benchmarks.run` (`make bench`). Contenders take turns in one process with the same",
        "number of threads; a turn of less than five seconds begins with an untimed call. A time is the median of the",
        "rounds with its quartiles, *faster* is the peer's median over ours with a 95 % bootstrap interval over rounds",
        "(above 1: ours is faster). Compilation is not in the times: *compile* is the first call without any cache.",
        "Memory is the peak resident size of a process of its own while it runs, libraries included.",
    ]
    for result in results:
        env = result.environment
        versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
        lines += [
            "",
            f"## {result.name}",
            "",
            f"`{result.command}`, {result.seconds:.0f} s. {env['device']}; {env['processor']}, {env['cores']} cores"
            f"{_vectors(env)}{_allocator(env)}; "
            f"Python {env['python']}, {versions}; load before {env['load_before']}; {env['date']}.",
            "",
            "| case | ours | peer | peer's | faster | aim | compile | memory, ours / peer | |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in result.rows]
    return "\n".join(lines) + "\n"


def _vectors(env: dict) -> str:
    return f" with vectors of {env['vector_bits']} bits" if env.get("vector_bits") else ""


def _allocator(env: dict) -> str:
    return f"; malloc: {env['allocator']}" if "allocator" in env else ""


def _line(row: Row) -> str:
    aim = "" if row.holds is None else (f"≤ {row.limit:g} s" if row.limit is not None else f"≥ {row.aim:g}×")
    if row.holds is not None:
        aim += ": reached" if row.holds else ": **missed**"
    ratio = "" if row.ratio is None else f"{row.ratio.value:.2f}× ({row.ratio.low:.2f} to {row.ratio.high:.2f})"
    compiled = "" if row.compile_seconds is None else f"{row.compile_seconds:.1f} s"
    memory = " / ".join("" if size is None else f"{size:.0f} MiB" for size in (row.memory, row.their_memory))
    cells = (
        row.case,
        spoken(row.ours),
        row.peer,
        spoken(row.theirs),
        ratio,
        aim,
        compiled,
        memory.strip(" /"),
        row.note,
    )
    return "| " + " | ".join(cells) + " |"


def spoken(summary: Summary | None) -> str:
    """A time with its quartiles, in seconds or milliseconds."""
    if summary is None:
        return ""
    unit, scale = ("s", 1.0) if summary.median >= 1 else ("ms", 1e3)
    median, low, high = (f"{value * scale:.3g}" for value in summary[:3])
    return f"{median} {unit}" + (f" ({low} to {high})" if summary.count > 1 else "")
