"""`python -m benchmarks.chaos`: kills runs of the real command line at any instant and sees what is left of them.

A tiny model is trained by `diffusion_jax.train` in processes that are killed, interrupted, damaged or denied the disk,
and started again until they are done. Then everything that the run keeps (state, averages, position in the data,
snapshots, log) is compared bit for bit with a run that nothing happened to. `--quick` is the version of the tests.

Processes are forked from this one, which has imported everything and computed nothing, and share one cache of compiled
programs, so a start costs a second or two. Steps are paced by a sleep, so that a signal finds each part of a run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.chaos_runs import PACE, STEPS, Run, finished, kept

AT_ONCE = 4
"""How often a run is struck before it is finished and compared."""


class Kind(NamedTuple):
    """What is done to runs. full: how often; quick: whether in the quick version too. codes: the documented exit codes.

    strike: `(run, chance) -> None`, on a run that has just been started. processes: of which the run consists.
    """

    full: int
    quick: bool
    codes: tuple[int, ...]
    strike: Callable[["Run", random.Random], None]
    processes: int = 1
    limit: int | None = None


class Tally(NamedTuple):
    """tried: how often it was done. documented: the processes ended with a documented code, without a traceback.

    recovered: the same command went on and finished. equal: what was then kept is that of a run that nothing happened
    to, bit for bit. lost: a checkpoint that was finished before was gone or unreadable after, or the run did not go on.
    """

    tried: int = 0
    documented: int = 0
    recovered: int = 0
    equal: int = 0
    lost: int = 0


def at_any_instant(*numbers: int, to: slice = slice(None)) -> Callable[[Run, random.Random], None]:
    """Signals at a time drawn from all of a run, its start included."""

    def strike(run, chance):
        # A run that goes on has less to do.
        made = finished(run.workdir)[-1] if finished(run.workdir) else 0
        moment = run.begun + chance.uniform(0, run.usual - made * PACE)
        run.until(lambda: time.monotonic() > moment)
        run.send(*numbers, to=to)

    return strike


def in_the_start(run, chance):
    moment = run.begun + chance.uniform(0, 0.5 * run.usual)
    run.until(lambda: time.monotonic() > moment)
    run.send(signal.SIGKILL)


def while_training(*numbers: int, to: slice = slice(None)) -> Callable[[Run, random.Random], None]:
    """Signals after a step was made."""

    def strike(run, chance):
        log = run.workdir / "metrics.jsonl"
        before = log.stat().st_size if log.is_file() else 0
        run.until(lambda: log.is_file() and log.stat().st_size > before + 400)
        time.sleep(chance.uniform(0, STEPS * PACE / 3))
        if run.running():
            run.send(*numbers, to=to)

    return strike


def while_writing(run, chance):
    run.until(run.saving)
    time.sleep(chance.uniform(0, 0.02))
    run.send(signal.SIGKILL)


def in_the_last_save(run, chance):
    run.until(lambda: run.saving(STEPS))
    time.sleep(chance.uniform(0, 0.02))
    run.send(signal.SIGKILL)


def by_damage(run, chance):
    """Kills a run that has two checkpoints and damages a file of the newest."""
    run.until(lambda: len(run.finished()) > 1 and not run.saving())
    run.send(signal.SIGKILL)
    run.end()
    if len(run.finished()) < 2:
        return
    newest = run.workdir / "checkpoints" / str(run.finished()[-1])
    path = chance.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    content = path.read_bytes()
    how = chance.choice(("flipped", "cut", "null", "gone"))
    if how == "gone":
        path.unlink()
    elif how == "flipped" and content:
        place, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"null")


def nothing(run, chance):
    """The disk does it."""


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
KINDS = {
    "SIGKILL while a checkpoint is written": Kind(12, True, (-9,), while_writing),
    "a damaged or missing file": Kind(16, True, (-9,), by_damage),
    "SIGKILL at any instant": Kind(32, True, (-9,), at_any_instant(KILL)),
    "SIGKILL during start-up": Kind(10, False, (-9,), in_the_start),
    "SIGTERM": Kind(12, False, (0, -15), at_any_instant(TERM)),
    "SIGINT": Kind(12, True, (0, 130), at_any_instant(INT)),
    "SIGTERM, then SIGINT": Kind(10, False, (0, -15, 130), while_training(TERM, INT)),
    "SIGINT twice": Kind(8, False, (0, 130), while_training(INT, INT)),
    "a full disk": Kind(8, True, (2, 3), nothing, limit=6000),
    "SIGKILL in the last save": Kind(8, True, (-9,), in_the_last_save),
    "two processes, SIGKILL of the second": Kind(3, False, (-9, 3), while_training(KILL, to=slice(1, 2)), 2),
    "two processes, SIGKILL of both": Kind(3, False, (-9,), while_training(KILL), 2),
    "two processes, SIGTERM of one": Kind(3, False, (0, -15, 3), while_training(TERM, to=slice(1, 2)), 2),
    "two processes, SIGINT of both": Kind(3, False, (0, 130), while_training(INT), 2),
}


def struck(
    plan: Sequence[tuple[str, Kind]], folder: Path, usual: float, whole: str, chance: random.Random
) -> tuple[list[tuple[str, Tally]], int]:
    """Does to one run what is planned, one start after the other, as far as it comes before it is done; then finishes
    it. Returns what came of each, and how many strikes came too late."""
    workdir = folder / f"run{time.time_ns()}"
    found, damaged, late = [], False, 0
    for title, kind in plan:
        before = finished(workdir)
        run = Run(workdir, kind.processes, kind.limit)
        run.usual = usual
        kind.strike(run, chance)
        codes = run.end()
        if all(code == 0 for code in codes) and "Trained" in run.said():
            late = 1
            break
        documented = set(codes) <= set(kind.codes) and "Traceback" not in run.said()
        after = finished(workdir)
        gone = bool(before) and not damaged and (not after or after[-1] < before[-1])
        if not documented or gone:
            print(f"    {title}: codes {codes}, checkpoints {before} -> {after}:\n{run.said()[-3000:]}")
        found.append((title, documented, gone or ("damaged" in run.said() and not damaged)))
        damaged = kind.strike is by_damage or (damaged and after == before)
        if STEPS in after:
            break
    rest = Run(workdir, plan[0][1].processes)
    done = all(code == 0 for code in rest.end()) and f"Trained {STEPS} steps" in rest.said()
    equal = done and kept(workdir) == whole
    if not equal:
        print(f"    not {'equal' if done else 'finished'} after {[one[0] for one in found]}:\n{rest.said()[-3000:]}")
    unexpected = "damaged" in rest.said() and not damaged
    for output in folder.glob(f"{workdir.name}-*.txt"):
        output.unlink()
    shutil.rmtree(workdir)
    return [
        (title, Tally(1, int(fine), int(done), int(equal), int(lost or not done or unexpected)))
        for title, fine, lost in found
    ], late


def plans(quick: bool, names: Sequence[str]) -> list[list[tuple[str, Kind]]]:
    """What is to be done to runs: of each kind up to four times to one; `quick`: everything once, to the same run."""
    chosen = [(title, kind) for title, kind in KINDS.items() if not names or any(name in title for name in names)]
    if quick:
        return [[one for one in chosen if one[1].quick]]
    return [
        [(title, kind)] * min(AT_ONCE, kind.full - begun)
        for title, kind in chosen
        for begun in range(0, kind.full, AT_ONCE)
    ]


def chaos(quick: bool, seed: int, names: Sequence[str] = ()) -> dict[str, Tally]:
    """The tally of each kind."""
    chance = random.Random(seed)
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(prefix="chaos") as name:
        folder = Path(name)
        whole, usual = {}, {}
        for plan in plans(quick, names):
            processes = plan[0][1].processes
            if processes not in whole:
                # The second is the usual one: the first compiles, for about half of its time.
                for turn in ("first",) if quick else ("first", "second"):
                    run = Run(folder / f"{turn}-of-{processes}", processes)
                    if any(run.end()):
                        raise SystemExit(f"error: a run that nothing happens to ends with {run.codes}:\n{run.said()}")
                    usual[processes] = (time.monotonic() - run.begun) / (2 if quick else 1)
                whole[processes] = kept(run.workdir)
            late = 0
            while plan and late < 10:
                found, more = struck(plan, folder, usual[processes], whole[processes], chance)
                late += more
                plan = plan[len(found) :]
                for title, one in found:
                    tallies[title] = Tally(*map(sum, zip(tallies.get(title, Tally()), one)))
                    print(f"  {title}: {_told(tallies[title])}", flush=True)
    return tallies


def _told(tally: Tally) -> str:
    return ", ".join(f"{name} {value}" for name, value in tally._asdict().items())


def total(tallies: dict[str, Tally]) -> Tally:
    return Tally(*map(sum, zip(*tallies.values()))) if tallies else Tally()


def table(tallies: dict[str, Tally]) -> str:
    lines = ["| what was done to runs | tried | ended as documented | recovered | equal bit for bit | lost |"]
    lines.append("|---|---|---|---|---|---|")
    for title, tally in [*tallies.items(), ("**all**", total(tallies))]:
        lines.append("| " + " | ".join([title, *map(str, tally)]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="kinds whose title holds one of these words; all when absent")
    parser.add_argument("--quick", action="store_true", help="six kinds, once each")
    parser.add_argument("--seed", type=int, default=0, help="of the instants that are drawn")
    parser.add_argument(
        "--results", type=Path, help="where to write chaos.json and chaos.md (default: nowhere if quick)"
    )
    arguments = parser.parse_args(argv)
    temporary = tempfile.mkdtemp(prefix="chaos-compiled")
    # Tests share one cache of compiled programs.
    shared = os.environ.get("JAX_COMPILATION_CACHE_DIR") if arguments.quick else None
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        # Compiled in a third of the time; equality is then of runs that are all compiled so.
        "XLA_FLAGS": "--xla_backend_optimization_level=0" if arguments.quick else "",
        "JAX_COMPILATION_CACHE_DIR": shared or temporary,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    begun = time.perf_counter()
    # Before the first fork, so that no process does it again.
    import tensorboardX  # noqa: F401 (imports torch, where there is one)

    import diffusion_jax.train  # noqa: F401
    from benchmarks.report import RESULTS, environment

    try:
        tallies = chaos(arguments.quick, arguments.seed, arguments.names)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(table(tallies))
    folder = arguments.results or (None if arguments.quick or arguments.names else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        result = {
            "command": "python -m benchmarks.chaos" + (" --quick" if arguments.quick else ""),
            "seconds": time.perf_counter() - begun,
            "seed": arguments.seed,
            "environment": environment("cpu"),
            "tally": {title: tally._asdict() for title, tally in tallies.items()},
        }
        (folder / "chaos.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (folder / "chaos.md").write_text(
            f"# Chaos\n\nWritten by `{result['command']}`: {__doc__.partition(':')[2].strip().splitlines()[0]}\n\n"
            f"{table(tallies)}\n\nTried: {Tally.__doc__.partition('tried: ')[2].strip()}\n",
            encoding="utf-8",
        )
    every = total(tallies)
    return 0 if every.tried == every.equal == every.documented and not every.lost else 1


if __name__ == "__main__":
    sys.exit(main())
