"""Runs of the command line that `benchmarks.chaos` starts and strikes: processes forked here, and what a run keeps."""

import contextlib
import hashlib
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

STEPS, PACE = 32, 0.02
"""As many steps as `chaos_config` says, and seconds between them."""

PATIENCE = 4.0
"""Seconds after which the processes of a run of two miss each other here."""

LIMIT = 120.0
"""Seconds after which a process counts as hanging."""


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
        for output in self.outputs:
            # A process that is killed at once has said nothing.
            output.touch()
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
    train.show_run = lambda workdir: None
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
        found.update(json.dumps({name: record[name] for name in record if name not in logging.TIMINGS}).encode())
    return found.hexdigest()
