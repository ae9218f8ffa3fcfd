"""`python -m benchmarks.chaos`: kills runs of the real command line at any instant and sees what is left of them.

A tiny model is trained by `diffusion_jax.train` in processes that are killed, interrupted, damaged or denied the disk,
and started again until they are done. Then everything that the run keeps (state, averages, position in the data,
snapshots, log) is compared bit for bit with a run that nothing happened to. `--quick` is the version of the tests.

Processes are forked from this one, which has imported everything and computed nothing, and share one cache of compiled
programs, so a start costs a second or two. Steps are paced by a sleep, so that a signal finds each part of a run.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

STEPS, PACE = 32, 0.02
"""As many steps as `chaos_config` says, and seconds between them."""

PATIENCE = 4.0
"""Seconds after which the processes of a run of two miss each other here."""

AT_ONCE = 4
"""How often a run is struck before it is finished and compared."""

LIMIT = 120.0
"""Seconds after which a process counts as hanging."""


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


class Run:
    """One start of the command: processes, forked here, and their outputs."""

    def __init__(self, workdir: Path, processes: int = 1, limit: int | None = None):
        self.workdir, self.begun = workdir, time.monotonic()
        variables = {}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
        self.outputs = [workdir.parent / f"{workdir.name}-{time.time_ns()}-{number}.txt" for number in range(processes)]
        self.pids = [
            _forked(workdir, output, {**variables, "JAX_PROCESS_ID": str(number)} if variables else {}, limit)
            for number, output in enumerate(self.outputs)
        ]
        self.codes: dict[int, int] = {}

    def running(self) -> bool:
        for pid in set(self.pids) - set(self.codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def until(self, condition: Callable[[], bool]) -> None:
        while self.running() and not condition():
            time.sleep(0.004)

    def send(self, *numbers: int, to: slice = slice(None)) -> None:
        for number in numbers:
            for pid in self.pids[to]:
                if pid not in self.codes:
                    os.kill(pid, number)

    def end(self) -> list[int]:
        """The exit codes, in the order of the processes; those that hang are killed and have the code None."""
        deadline = time.monotonic() + LIMIT
        self.until(lambda: time.monotonic() > deadline)
        hanging = [pid for pid in self.pids if pid not in self.codes]
        for pid in hanging:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return [self.codes.get(pid) for pid in self.pids]

    def said(self) -> str:
        return "\n".join(output.read_text(errors="replace") for output in self.outputs)

    def finished(self) -> list[int]:
        """Steps that have a finished checkpoint."""
        return finished(self.workdir)

    def saving(self, step: int | str = "*") -> bool:
        return any((self.workdir / "checkpoints").glob(f"{step}.orbax-checkpoint-tmp*"))


def finished(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.is_dir() else []


def _forked(workdir: Path, output: Path, variables: dict[str, str], limit: int | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        written = os.open(output, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(written, stream)
        os.environ.update(variables)
        if limit is not None:
            # A file that grows beyond fails as on a full disk: the system refuses the write.
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = _train(workdir)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
        if not isinstance(leaving.code, int):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _train(workdir: Path) -> int:
    import jax

    from diffusion_jax import train, training
    from diffusion_jax.command import leave, run_command
    from diffusion_jax.training import peers

    peers.PATIENCE = PATIENCE
    fit = train.fit

    def paced(experiment, workdir, callbacks, **options):
        callback = training.Callback(1, lambda state, writer: time.sleep(PACE))
        return fit(experiment, workdir, [*callbacks, callback], **options)

    train.fit = paced
    # What only draws costs more than all the rest.
    train.loss_picture = lambda workdir: None
    config = Path(__file__).with_name("chaos_config.py")
    code = run_command(train.main, [f"--config={config}", f"--workdir={workdir}", "--no-progress"])
    if code == 0 and jax.distributed.is_initialized():
        jax.distributed.shutdown()
    leave(code)


def kept(workdir: Path) -> str:
    """A digest of all that a run keeps, made in a process of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        try:
            os.write(write, _kept(workdir).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as answer:
        digest = answer.read()
    os.waitpid(pid, 0)
    return digest


def _kept(workdir: Path) -> str:
    import absl.logging
    import jax
    import numpy as np

    from diffusion_jax.training import logging, storage

    absl.logging.set_verbosity(absl.logging.FATAL)
    found = hashlib.sha256()
    for folder in ("checkpoints", "snapshots"):
        with storage.readable(storage.folder(workdir / folder)) as manager:
            steps = sorted(manager.all_steps())
            # Of which older checkpoints are kept, a run that stopped in between may decide otherwise.
            for step in steps if folder == "snapshots" else steps[-1:]:
                meta = storage.read_meta(manager, step)
                for name in sorted(meta["items"]):
                    item = storage.load_item(manager, step, name, meta, None, None)
                    for path, leaf in jax.tree_util.tree_flatten_with_path(item)[0]:
                        found.update(f"{folder} {step} {name} {path}".encode() + np.asarray(leaf).tobytes())
    for path in sorted((workdir / "checkpoints" / str(STEPS) / "data").glob("*.json")):
        found.update(path.name.encode() + path.read_bytes())
    for record in logging.read_log(workdir / "metrics.jsonl"):
        found.update(json.dumps({name: record[name] for name in record if name != "steps_per_second"}).encode())
    return found.hexdigest()


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
