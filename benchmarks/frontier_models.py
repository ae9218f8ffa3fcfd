"""The trained models of the frontier: the shared transformer on digits, a small one, exits, and widths by timestep."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusion_jax import adapters, models, objectives
from diffusion_jax.acceleration import StaticWidths, static_widths, tabulated
from diffusion_jax.adapters import Timed
from diffusion_jax.baselines import NULL, digit_transformer, tiny_digit_transformer
from diffusion_jax.config import build, call
from diffusion_jax.costs import evaluation_flops
from diffusion_jax.denoisers import denoiser
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.models import EarlyExit
from diffusion_jax.stages import Stage, stage
from diffusion_jax.typing import Denoiser, Network, Params, Process


class Models(NamedTuple):
    """All networks speak of the same digits.

    network, process, params: the transformer that everything is compared on. small: a shallow one for T-Stitch, its
    parameters, and what an evaluation of it costs beside one of the transformer. exits: the transformer with exits and
    its parameters. widths: the transformer at half of its width on average, its weights cut, and its parameters.
    """

    network: Network
    process: Process
    params: Params
    small: tuple[Denoiser, Params, float]
    exits: tuple[EarlyExit, Params]
    widths: tuple[Denoiser, Params]


def frontier_models(grid: Any, smoke: bool) -> Models:
    """The models, trained or from the cache; widths are cut for the times of `grid`. In a smoke run none is trained."""
    base = _stage("digits", tiny_digit_transformer(0) if smoke else digit_transformer(), smoke)
    few = tiny_digit_transformer(0, depth=1) if smoke else digit_transformer(1800, width=40, depth=2)
    small = _stage("small digits", few, smoke)
    exits = _stage("digits with exits", _tuning(0 if smoke else 200, smoke, *_EXITS), smoke, base, prepare=_with_exits)
    routed = _stage("digits by width", _tuning(0 if smoke else 500, smoke, *_WIDTHS), smoke, base, prepare=_by_width)
    network, process = base.trained.network, base.trained.process
    x, _, cond = _example(base)
    flops = [evaluation_flops(one.trained.network, one.value, x, cond) for one in (small, base)]
    quick = denoiser(small.trained.network, small.trained.process)
    cut = _cut(base, routed.value, grid)
    return Models(
        network,
        process,
        base.value,
        (quick, small.value, flops[0] / flops[1]),
        (models.early_exit(network), exits.value),
        (cut.denoiser, cut.prepare({"params": routed.value["params"]})),
    )


def _stage(name: str, config: ConfigDict, smoke: bool, *parents: Stage, **how: Any) -> Stage:
    return stage(name, config, *parents, keep=not smoke, **how)


_EXITS = ({"params": 2e-4, "exits": 3e-3}, call("objectives.layerwise", cond_dropout=0.1, null=NULL), 64)
_WIDTHS = ({"params": 1e-3, "routers": 1e-2}, call("objectives.denoising", cond_dropout=0.1, null=NULL), 16)


def _tuning(steps: int, smoke: bool, rates: dict[str, float], objective: ConfigDict, batch_size: int) -> ConfigDict:
    """A short training of the transformer and of what was added to it, each at a peak rate of its own."""
    config = tiny_digit_transformer(steps) if smoke else digit_transformer(steps)
    config.train.batch_size, config.objective = batch_size, objective
    config.objective.draw = call("timesteps.stratified")
    parts = {}
    for name, peak in rates.items():
        rate = call("training.optimizers.cosine", peak=peak, total_steps=max(steps, 2), warmup_steps=steps // 20)
        parts[name] = call("training.optimizers.adamw", learning_rate=rate)
    tuned = call("training.optimizers.alternating", parts=parts)
    config.optimizer = call("training.optimizers.below_norm", optimizer=tuned, norm=15.0)
    return config


def _with_exits(config: ConfigDict, base: Stage) -> Experiment:
    """The training of DeeDiff: the transformer, and after each block an exit."""
    exits = models.early_exit(base.trained.network)

    def begin(key):
        return {"params": base.value, "exits": exits.init(key, base.value, *_example(base))}

    return prepare(config, network=exits.network, begin=begin)


def _by_width(config: ConfigDict, base: Stage) -> Experiment:
    """The training of DyDiT: the transformer, and routers that leave out half of it by the timestep."""
    routed, process, steps = _routed(base.trained.network), base.trained.process, config.train.steps
    whole, half = (build(config.objective, network=one, process=process) for one in (routed.complete, routed.network))
    limits = {"complete_steps": 3 * steps // 20, "full_steps": steps // 20, "warmup_steps": 3 * steps // 10}

    def begin(key):
        return {"params": base.value, **routed.init(key, base.value, *_example(base))}

    objective = objectives.budgeted(half, 0.5, complete=whole, **limits)
    return prepare(config, network=routed.network, objective=objective, begin=begin)


def _example(base: Stage) -> tuple[Any, Any, Any]:
    """x, t and the condition of one sample, for shapes."""
    return jnp.zeros((1, *base.trained.shape)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}


def _routed(network: Network) -> Timed:
    return adapters.routed(network, groups=4, bias=5.0)


def _cut(base: Stage, tree: Params, grid: Any) -> StaticWidths:
    """The weights that the routers leave at each time, in four buckets."""
    network, process = base.trained.network, base.trained.process
    routed, (x, t, cond) = _routed(network), _example(base)
    gates = jax.device_get(tabulated(routed.fill, tree, process, grid[:-1]))
    costs = models.width_costs(routed.opened, routed.fill(tree, t), x, t, cond)
    return static_widths(network, process, grid[:-1], gates, costs, 4)
