"""Our side of the comparison: the library as a user would call it, compiled ahead so that compiling is timed apart."""

import time
import timeit
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.workload import Workload
from diffusion_jax import models, processes, solvers, timesteps, training
from diffusion_jax.denoisers import denoiser
from diffusion_jax.models.dit import dit
from diffusion_jax.models.network import count_params
from diffusion_jax.models.unet import unet
from diffusion_jax.objectives import denoising
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Network


class Program(NamedTuple):
    """call: does the work and waits for it. compile_seconds: tracing, lowering and compiling. parameters: how many.
    settings: what was chosen for it, in words."""

    call: Callable[[], Any]
    compile_seconds: float
    parameters: int
    settings: str = ""


TRAINED = {
    "blocks scanned, everything kept": {},
    "blocks scanned, dense outputs kept": {"remat": "dots_no_batch"},
    "blocks unrolled, everything kept": {"scan": False},
    "blocks unrolled, dense outputs kept": {"scan": False, "remat": "dots_no_batch"},
}
"""Ways to train a DiT: what is fastest depends on the processor's arithmetic and memory, so it is measured."""


def network(work: Workload, dtype: str = "float32", **fields: Any) -> Network:
    """The network of a workload; fields: of a DiT, how its blocks run."""
    if work.model == "dit":
        fields = {"width": work.width, "depth": work.depth, "heads": work.heads, **fields}
        return dit("S/2", conditions=(models.label(work.classes),), dtype=dtype, **fields)
    return unet(
        "ddpm_cifar10",
        channels=work.width,
        multipliers=work.multipliers,
        attention=work.attention,
        num_residual=work.depth,
        head_dim=work.head_dim,
        modulation="scale_shift",
        dropout=0.0,
        conditions=(models.label(work.classes),),
        dtype=dtype,
    )


def build(work: Workload) -> Program:
    """The program of a workload: its part is `forward`, `train` or `sample`."""
    if work.part == "train" and work.model == "dit":
        return fastest(work)
    return {"forward": forward, "train": train, "sample": sampling}[work.part](work, network(work))


def fastest(work: Workload) -> Program:
    """The training step in the fastest of the ways `TRAINED`, each called a few times here."""
    best, least = None, float("inf")
    chosen = {work.settings: TRAINED[work.settings]} if work.settings else TRAINED
    for settings, fields in chosen.items():
        program = train(work, network(work, **fields))
        program.call()
        seconds = min(timeit.repeat(program.call, number=1, repeat=3))
        if seconds < least:
            best, least = program._replace(settings=settings), seconds
        del program
    return best


def inputs(work: Workload) -> tuple[Any, Any, Any]:
    """x, network time and labels."""
    x = jax.random.normal(jax.random.key(1), (work.batch, work.size, work.size, work.channels))
    labels = jnp.arange(work.batch, dtype=jnp.int32) % work.classes
    return x, jnp.linspace(1.0, 999.0, work.batch), {"label": labels}


def compiled(function: Callable, *args: Any) -> tuple[Callable, float]:
    """The compiled program for these arguments, and the seconds it took from nothing."""
    start = time.perf_counter()
    program = (function if hasattr(function, "lower") else jax.jit(function)).lower(*args).compile()
    return program, time.perf_counter() - start


def forward(work: Workload, net: Network) -> Program:
    """One evaluation of the network."""
    x, t, cond = inputs(work)
    params = net.init(jax.random.key(0), x, t, cond)
    program, seconds = compiled(lambda params, x, t, cond: net.apply(params, x, t, cond)[0], params, x, t, cond)
    return Program(lambda: jax.block_until_ready(program(params, x, t, cond)), seconds, count_params(params))


def train(work: Workload, net: Network) -> Program:
    """Noise, forward, backward, AdamW: the library's whole training step."""
    x, t, cond = inputs(work)
    objective = denoising(net, processes.vp_linear())
    optimizer = training.optimizers.adamw(1e-4, weight_decay=0.01)
    batch = {"x0": x, "cond": cond}
    state = training.init_state(objective, optimizer, lambda key: net.init(key, x, t, cond), batch)
    parameters = count_params(state.params)
    step = training.make_train_step(objective, optimizer)
    program, seconds = compiled(step, state, batch)
    states = [state]

    def call():
        states[0], metrics = program(*step.arguments(states[0], batch))
        jax.block_until_ready((states[0], metrics))

    return Program(call, seconds, parameters)


def sampling(work: Workload, net: Network) -> Program:
    """A whole DDIM run as one program."""
    x, t, cond = inputs(work)
    params = net.init(jax.random.key(0), x, t, cond)
    program, seconds = compiled(sampler(work, net), jax.random.key(2), params, cond)
    return Program(
        lambda: jax.block_until_ready(program(jax.random.key(2), params, cond)), seconds, count_params(params)
    )


def sampler(work: Workload, net: Network) -> Callable:
    """(key, params, cond) -> samples, by DDIM."""
    process = processes.vp_linear()
    grid = timesteps.leading(work.steps)
    shape = (work.batch, work.size, work.size, work.channels)

    def run(key, params, cond):
        return sample(key, denoiser(net, process), params, solvers.ddim(), grid, shape=shape, cond=cond).x

    return run
