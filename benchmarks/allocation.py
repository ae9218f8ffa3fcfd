"""What keeping freed memory saves: user and system time and page faults of a training step, ours and the peer's.

How memory is handed out is settled when a process begins, so each side runs in processes of its own, in turns, once
with the allocator as the system has it and once as `diffusion_jax.malloc` sets it, the peer under the same settings.
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

from benchmarks.harness import ratio, summarise
from benchmarks.report import Row
from benchmarks.workload import DIT, Workload

SETTINGS = {"kept": {}, "system": {"DIFFUSION_JAX_MALLOC": "system"}}
CALLS = {"quickstart": 120, "ours": 6, "peers": 6}
"""Whose training step is timed, and how many of them in a process."""


def allocation(rounds: int, smoke: bool, compiled_peers: bool) -> list[Row]:
    """A process of each setting and round: the training steps of the quickstart and of a DiT-S/2, and the peer's."""
    del compiled_peers
    rounds = 1 if smoke else max(2, rounds // 4)
    work = replace(DIT.small() if smoke else DIT, part="train", settings="blocks scanned, dense outputs kept")
    cases = {"quickstart": "digits_dit: training step", "ours": work.title, "peers": f"diffusers, {work.title}"}
    rows = []
    for side, case in cases.items():
        runs = {name: [] for name in SETTINGS}
        for _ in range(rounds):
            for name, variables in SETTINGS.items():
                runs[name].append(_apart(side, work, 2 if smoke else CALLS[side], variables))
        seconds = {name: [second for run in many for second in run["seconds"]] for name, many in runs.items()}
        rows.append(
            Row(
                case=case,
                ours=summarise(seconds["kept"]),
                peer="the same, freed memory given back",
                theirs=summarise(seconds["system"]),
                ratio=ratio(seconds["system"], seconds["kept"]),
                aim=1.0 if side != "peers" else None,
                memory=max(run["memory"] for run in runs["kept"]),
                their_memory=max(run["memory"] for run in runs["system"]),
                note="a call kept and given back: "
                + ", ".join(f"{_mean(runs['kept'], what)} and {_mean(runs['system'], what)} {what}" for what in UNITS),
            )
        )
        print(f"  {rows[-1].case}: {rows[-1].ratio.value:.2f}x; {rows[-1].note}", flush=True)
    return rows


UNITS = ("s user", "s system", "page faults")


def _mean(runs: list[dict], what: str) -> str:
    mean = sum(run[what] for run in runs) / len(runs)
    return f"{mean:.0f}" if what == UNITS[2] else f"{mean:.3f}"


def _apart(side: str, work: Workload, calls: int, variables: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.allocation", side, str(calls), work.written()]
    clean = {name: value for name, value in os.environ.items() if name != "DIFFUSION_JAX_MALLOC"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=clean | variables)
    return json.loads(done.stdout.splitlines()[-1])


def _program(side: str, work: Workload) -> Any:
    if side == "quickstart":
        return _quickstart()
    if side == "peers":
        import diffusion_jax  # noqa: F401 (sets the allocator)
        from benchmarks import peers

        peers.same_threads()
        return peers.build(work).call
    from benchmarks import ours

    return ours.build(work).call


def _quickstart() -> Any:
    """A call makes one step of `configs/digits_dit.py`."""
    import jax

    from diffusion_jax import training
    from diffusion_jax.config import build, load
    from diffusion_jax.experiment import prepare

    config = load("configs/digits_dit.py")
    experiment = prepare(config)
    tracks = {name: build(entry) for name, entry in config.ema.items()}
    batch = experiment.example(config.train.batch_size)
    state = training.init_state(experiment.objective, experiment.optimizer, experiment.init_params, batch, ema=tracks)
    step = training.make_train_step(experiment.objective, experiment.optimizer, ema=tracks, clip_norm=1.0)
    states = [state]

    def call():
        states[0], metrics = step(states[0], batch)
        jax.block_until_ready((states[0], metrics))

    return call


def main(side: str, calls: int, work: Workload) -> None:
    call = _program(side, work)
    for _ in range(4):
        call()
    before = resource.getrusage(resource.RUSAGE_SELF)
    seconds = []
    for _ in range(calls):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = (
        after.ru_utime - before.ru_utime,
        after.ru_stime - before.ru_stime,
        after.ru_minflt - before.ru_minflt,
    )
    counted = {what: total / calls for what, total in zip(UNITS, used, strict=True)}
    print(json.dumps({"seconds": seconds, "memory": after.ru_maxrss / 1024, **counted}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Workload.read(sys.argv[3]))
