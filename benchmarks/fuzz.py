"""`python -m benchmarks.fuzz`: changed configs and damaged files, each of which must be read right or be refused in one
sentence: never a traceback, a hang, or memory without a bound.

Cases are drawn by hypothesis from a seed. They run in a worker process whose memory and whose time for each case are
limited; a worker that dies is counted and started again behind the case. Writes `results/fuzz.json`.
"""

import argparse
import collections
import json
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.report import RESULTS, environment

RIGHT, REFUSED = "right", "refused"
GOOD = (RIGHT, REFUSED)
BAD = ("traceback", "unclear", "hang", "memory")

SECONDS = 30
"""What a case may take; slow ones trace a whole network."""

GIGABYTES = 6
"""What a worker may take beyond what it has once everything is imported."""


class TookTooLongError(BaseException):
    """Raised in a case by the clock. Nothing that catches exceptions catches it."""


def outcome(run, folder: Path, seconds: float = SECONDS) -> tuple[str, str]:
    """What became of a case, and its sentence or the last line of its traceback."""
    from diffusion_jax.errors import InvalidInput

    def ring(*_):
        raise TookTooLongError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        run(folder)
        return RIGHT, ""
    except InvalidInput as error:
        text = str(error)
        return (REFUSED if text.strip() and "\n" not in text and len(text) < 2000 else "unclear"), text[:300]
    except TookTooLongError:
        return "hang", traceback.format_exc()[-300:]
    except MemoryError:
        return "memory", traceback.format_exc()[-300:]
    except Exception as error:
        at = [f for f in traceback.extract_tb(error.__traceback__) if "diffusion_jax" in f.filename][-1:]
        where = f"{Path(at[0].filename).name}:{at[0].lineno} " if at else ""
        return "traceback", f"{where}{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def work(what: str, count: int, number: int, skip: int) -> None:
    """The worker: a line of JSON for each case from `skip` on."""
    import warnings

    import absl.logging

    from benchmarks import fuzz_cases

    warnings.simplefilter("ignore")
    absl.logging.set_verbosity(absl.logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        if what == "configs":
            cases = fuzz_cases.config_cases(count, number)
        else:
            readers = fuzz_cases.CHEAP | fuzz_cases.RUN | fuzz_cases.Checkpoints(root / "checkpoints").readers()
            cases = fuzz_cases.file_cases(count, number, readers, root)
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + GIGABYTES * 2**30
        limited = False
        for i, case in enumerate(cases):
            if i < skip:
                continue
            if not limited:  # by now everything is imported and made
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                limited = True
            with tempfile.TemporaryDirectory(dir=root) as folder:
                begun = time.perf_counter()
                became, told = outcome(case.run, Path(folder))
                seconds = round(time.perf_counter() - begun, 2)
            print(json.dumps([i, case.kind, became, told, case.about, seconds]), flush=True)


def worked(what: str, count: int, number: int) -> Iterable[tuple[int, str, str, str, str, float]]:
    """The results of all cases, by as many workers as it takes."""
    done = 0
    while done < count:
        command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", what]
        command += ["--count", str(count), "--seed", str(number), "--skip", str(done)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as worker:
            assert worker.stdout is not None
            waiting = selectors.DefaultSelector()
            waiting.register(worker.stdout, selectors.EVENT_READ)
            patience = 10 * SECONDS  # importing and making what is to be damaged
            died, first = "", done
            while not died:
                if not waiting.select(patience):
                    died = "hang"
                    worker.kill()
                elif line := worker.stdout.readline():
                    if line.startswith("["):
                        yield tuple(json.loads(line))
                        done, patience = done + 1, 2 * SECONDS
                else:
                    died = "memory" if worker.wait() else "finished"
        if died != "finished" and done == first == 0:
            raise SystemExit("error: the worker could not begin; its last words are above.")
        if died != "finished" and done < count:
            yield done, f"{what} (the worker died)", died, f"case {done}", "", 0.0
            done += 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--configs", type=int, default=1000, help="how many configs (default 1000)")
    parser.add_argument("--files", type=int, default=1000, help="how many files (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default 0)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where fuzz.json is written")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        work(arguments.worker, arguments.count, arguments.seed, arguments.skip)
        return 0
    tally: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    wrong, begun = [], time.perf_counter()
    for what, count in (("configs", arguments.configs), ("files", arguments.files)):
        for _, kind, became, told, about, seconds in worked(what, count, arguments.seed):
            tally[kind][became] += 1
            if became in BAD:
                wrong.append({"kind": kind, "became": became, "told": told, "case": about, "seconds": seconds})
                print(f"{became}: {kind}: {told} [{about}]", flush=True)
    print(table(tally))
    arguments.results.mkdir(parents=True, exist_ok=True)
    record = {
        "name": "fuzz",
        "command": " ".join(["python -m benchmarks.fuzz", *(sys.argv[1:] if argv is None else argv)]),
        "seconds": round(time.perf_counter() - begun, 1),
        "environment": environment("cpu"),
        "tally": tally,
        "wrong": wrong,
    }
    path = arguments.results / "fuzz.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 1 if wrong else 0


def table(tally: dict[str, collections.Counter]) -> str:
    """The tally in lines: how many cases of each kind were tried, and what became of them."""
    columns = [*GOOD, *BAD]
    lines = [f"{'':28}{'tried':>7}" + "".join(f"{name:>11}" for name in columns)]
    total = sum(tally.values(), collections.Counter())
    for kind, counts in [*sorted(tally.items()), ("all", total)]:
        lines.append(f"{kind:28}{counts.total():7}" + "".join(f"{counts[name]:11}" for name in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
