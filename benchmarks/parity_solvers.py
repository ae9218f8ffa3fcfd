"""Trajectories of our solvers against the diffusers schedulers: the same config, network outputs and noise.

`solver_error` is the figure of a case (see `parity_cases`), in float64 or in float32, the default of both libraries.
The tests assert on it. Each case is a scheduler config that `interop.read_scheduler` turns into a process, a solver and
a grid, and which the peer runs itself. In float64 the peer's modules find float64 under the name float32.
"""

import contextlib
import importlib
import inspect
import logging
import sys
import types
import warnings
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.parity_cases import Case
from diffusion_jax import randomness
from diffusion_jax.denoisers import denoiser
from diffusion_jax.interop.schedulers import Scheduler, read_scheduler
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Network

SHAPE = (3, 4, 5)
DTYPES = ("float32", "float64")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Trajectory(NamedTuple):
    """x after each whole step, in the peer's scale, and what the network was told at the beginning of each."""

    outputs: list[np.ndarray]
    told: np.ndarray


class _Double:
    """A module whose float32 is its float64."""

    def __init__(self, module):
        self.__dict__.update({"_module": module, "float32": module.float64})

    def __getattr__(self, name):
        return getattr(self._module, name)


@contextlib.contextmanager
def peer_numerics(module, dtype, replaced):
    """Within, the peer's `module` computes in `dtype`, and finds `replaced` in the place of what it draws from."""
    import torch

    logging.getLogger(module.__name__).setLevel(logging.ERROR)
    default = torch.get_default_dtype()
    if dtype == "float64":
        torch.set_default_dtype(torch.float64)
        replaced = {**replaced, "np": _Double(np), "torch": _Double(torch)}
    try:
        with mock.patch.multiple(module, create=True, **replaced), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(default)


def _model_outputs(x, k, tanh):
    return 0.4 * tanh(x) + k / 2000


def theirs(case: Case, x: np.ndarray, noise: np.ndarray, noises: list, dtype: str = "float64") -> Trajectory:
    """The peer's run from `noise`, or from x noised by it; `noises` are those of the steps, by their number."""
    import torch

    module = peer_module(case.scheduler)
    row = [0, False]
    if case.scheduler == "DPMSolverSDEScheduler":
        drawn = {"BrownianTreeNoiseSampler": lambda *_, **__: _one_path(noises, row)}
    else:

        def draw(*_, **__):
            return torch.as_tensor(noises[row[0]])

        drawn = {"randn_tensor": draw, "BrownianTreeNoiseSampler": lambda *_, **__: draw}
    with peer_numerics(module, dtype, drawn):
        scheduler = getattr(module, case.scheduler)(**case.options)
        scheduler.set_timesteps(**_told(case))
        if "timesteps" not in case.grid and "sigmas" not in case.grid:
            assert len(scheduler.timesteps) >= case.steps
        indices = scheduler.timesteps[case.first * scheduler.order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(case.first * scheduler.order)
        if case.first:
            # As the image-to-image pipelines of Stable Diffusion do.
            sample = scheduler.add_noise(torch.as_tensor(x), torch.as_tensor(noise), indices[:1])
        else:
            sample = torch.as_tensor(noise) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        extra = {} if case.eta is None else {"eta": case.eta}
        outputs, told, before = [], [], None
        for i, k in enumerate(indices):
            row[0] = case.first + i // (2 if _evaluates_twice(case) else 1)
            seen = scheduler.scale_model_input(sample, k) if hasattr(scheduler, "scale_model_input") else sample
            output = _model_outputs(seen, float(k), torch.tanh)
            if case.scheduler == "CogVideoXDPMScheduler":
                sample, before = scheduler.step(output, before, k, indices[i - 1] if i else None, sample)
            else:
                sample = scheduler.step(output, k, sample, return_dict=False, **extra)[0]
            outputs.append(sample.numpy())
            told.append(k.item())
    return Trajectory(_after_steps(outputs, case), np.asarray(_before_steps(told, case)))


def _one_path(noises, row):
    """The noise of one path of our singlestep SDE, whose middle is half way in the logarithm of the noise level."""
    import torch

    def sampler(start, end):
        middle, rest = (torch.as_tensor(noise) for noise in noises[row[0]])
        row[1] = not row[1]
        if row[1]:
            return middle
        ratio = end / start
        return (torch.sqrt(ratio) * middle + rest) / torch.sqrt(1 + ratio)

    return sampler


OF_TORCHSDE = {
    "CosineDPMSolverMultistepScheduler": "scheduling_cosine_dpmsolver_multistep",
    "DPMSolverSDEScheduler": "scheduling_dpmsolver_sde",
}
"""Modules that ask for torchsde, for the noise that is replaced here."""


def peer_module(scheduler: str) -> types.ModuleType:
    """The peer's module of a scheduler class, also where torchsde is missing."""
    import diffusers

    if scheduler not in OF_TORCHSDE:
        return inspect.getmodule(getattr(diffusers, scheduler))
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    return importlib.import_module(f"diffusers.schedulers.{OF_TORCHSDE[scheduler]}")


def _told(case):
    told = dict(case.grid)
    if "mu" in told:
        # The pipelines' line through (256, 0.5) and (4096, 1.15).
        told["mu"] = (1.15 - 0.5) / (4096 - 256) * (told["mu"] - 256) + 0.5
    return told if case.steps is None else {"num_inference_steps": case.steps, **told}


def _evaluates_twice(case):
    return "Heun" in case.scheduler or "KDPM2" in case.scheduler or case.scheduler == "DPMSolverSDEScheduler"


def _after_steps(outputs: list, case: Case) -> list:
    """The calls after which the peer has made a whole step: some of its schedulers take several calls for one."""
    if _evaluates_twice(case):
        return [*outputs[1:-1:2], outputs[-1]]
    if case.scheduler != "PNDMScheduler" or case.steps == 1:
        return outputs
    return outputs[1:] if case.options.get("skip_prk_steps") else [*outputs[3:12:4], *outputs[12:]]


def _before_steps(told: list, case: Case) -> list:
    """What was told at the beginning of each step."""
    if _evaluates_twice(case):
        return told[::2]
    if case.scheduler != "PNDMScheduler" or case.steps == 1:
        return told
    return [told[0], *told[2:]] if case.options.get("skip_prk_steps") else [*told[:12:4], *told[12:]]


def read(case: Case) -> Scheduler:
    """Our scheduler of a case."""
    return read_scheduler({"_class_name": case.scheduler, **case.options}, eta=case.eta)


def ours(
    case: Case, x: np.ndarray, noise: np.ndarray, scheduler: Scheduler | None = None
) -> tuple[Trajectory, list[np.ndarray]]:
    """Our run, and the noise that each step would draw. scheduler: another than the one that the case says."""

    def model(params, x, k, cond, train=False, key=None):
        return _model_outputs(x, k.reshape(-1, *(1,) * (x.ndim - 1)), jnp.tanh), {}

    scheduler = read(case) if scheduler is None else scheduler
    told = {name: value for name, value in case.grid.items() if name != "mu"}
    grid = scheduler.begun(scheduler.grid(case.steps, seq_len=case.grid.get("mu"), **told), case.first)
    process, first = scheduler.process, case.first
    denoise = scheduler.transform(denoiser(Network(None, model), process))
    key = jax.random.key(0)
    begun = scheduler.initial_scale(grid) * jnp.asarray(noise)
    if first:
        begun = process.marginal(jnp.asarray(x), jnp.asarray(noise), grid[first])
    run = jax.jit(
        lambda x: sample(key, denoise, None, scheduler.solver, grid, x_init=x, start=first, save_every=1).trace
    )
    # Each case is compiled and run once: the compiler's own work is most of it.
    trace = run.lower(begun).compile(compiler_options=QUICK)(begun)
    keys = randomness.fold(randomness.sample_keys(key, jnp.arange(SHAPE[0])), 1)
    steps = range(len(grid) - 1)
    noises = [np.asarray(randomness.normal_like(randomness.fold(keys, i), begun)) for i in steps]
    if case.scheduler == "DPMSolverSDEScheduler":
        pairs = [randomness.split(randomness.fold(keys, i), 2) for i in steps]
        noises = [tuple(np.asarray(randomness.normal_like(key, begun)) for key in pair) for pair in pairs]
    outputs = [np.asarray(scheduler.final_scale(grid[: i + 2]) * trace[i - first]) for i in steps[first:]]
    return Trajectory(outputs, np.asarray(process.network_time(grid[first:-1]))), noises


def trajectories(case: Case, dtype: str = "float64", scheduler: Scheduler | None = None):
    """Our trajectory and the peer's, both in `dtype`."""
    rng = np.random.default_rng(0)
    noise, x = (rng.normal(size=SHAPE).astype(dtype) for _ in range(2))
    with jax.enable_x64(dtype == "float64"):
        run, noises = ours(case, x, noise, scheduler)
    expected = theirs(case, x, noise, noises, dtype)
    assert len(expected.outputs) == len(run.outputs), (len(expected.outputs), len(run.outputs))
    return run, expected


def solver_error(case: Case, dtype: str = "float64") -> tuple[float, float]:
    """The largest difference over all steps between our run and the peer's, and between what the networks are told.

    The first is relative to the largest entry of x of that step, where it is above 1: schedulers that keep x / alpha
    begin at 15, and at 4000 where the last step is pure noise.
    """
    run, expected = trajectories(case, dtype)
    assert all(np.isfinite(x).all() for x in run.outputs)
    # UniPC's bh1 is NaN in its last step, to sigma = 0, in the peer.
    known = [i for i, x in enumerate(expected.outputs) if np.isfinite(x).all()]
    assert len(known) >= len(run.outputs) - (case.options.get("solver_type") == "bh1")
    error = max(
        float(np.max(np.abs(run.outputs[i] - expected.outputs[i])) / max(1.0, np.max(np.abs(expected.outputs[i]))))
        for i in known
    )
    return error, float(np.max(np.abs(run.told - expected.told)))
