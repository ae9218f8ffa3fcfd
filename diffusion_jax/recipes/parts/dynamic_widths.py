"""Fine-tuning of a transformer whose widths depend on the timestep, what it is compared with, and their judgement."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import adapters, denoisers, models, objectives, solvers, timesteps
from diffusion_jax.acceleration import dynamic
from diffusion_jax.adapters import Timed
from diffusion_jax.clock import single_step
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment
from diffusion_jax.metrics import energy_distance
from diffusion_jax.recipes.frame import trained
from diffusion_jax.sampling import make_sampler
from diffusion_jax.typing import Network, Objective, Params


class FineTuning(NamedTuple):
    """A way to fine-tune. network: of whole parameters. objective: of those that learn.

    init: key -> what learns. whole: what learns -> the parameters of `network`.
    """

    network: Network
    objective: Objective
    init: Callable[[Any], Any]
    whole: Callable[[Any], Any]


def fine_tuned(config: ConfigDict, experiment: Experiment, arm: FineTuning, name: str, seed: int, given: Any) -> Any:
    """The parameters of an arm after fine-tuning by `config` with this seed."""
    config = config.copy_and_resolve_references()
    config.seed = seed
    made = experiment._replace(config=config, objective=arm.objective, optimizer=build(config.optimizer))
    return arm.whole(trained(made, name, init_params=arm.init, given=given))


def loss(experiment: Experiment, network: Network) -> Objective:
    """The denoising loss of the experiment, for another network."""
    return build(experiment.config.objective, network=network, process=experiment.process)


def example_inputs(experiment: Experiment) -> tuple:
    """`(x, t, cond)` of one example, for shapes."""
    batch = experiment.example()
    return batch["x0"], jnp.zeros(1), batch["cond"]


def dynamic_arm(budget: Any, experiment: Experiment, routed: Timed, params: Params) -> FineTuning:
    """The network with its routers, under a budget."""
    objective = build(budget, dynamic=loss(experiment, routed.network), complete=loss(experiment, routed.complete))

    def init(key):
        return {"params": params, **routed.init(key, params, *example_inputs(experiment))}

    return FineTuning(routed.network, objective, init, lambda tree: tree)


def uniform_arm(experiment: Experiment, routed: Timed, params: Params, kept: int) -> FineTuning:
    """The network with the same `kept` heads and groups at all t, those of the largest weights behind them."""
    gates = uniform_gates(routed, params, experiment, kept)
    objective = objectives.with_frozen(loss(experiment, routed.opened), {"gates": gates}, "params")
    return FineTuning(routed.opened, objective, lambda key: params, lambda learned: {"params": learned, "gates": gates})


def uniform_gates(routed: Timed, params: Params, experiment: Experiment, kept: int) -> Any:
    """The gates of `models.largest_gates`."""
    given = example_inputs(experiment)

    def gates():
        return routed.fill({"params": params, **routed.init(jax.random.key(0), params, *given)}, jnp.zeros(1))["gates"]

    return models.largest_gates(experiment.network, params, jax.eval_shape(gates), kept)


def lora_arm(
    config: ConfigDict, experiment: Experiment, groups: Any, params: Params, rank: int, experts: int
) -> FineTuning:
    """Factors and routers learn, the network does not; experts: 0 for factors without a mixture."""
    network, select = experiment.network, tuple(config.select)
    if experts:
        adapted = adapters.time_lora(network, rank, experts, select=select)
        opened, fills = adapted.opened, (adapted.fill,)
    else:
        adapted = adapters.lora(network, rank, select=select)
        opened, fills = adapted.network, ()
    routed = build(groups, network=opened)
    run = adapters.at_time(routed.opened, *fills, routed.fill)
    given = example_inputs(experiment)

    def init(key):
        first, second = jax.random.split(key)
        made = adapted.init(first, params, *given)
        made = made if experts else {"lora": made}
        # Routers are made where the mixture is data already.
        filled = {"params": params, **made}
        for fill in fills:
            filled = fill(filled, given[1])
        return {**made, **routed.init(second, filled, *given)}

    def around(inner, tree, *inputs):
        return inner({"params": tree["params"], **tree["learned"]}, *inputs)

    network = models.wrapped(run, around)
    budgeted = build(config.budget, dynamic=loss(experiment, network))
    objective = objectives.with_frozen(budgeted, {"params": params}, "learned")
    return FineTuning(network, objective, init, lambda learned: {"params": params, "learned": learned})


def held_out_loss(experiment: Experiment, network: Network, repeats: int) -> Callable[[Any], float]:
    """`params -> ` the loss on the held-out examples at stratified t, of the same times and noise for all networks."""
    objective = objectives.denoising(network, experiment.process, timesteps.stratified(), train=False)
    batch = jax.tree.map(jnp.asarray, experiment.held_out.take(np.arange(len(experiment.held_out))))

    @jax.jit
    def one(params, key):
        return objective.loss(params, (), batch, key)[0].mean()

    return lambda params: float(np.mean([one(params, jax.random.key(1000 + i)) for i in range(repeats)]))


def sampled(experiment: Experiment, network: Network, steps: int, count: int) -> Callable[[Any, int], float]:
    """`(params, seed) -> ` the energy distance of samples, with the labels of held-out digits, to those digits."""
    real = experiment.held_out.take(np.arange(min(count, len(experiment.held_out))))
    index = jnp.arange(len(real["x0"]))
    run = make_sampler(
        denoisers.denoiser(network, experiment.process), solvers.ddim(), shape=experiment.shape, mesh=experiment.mesh
    )
    cond = jax.tree.map(jnp.asarray, real["cond"])

    def distance(params, seed):
        x = run(jax.random.key(seed), params, timesteps.linspace(steps), cond, index).x
        return energy_distance(np.asarray(x).reshape(len(index), -1), real["x0"].reshape(len(index), -1))

    return distance


class Execution(NamedTuple):
    """difference: between cut and masked outputs, at most. share: what a run executes of the routed modules.

    dense, masked, cut: seconds of a step of a whole run, median. wide, narrow: of one evaluation in the bucket that
    executes most, and least, with their shares.
    """

    difference: float
    share: float
    dense: float
    masked: float
    cut: float
    wide: tuple[float, float]
    narrow: tuple[float, float]


def execution(experiment: Experiment, routed: Timed, tree: Any, sampling: Any, timing: Any) -> Execution:
    """What becomes of a step when weights are cut for the steps of a grid."""
    process, network = experiment.process, experiment.network
    grid = timesteps.linspace(sampling.steps)
    gates = dynamic.tabulated(routed.fill, tree, process, grid[:-1])
    costs = routed_costs(experiment, routed, tree)
    static = dynamic.static_widths(network, process, grid[:-1], gates, costs, sampling.buckets)
    masked = dynamic.tables_by_time(denoisers.denoiser(routed.opened, process), grid[:-1])
    plain = {"params": tree["params"]}
    arms = {
        "dense": (denoisers.denoiser(network, process), tree["params"]),
        "masked": (masked, {**plain, "tables": {"gates": gates}}),
        "cut": (static.denoiser, static.prepare(plain)),
    }
    key, size = jax.random.key(0), timing.batch
    cond = {"label": jnp.arange(size) % 10}
    x = jax.random.normal(key, (size, *experiment.shape))
    asked = {name: jax.jit(partial(_ask, one, cond=cond)) for name, (one, _) in arms.items()}

    def answer(name, t):
        return asked[name](arms[name][1], x, t)

    gaps = [float(jnp.abs(answer("cut", t) - answer("masked", t)).max()) for t in grid[:-1]]
    seconds = {}
    for name, (one, params) in arms.items():
        run = make_sampler(one, solvers.ddim(), shape=experiment.shape, mesh=experiment.mesh)
        whole = partial(run, key, params, grid, cond, jnp.arange(size))
        seconds[name] = median(lambda whole=whole: whole().x, timing.repeats) / sampling.steps
    ends = [int(np.argmax(static.ratio)), int(np.argmin(static.ratio))]
    wide, narrow = (
        (median(lambda i=i: answer("cut", grid[i]), 3 * timing.repeats), float(static.ratio[i])) for i in ends
    )
    return Execution(max(gaps), float(static.ratio.mean()), **seconds, wide=wide, narrow=narrow)


def _ask(denoiser, params, x, t, cond):
    step = single_step(t, jnp.zeros_like(t))
    return denoiser.apply(params, denoiser.init(params, x, cond), x, step, cond)[0].eps


def median(function: Callable[[], Any], repeats: int) -> float:
    """The median of the seconds that a call takes, the first not counted."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds))


def routed_costs(experiment: Experiment, routed: Timed, tree: Any) -> models.Costs:
    """What the routed modules cost."""
    x, t, cond = example_inputs(experiment)
    return models.width_costs(routed.opened, routed.fill(tree, t), x, t, cond)


def kept_shares(table: Any) -> Mapping[str, np.ndarray]:
    """The mean share of heads and of groups that are on, `[S]`, over blocks."""
    leaves = models.by_path(table)
    names = {"attend": "heads", "up": "hidden groups"}
    return {names[path.split("/")[-2]]: np.asarray(leaf).mean(axis=(1, 2, 3)) for path, leaf in leaves.items()}
