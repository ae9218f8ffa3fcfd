"""How long the first call of a large model waits: DiT-XL/2 compiled from nothing, scanned over depth and unrolled.

Parameters are abstract, so nothing of the model's size is allocated; the persistent cache is off.
"""

import time

import jax

from benchmarks.harness import ratio, summarise
from benchmarks.report import Row
from benchmarks.workload import Workload
from diffusion_jax.models import dit, label, param_shapes

LIMIT = 15.0
"""Seconds that a user should wait at most."""


def compilation(rounds: int, smoke: bool, compiled_peers: bool) -> list[Row]:
    """DiT-XL/2 at 256² (latents of 32×32×4): one forward pass, and a whole 50-step DDIM program."""
    del compiled_peers
    from benchmarks import ours

    work = Workload(batch=1)
    preset = {"width": 64, "depth": 2, "heads": 2} if smoke else {}
    rows = []
    for part in ("forward", "50 DDIM steps"):
        times: dict[bool, list[float]] = {True: [], False: []}
        # Unrolled programs take long to compile and are there for scale: three rounds are enough.
        for _ in range(1 if smoke else min(3, rounds)):
            for scan in times:
                net = dit("S/2" if smoke else "XL/2", conditions=(label(work.classes),), scan=scan, **preset)
                x, t, cond = jax.eval_shape(lambda: ours.inputs(work))
                params = param_shapes(net, x.shape, cond)
                jax.clear_caches()
                start = time.perf_counter()
                if part == "forward":
                    ours.compiled(lambda p, x, t, cond, net=net: net.apply(p, x, t, cond)[0], params, x, t, cond)
                else:
                    ours.compiled(ours.sampler(work, net), jax.random.key(0), params, cond)
                times[scan].append(time.perf_counter() - start)
        rows.append(
            Row(
                case=f"compile DiT-XL/2, {part}",
                ours=summarise(times[True]),
                peer="blocks unrolled",
                theirs=summarise(times[False]),
                ratio=ratio(times[False], times[True]),
                limit=LIMIT,
                note="trace, lower and compile from nothing",
            )
        )
        print(f"  {rows[-1].case}: {rows[-1].ours.median:.2f} s, unrolled {rows[-1].theirs.median:.2f} s", flush=True)
    return rows
