"""DyDiT: heads and hidden groups as a function of the timestep, at half of the compute, against the same ones at all t.

The transformer on digits is fine-tuned with routers that read the embedding of the time, under a budget on the mean
over t, or as long with the largest half of its heads and groups at all t. The static model is the base model as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import acceleration, adapters, denoisers, models, objectives, pictures, timesteps
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.metrics import energy_distance
from diffusion_jax.recipes.study import Arm, Results, Study, Tabulated, by_seed, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.stages import Stage
from diffusion_jax.typing import Network, Params

LEARNED = ("lora", "mixers", "routers")


def inputs_of(base: Stage) -> tuple:
    batch = base.trained.example()
    return batch["x0"], jnp.zeros(1), batch["cond"]


def with_widths(config: ConfigDict, base: Stage) -> Experiment:
    """Whole parameters and routers learn, under `config.budget`."""
    routed = build(config.routed, network=base.trained.network)
    dynamic, complete = (prepare(config, network=one).objective for one in (routed.network, routed.complete))
    objective = build(config.budget, dynamic=dynamic, complete=complete)

    def begin(key):
        return {"params": base.value, **routed.init(key, base.value, *inputs_of(base))}

    return prepare(config, network=routed.network, objective=objective, begin=begin)


def gates_of(config: ConfigDict, base: Stage, kept: int) -> Any:
    """The `kept` largest heads and groups of the base model, the same at all times."""
    routed, inputs = build(config.routed, network=base.trained.network), inputs_of(base)

    def gates():
        made = routed.init(jax.random.key(0), base.value, *inputs)
        return routed.fill({"params": base.value, **made}, inputs[1])["gates"]

    return models.largest_gates(base.trained.network, base.value, jax.eval_shape(gates), kept)


def with_one_width(config: ConfigDict, base: Stage) -> Experiment:
    """The base model with `config.kept` heads and groups, of which whole parameters learn."""
    opened = build(config.routed, network=base.trained.network).opened
    gates = {"gates": gates_of(config, base, config.kept)}
    objective = objectives.with_frozen(prepare(config, network=opened).objective, gates, "params")
    return prepare(config, network=opened, objective=objective, begin=lambda key: base.value)


def with_factors(config: ConfigDict, base: Stage) -> Experiment:
    """Factors, mixed by time where there are several experts, and routers learn beside frozen weights."""
    mixed = build(config.factors, network=base.trained.network)
    routed = build(config.routed, network=mixed.opened)
    network, inputs = adapters.at_time(routed.opened, mixed.fill, routed.fill), inputs_of(base)
    dynamic = build(config.budget, dynamic=prepare(config, network=network).objective)
    objective = objectives.with_frozen(dynamic, {"params": base.value}, LEARNED)

    def begin(key):
        first, second = jax.random.split(key)
        made = mixed.init(first, base.value, *inputs)
        # Routers are made where the mixture is data already.
        filled = mixed.fill({"params": base.value, **made}, inputs[1])
        return {**made, **routed.init(second, filled, *inputs)}

    return prepare(config, network=network, objective=objective, begin=begin)


def held_out_loss(base: Stage, network: Network, repeats: int) -> Callable[[Params], np.ndarray]:
    """`params -> ` the loss on held-out examples in each tenth of t, of the same times and noise for all networks."""
    objective = objectives.denoising(network, base.trained.process, timesteps.stratified(), train=False)
    held_out = base.trained.held_out
    batch = jax.tree.map(jnp.asarray, held_out.take(np.arange(len(held_out))))

    @jax.jit
    def losses(params, key):
        lost, aux = objective.loss(params, (), batch, key)
        tenth = jnp.clip(aux.per_example["t"] * 10, 0, 9).astype(jnp.int32)
        return jax.ops.segment_sum(lost, tenth, 10) / jax.ops.segment_sum(jnp.ones_like(lost), tenth, 10)

    return lambda params: np.mean([losses(params, jax.random.key(1000 + i)) for i in range(repeats)], axis=0)


def study(s: Study) -> Results:
    config, base = s.config, s.stage("digits", s.config.base)
    network, process = base.trained.network, base.trained.process
    routed, gates = build(config.dynamic.routed, network=network), gates_of(config.uniform, base, config.uniform.kept)
    times, tenths = ((np.arange(count, dtype=np.float32) + 0.5) / count for count in (config.times, 10))
    by_table = acceleration.by_nearest_time(routed.opened, process.network_time(times))
    networks = {"static": network, "dynamic": routed.network, "uniform": routed.opened, "reversed": by_table}
    measure = {name: held_out_loss(base, one, config.repeats) for name, one in networks.items()}
    lost: list[dict[str, np.ndarray]] = []
    kept: list[dict[str, np.ndarray]] = []

    def trees(seed):
        narrow = s.stage("uniform", config.uniform, base, seed=seed, prepare=with_one_width).value
        dynamic = s.stage("dynamic", config.dynamic, base, seed=seed, prepare=with_widths).value
        return {"static": base.value, "dynamic": dynamic, "uniform": {"params": narrow, "gates": gates}}

    def figures(seed):
        here = trees(seed)
        on = acceleration.tabulated(routed.fill, here["dynamic"], process, times)
        here["reversed"] = {"params": here["dynamic"]["params"], "table": jax.tree.map(lambda leaf: leaf[::-1], on)}
        lost.append({name: measure[name](tree) for name, tree in here.items()})
        kept.append({path: np.mean(leaf, axis=(1, 2, 3)) for path, leaf in models.by_path(on).items()})
        share = acceleration.executed_share(on, costs_of(base, routed, here["dynamic"]))
        clean, noisy = np.array_split(share, 2)
        shares = {"share": share.mean(), "range": np.ptp(share), "clean": clean.mean(), "noisy": noisy.mean()}
        return {name: values.mean() for name, values in lost[-1].items()} | shares

    rows = loss_rows(config, by_seed(s.seeds, figures))
    rows += (sample_rows(sampled(s, base, routed, trees)) if config.samples else []) + factor_rows(s, base)
    curves = {
        name: (times, np.mean([leaf for one in kept for path, leaf in one.items() if part in path], axis=0))
        for part, name in (("attention", "heads"), ("mlp", "hidden groups"))
    }
    label, title = "share that is computed", "What is computed at each time"
    x_label = "t (0 clean, 1 noise)"
    pictures.save_curves(s.picture("kept"), curves, x_label=x_label, y_label=label, title=title, log=False)
    curves = {
        name: (tenths, np.mean([one[name] / one["static"] for one in lost], axis=0)) for name in ("dynamic", "uniform")
    }
    label, title = "held-out loss, relative to the full model's", "What computing half costs at each time"
    pictures.save_curves(s.picture("loss"), curves, x_label=x_label, y_label=label, title=title, log=False)
    captions = {
        s.picture("kept"): "Heads and hidden groups that are on, mean over blocks and seeds, by t: 0 is clean.",
        s.picture("loss"): "Held-out loss over that of the static model, by t: what each spends its half on.",
    }
    return Results(rows, captions, "the fine-tuning and the noise; the base model is trained once")


def costs_of(base: Stage, routed: adapters.Timed, tree: Params) -> models.Costs:
    x, t, cond = inputs_of(base)
    return models.width_costs(routed.opened, routed.fill(tree, t), x, t, cond)


def sampled(s: Study, base: Stage, routed: adapters.Timed, trees: Callable[[int], Mapping[str, Any]]) -> Tabulated:
    """Samples with the labels of held-out digits; weights are cut for the first seeds, which compile a program each."""
    config, process, solver, grid = s.config, base.trained.process, build(s.config.solver), build(s.config.grid)
    real = base.trained.held_out.take(np.arange(min(config.samples, len(base.trained.held_out))))
    cond = jax.tree.map(jnp.asarray, real["cond"])
    nets = {"static": base.trained.network, "dynamic": routed.network, "uniform": routed.opened}
    made = {name: denoisers.denoiser(network, process) for name, network in nets.items()}
    fewer = jnp.linspace(grid[0], grid[-1], round((len(grid) - 1) * config.target) + 1)

    def arms(seed):
        here = trees(seed)
        found = {name: Arm(made[name], tree, solver, grid, cond) for name, tree in here.items()}
        found["fewer steps"] = found["static"]._replace(grid=fewer)
        if seed in s.seeds[: config.cut]:
            on = acceleration.tabulated(routed.fill, here["dynamic"], process, grid[:-1])
            costs = costs_of(base, routed, here["dynamic"])
            cut = acceleration.static_widths(nets["static"], process, grid[:-1], on, costs, config.buckets)
            found["cut"] = Arm(cut.denoiser, cut.prepare({"params": here["dynamic"]["params"]}), solver, grid, cond)
        return found

    flat = real["x0"].reshape(len(real["x0"]), -1)
    measures = {"distance": lambda drawn: energy_distance(np.asarray(drawn.x).reshape(flat.shape), flat)}
    return table(arms, s.seeds, measures, shape=base.trained.shape, count=len(flat))


def loss_rows(config: ConfigDict, found: Mapping[str, list[float]]) -> list[Row]:
    loss, share, half = "held-out loss, mean over t", "share of routed FLOPs, mean over t", f"{config.target:.0%}"
    turned = f"{loss}; table reversed in t"
    claims = (
        (f"{half} of the compute for 5 % of the loss", loss, "dynamic", "static", "FID 2.07, 2.27", 1.05),
        ("Better than the same widths at all t", loss, "dynamic", "uniform", "static pruning is worse", 1.0),
        ("It matters which widths run at which t", turned, "dynamic", "reversed", "not reported", 1.0),
        ("There is less of it at high noise", f"{share} > 1/2; < 1/2", "noisy", "clean", "fewer heads and groups", 1.0),
    )
    rows = [
        Row(title, figure, found[ours], found[other], "lower", published, factor)
        for title, figure, ours, other, published, factor in claims
    ]
    rows.append(Row("Compute depends on t", "range of the share over t", found["range"], 0.1, "higher", "it does"))
    published = "57.88 of 118.69 GFLOPs"
    return [*rows, Row("The budget is held", share, found["share"], config.target, "equal", published, margin=0.03)]


def sample_rows(found: Tabulated) -> list[Row]:
    figure, cut, ours = "energy distance to held-out digits", found["cut"]["seconds"], found["dynamic"]["distance"]
    claims = (("Nearer to digits than the same widths", "uniform"), ("Nearer than half as many steps", "fewer steps"))
    rows = [Row(title, figure, ours, found[other]["distance"], "lower", "not reported") for title, other in claims]
    plain = found["static"]["seconds"][: len(cut)]
    return [*rows, Row("Runs with cut weights are shorter", "seconds of a run", cut, plain, "lower", "1.73 x")]


def factor_rows(s: Study, base: Stage) -> list[Row]:
    """Factors mixed by time against plain ones, beside a frozen network whose routers learn at the same budget."""
    config, found = s.config, {}
    for name, factors in config.factors.items():
        arm = ConfigDict({**config.tuning.to_dict(), "factors": factors})
        made = with_factors(arm, base)
        measure = held_out_loss(base, made.network, config.repeats)
        stages = (s.stage(name, arm, base, seed=seed, prepare=with_factors) for seed in s.seeds)
        found[name] = [float(measure({"params": base.value, **stage.value}).mean()) for stage in stages]
    figure = "held-out loss, weights frozen"
    titles = {"plain": "TD-LoRA beats LoRA of its rank", "equal": "TD-LoRA beats LoRA of as many parameters"}
    return [
        Row(title, figure, found["mixed"], found[name], "lower", "lower or equal")
        for name, title in titles.items()
        if name in found
    ]
