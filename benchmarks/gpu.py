"""DiT-XL/2 at 256² on one GPU in bfloat16: model FLOP utilisation of the training step, samples per second."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from benchmarks.harness import interleave, summarise
from benchmarks.report import Row
from benchmarks.workload import DIT

UTILISATION = 0.5
"""Share of the measured ceiling of matrix products that a training step should reach."""

XL = replace(DIT, width=1152, depth=28, heads=16, batch=64)


def gpu(rounds: int, smoke: bool, compiled_peers: bool) -> list[Row]:
    """The training step, and sampling with 50 and 250 steps. Needs a GPU (a smoke run does not)."""
    del compiled_peers
    if jax.default_backend() != "gpu" and not smoke:
        kind = jax.devices()[0].device_kind
        print(f"  skipped: this benchmark needs a GPU, and JAX sees {kind!r} only.")
        return []
    from benchmarks import ours

    work = XL.small() if smoke else XL
    ceiling = matmul_ceiling(256 if smoke else 8192, rounds)
    train = replace(work, part="train")
    step = ours.train(train, ours.network(train, "bfloat16", remat="dots_no_batch"))
    times = summarise(interleave({"ours": step.call}, rounds, warmup=2)["ours"])
    utilisation = 3 * work.batch * forward_flops(work) / times.median / ceiling
    reached = "reached" if utilisation >= UTILISATION else "missed"
    rows = [
        Row(
            case=f"{train.title}, bfloat16",
            ours=times,
            compile_seconds=step.compile_seconds,
            note=f"{work.batch / times.median:.1f} images/s; {utilisation:.1%} of {ceiling / 1e12:.1f} TFLOP/s, a "
            f"matrix product's (aim {UTILISATION:.0%}: {reached})",
        )
    ]
    print(f"  {rows[-1].case}: {rows[-1].note}", flush=True)
    for steps in (3, 5) if smoke else (50, 250):
        case = replace(work, part="sample", steps=steps)
        program = ours.sampling(case, ours.network(case, "bfloat16"))
        times = summarise(interleave({"ours": program.call}, max(2, rounds // 5))["ours"])
        note = f"{case.batch / times.median:.2f} samples/s"
        rows.append(Row(f"{case.title}, bfloat16", times, compile_seconds=program.compile_seconds, note=note))
        print(f"  {rows[-1].case}: {note}", flush=True)
    return rows


def matmul_ceiling(size: int, rounds: int) -> float:
    """FLOP/s of a bfloat16 product of two square matrices: what this device reaches in the best case."""
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    seconds = interleave({"matmul": lambda: jax.block_until_ready(product(a, b))}, rounds, warmup=2)["matmul"]
    return 2 * size**3 / summarise(seconds).median


def forward_flops(work) -> float:
    """FLOP of one forward pass of one image: matrix products only, two per multiply-add.

    Per token and block: 4 width² for attention's projections, 8 width² for the MLP, 2 N width for its two products;
    per image and block: 6 width² for the modulation. Training costs three times that.
    """
    tokens = (work.size // 2) ** 2
    block = tokens * (12 * work.width**2 + 2 * tokens * work.width) + 6 * work.width**2
    ends = tokens * work.width * 4 * work.channels * 2 + work.width**2 * 2
    return 2.0 * (work.depth * block + ends)
