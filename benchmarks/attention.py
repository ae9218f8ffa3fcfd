"""Attention alone: the library's function against PyTorch's fused attention and JAX's plain one."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import interleave, ratio, summarise
from benchmarks.report import Row
from diffusion_jax.models.layers.attention import dot_product_attention

SHAPES = ((8, 256, 6, 64), (2, 1024, 16, 72))
"""`[B, N, H, D]`: DiT-S/2 at 32×32, DiT-XL/2 at 64×64 latents."""


def attention(rounds: int, smoke: bool, compiled_peers: bool) -> list[Row]:
    """Forward, and forward + backward, at two sizes."""
    del compiled_peers
    rows = []
    for shape in ((2, 16, 2, 8),) if smoke else SHAPES:
        for backward in (False, True):
            contenders, compile_seconds = _contenders(shape, backward)
            times = interleave(contenders, rounds)
            for peer in list(contenders)[1:]:
                row = Row(
                    case=f"attention {list(shape)}, " + ("forward + backward" if backward else "forward"),
                    ours=summarise(times["ours"]),
                    peer=peer,
                    theirs=summarise(times[peer]),
                    ratio=ratio(times[peer], times["ours"]),
                    aim=1.0,
                    compile_seconds=compile_seconds,
                    note=f"{_flops(shape, backward) / summarise(times['ours']).median / 1e9:.0f} GFLOP/s",
                )
                rows.append(row)
                print(f"  {row.case}: {row.ratio.value:.2f}× {peer}", flush=True)
    return rows


def _flops(shape, backward):
    batch, length, heads, features = shape
    # Two products forward; five backward (the probabilities once more, and two for each of the two products).
    return 2 * batch * heads * length**2 * features * (7 if backward else 2)


def _contenders(shape, backward):
    import torch

    from benchmarks.ours import compiled
    from benchmarks.peers import same_threads

    same_threads()
    q, k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))

    def made(function):
        def graded(q, k, v):
            # An inner product with v stands for the gradient that would come from above.
            return jax.value_and_grad(lambda *args: jnp.vdot(function(*args), v), (0, 1, 2))(q, k, v)

        program, seconds = compiled(graded if backward else function, q, k, v)
        return lambda: jax.block_until_ready(program(q, k, v)), seconds

    tensors = [torch.tensor(np.asarray(a)).requires_grad_(backward) for a in (q, k, v)]
    weights = tensors[2].detach()

    def torch_attention():
        for tensor in tensors:
            tensor.grad = None
        parts = [tensor.transpose(1, 2) for tensor in tensors]
        out = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)
        if backward:
            torch.sum(out * weights).backward()

    mine, seconds = made(dot_product_attention)
    plain, _ = made(jax.nn.dot_product_attention)
    contenders = {
        "ours": mine,
        "torch scaled_dot_product_attention": torch_attention,
        "jax.nn.dot_product_attention": plain,
    }
    return contenders, seconds
