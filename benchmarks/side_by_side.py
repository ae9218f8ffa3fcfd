"""The main comparison: networks, training steps and whole sampling runs, ours against diffusers on PyTorch."""

import subprocess
import sys
from dataclasses import replace

from benchmarks.harness import interleave, ratio, summarise
from benchmarks.report import Row
from benchmarks.workload import DIT, UNET

AIMS = {"forward": 1.0, "train": 1.3, "sample": 1.3}
"""How many times faster we want to be."""

SHARE = {"forward": 1.0, "train": 0.6, "sample": 0.25}
"""Rounds of each part, as a share of the rounds asked for: a sampling run is fifty forward passes."""


def dit(rounds: int, smoke: bool, compiled_peers: bool) -> list[Row]:
    """DiT-S/2 on 32×32×4 latents, batch 8."""
    return _rows(DIT, rounds, smoke, compiled_peers)


def unet(rounds: int, smoke: bool, compiled_peers: bool) -> list[Row]:
    """A U-Net of about as many parameters, on the same data."""
    return _rows(UNET, rounds, smoke, compiled_peers)


def _rows(work, rounds, smoke, compiled_peers):
    from benchmarks import ours, peers

    peers.same_threads()
    rows = []
    for part, aim in AIMS.items():
        case = replace(work.small() if smoke else work, part=part)
        mine = ours.build(case)
        others = {"diffusers": peers.build(case)}
        if compiled_peers and part != "sample":
            others["diffusers, torch.compile"] = peers.build(case, compile=True)
        contenders = {"ours": mine.call, **{name: peer.call for name, peer in others.items()}}
        times = interleave(contenders, max(3, round(rounds * SHARE[part])))
        alone = replace(case, settings=mine.settings)
        memory = {side: peak_memory(alone, side) for side in ("ours", "peers")}
        for name, peer in others.items():
            row = Row(
                case=case.title,
                ours=summarise(times["ours"]),
                peer=name,
                theirs=summarise(times[name]),
                ratio=ratio(times[name], times["ours"]),
                aim=aim,
                compile_seconds=mine.compile_seconds,
                memory=memory["ours"],
                their_memory=memory["peers"] if name == "diffusers" else None,
                note=f"{mine.parameters / 1e6:.1f} M parameters, peer {peer.parameters / 1e6:.1f} M"
                + (f"; {mine.settings}" if mine.settings else ""),
            )
            rows.append(row)
            print(f"  {case.title}: {row.ratio.value:.2f}× {name}", flush=True)
    return rows


def peak_memory(case, side: str) -> float:
    """Peak resident MiB of a process that runs nothing but this side of the case."""
    command = [sys.executable, "-m", "benchmarks.memory", side, case.written()]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])
