"""`python -m benchmarks.run [name ...]`: times what is named, or everything, and writes `results/`."""

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import RESULTS, Result, environment, write, write_page

BENCHMARKS = {
    "dit": ("benchmarks.side_by_side", "DiT-S/2 against diffusers: forward, training step, 50 DDIM steps"),
    "unet": ("benchmarks.side_by_side", "a U-Net of about as many parameters against diffusers, likewise"),
    "allocation": ("benchmarks.allocation", "training steps with freed memory kept and given back, and the peer's"),
    "families": ("benchmarks.families", "a forward pass of every family of published networks against the peers"),
    "loading": ("benchmarks.loading", "loading a folder of two gigabytes: seconds and peak memory"),
    "attention": ("benchmarks.attention", "attention alone against torch and jax.nn, forward and backward"),
    "acceleration": ("benchmarks.acceleration", "sampling that skips work against the plain run, on a DiT of 12 x 384"),
    "frontier": ("benchmarks.frontier", "quality against time of every way of doing less, on trained digits"),
    "caching": ("benchmarks.caching", "TaylorSeer and the first-block cache against diffusers' hooks, same weights"),
    "compilation": ("benchmarks.compilation", "first-call compilation of DiT-XL/2, scanned and unrolled"),
    "gpu": ("benchmarks.gpu", "DiT-XL/2 in bfloat16 on a GPU: FLOP utilisation, samples per second"),
}
NEED_TORCH = ("dit", "unet", "allocation", "families", "loading", "attention", "caching")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="what to time; everything when absent (see --list)")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs; not for figures")
    parser.add_argument("--rounds", type=int, help="rounds of turns (default 12, 2 with --smoke)")
    parser.add_argument(
        "--compiled-peers", action="store_true", help="time torch.compile as well (needs a C++ compiler)"
    )
    parser.add_argument(
        "--results", type=Path, help="where to write (default benchmarks/results; nowhere with --smoke)"
    )
    arguments = parser.parse_args(argv)
    if arguments.list:
        for name, (_, what) in BENCHMARKS.items():
            print(f"{name:12} {what}")
        return 0
    names = arguments.names or list(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            print(f"error: there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}.", file=sys.stderr)
            return 2
    rounds = arguments.rounds if arguments.rounds is not None else (2 if arguments.smoke else 12)
    if rounds < 1:
        print(f"error: --rounds is {rounds}, but at least 1 is needed.", file=sys.stderr)
        return 2
    needing = [name for name in names if name in NEED_TORCH]
    if needing and importlib.util.find_spec("torch") is None:
        print(
            f"error: {', '.join(needing)} compare with torch and diffusers, which are not installed: "
            "pip install -e '.[peers]'.",
            file=sys.stderr,
        )
        return 2
    folder = arguments.results or (None if arguments.smoke else RESULTS)

    import jax

    # First-call compile times are part of what is measured.
    jax.config.update("jax_enable_compilation_cache", False)
    command = " ".join(["python -m benchmarks.run", *(sys.argv[1:] if argv is None else argv)])
    for name in names:
        print(name, flush=True)
        conditions = environment(f"{jax.default_backend()}, {jax.devices()[0].device_kind}")
        start = time.perf_counter()
        module = importlib.import_module(BENCHMARKS[name][0])
        rows = getattr(module, name)(rounds, arguments.smoke, arguments.compiled_peers)
        if rows and folder is not None:
            write(Result(name, command, time.perf_counter() - start, conditions, rows), folder)
    if folder is not None:
        print(f"written: {write_page(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
