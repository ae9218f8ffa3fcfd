"""T-Stitch (Pan et al. 2024): a small model runs the first, noisiest steps of the trajectory, the large one the rest.

Two worlds of three models each: a ring of Gaussians, whose large model is exact and whose others are exact for the ring
with merged components, and digits with transformers under guidance. The share of the small model is swept, put last in
place of first, and compared with fewer steps of the large model at equal cost.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, metrics, pictures, processes, solvers, timesteps
from diffusion_jax.baselines import CLASSES, NULL
from diffusion_jax.costs import evaluation_flops
from diffusion_jax.recipes.study import Arm, Drawn, Results, Study, Tabulated, by_seed, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Condition, Denoiser

SOLVER, VP = solvers.ddim(), processes.vp_linear()
INDICES = (30, 60, *range(100, 1000, 100), 999)
"""Training indices at which the gap between two models is measured."""


class World(NamedTuple):
    """Three models, the smallest first. costs: of an evaluation, 1 for the largest. params: of a seed, three."""

    models: Sequence[Denoiser]
    costs: Sequence[float]
    params: Callable[[int], tuple[Any, ...]]
    shape: tuple[int, ...]
    measures: Callable[[Drawn], dict[str, float]]
    cond: Condition = None


def ring(s: Study) -> World:
    """Eight Gaussians on a circle, and the same seen as one and as four."""
    angles = 2 * np.pi * np.arange(8) / 8
    whole = denoisers.gaussian_mixture(1.5 * np.stack([np.cos(angles), np.sin(angles)], axis=-1), 0.15)
    params = *(denoisers.merged_components(whole, np.arange(8) * count // 8) for count in (1, 4)), whole

    def measures(drawn):
        points, _ = denoisers.sample_mixture(jax.random.key(1000 + drawn.seed), whole, len(drawn.x))
        return {"distance": metrics.energy_distance(drawn.x, np.asarray(points))}

    return World((denoisers.analytic(VP),) * 3, s.config.ring.costs, lambda seed: params, (2,), measures)


def digits(s: Study) -> World:
    """The small model is trained anew for each seed."""
    config, cond = s.config.digits, {"label": np.arange(s.config.digits.count) % CLASSES}
    large, middle = s.stage("digits", config.large), s.stage("middle", config.middle)
    small = {seed: s.stage(f"small {seed}", config.small, seed=seed) for seed in s.seeds}
    trained, shape = (small[s.seeds[0]], middle, large), large.trained.shape
    one = jax.ShapeDtypeStruct((1, *shape), jnp.float32), {"label": jax.ShapeDtypeStruct((1,), jnp.int32)}
    flops = [evaluation_flops(stage.trained.network, stage.value, *one) for stage in trained]
    plain = [denoisers.denoiser(stage.trained.network, stage.trained.process) for stage in trained]

    def params(seed):
        return small[seed].value, middle.value, large.value

    def measures(drawn):
        return metrics.judged(metrics.feature_network("digits"), drawn.x, cond["label"])._asdict()

    models = [denoisers.guided(model, config.guidance, NULL) for model in plain]
    return World(models, [count / flops[-1] for count in flops], params, shape, measures, cond)


def shared(steps: int, *shares: float) -> np.ndarray:
    """Which model runs at each step: the first `shares[0]` of the steps the smallest, and so on (`by_share`)."""
    ends = np.floor(np.cumsum(shares) * steps + 0.5 + 1e-4)
    return (np.arange(steps)[:, None] >= ends).sum(axis=1).astype(np.int32)


def tables(world: World, config: ConfigDict) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Which model runs at each step of each arm, and what a run costs in evaluations of the large model."""
    steps, found = config.steps, {f"first {share:g}": shared(config.steps, share, 0.0) for share in config.first}
    cost = {name: float(np.take(world.costs, which).sum()) for name, which in found.items()}
    found |= {f"fewer {share:g}": np.full(round(cost[f"first {share:g}"]), 2) for share in config.fewer}
    found |= {f"last {share:g}": 2 - 2 * shared(steps, 1.0 - share) for share in config.last}
    found["three"] = shared(steps, *config.three)
    return found, {name: float(np.take(world.costs, which).sum()) for name, which in found.items()}


def compared(s: Study, world: World, config: ConfigDict, which: dict[str, np.ndarray]) -> Tabulated:
    """Runs by tables; those of fewer steps are padded with steps that stand still, asked of the small model."""
    steps, cond = config.steps, world.cond

    def stitched(models):
        return denoisers.switched(world.models, models, world.costs)

    def arm(models, params):
        rest, grid = (0, steps - len(models)), timesteps.padded(timesteps.linspace(len(models)), steps)
        return Arm(stitched, params, SOLVER, grid, cond, (np.pad(models, rest).astype(np.int32),))

    def arms(seed):
        return {name: arm(models, world.params(seed)) for name, models in which.items()}

    return table(arms, s.seeds, world.measures, shape=world.shape, count=config.count)


def alike(s: Study, world: World, config: ConfigDict) -> dict[str, list[float]]:
    """The cosine of what the smallest and the largest model make of the same noise, at 40 % of the steps and last."""
    cond = {"label": np.arange(config.traced) % CLASSES}
    start = {"shape": (config.traced, *world.shape), "cond": cond, "save_every": 1}

    @jax.jit
    def traces(key, params):
        grid = timesteps.linspace(config.steps)
        return [sample(key, world.models[at], params[at], SOLVER, grid, **start).trace for at in (0, -1)]

    def cosines(seed):
        found = metrics.trajectory_similarity(*traces(jax.random.key(seed), world.params(seed)))
        return {"mark": found[round(0.4 * config.steps) - 1], "end": found[-1]}

    return by_seed(s.seeds, cosines)


def study(s: Study) -> Results:
    captions, rows = {}, []
    for name, make in {"digits": digits, "ring": ring}.items():
        if name not in s.config:
            continue
        config, world = s.config[name], make(s)
        which, cost = tables(world, config)
        found = compared(s, world, config, which)
        rows += world_rows(name, found, cost, config)
        titles = {"first": "small model first", "last": "small model last", "fewer": "large model, fewer steps"}
        curves = {title: curve(found, cost, arm, config) for arm, title in titles.items()}
        label = "cost of a run, in evaluations of the large model"
        title = f"Distance to the data by cost: {name}"
        pictures.save_curves(s.picture(name), curves, x_label=label, y_label=config.distance, title=title)
        captions[s.picture(name)] = f"Distance to the data by cost, {name}. Left is cheaper, lower is better."
        if name == "digits":
            rows += digit_rows(found, cost, alike(s, world, config))
            shown = [*(f"first {share:g}" for share in config.first), "last 0.4"]
            strips = {arm: found.samples[arm][:20] for arm in shown}
            pictures.save_strips(s.picture("samples"), strips, title="Share of the small model, first or last")
            captions[s.picture("samples")] = "The same noise for growing shares of the small model, and with it last."
        else:
            times, gaps = gap(world, s.seeds[0])
            labels: dict[str, Any] = {"x_label": "t (0 clean, 1 noise)", "y_label": "squared gap of predicted eps"}
            title = "Where the small and the large model agree"
            pictures.save_curves(s.picture("gap"), {"ring": (times, gaps)}, **labels, title=title)
            captions[s.picture("gap")] = "Both models say the same at high noise: that is where the small one may run."
            rows += ring_rows(gaps)
    return Results(rows, captions, "the training of the small model and the noise; the others are trained once")


def gap(world: World, seed: int) -> tuple[list[float], list[float]]:
    """Times, and the squared difference in epsilon of the ring's smallest and largest model at each."""
    small, _, large = world.params(seed)
    x0, _ = denoisers.sample_mixture(jax.random.key(seed), large, 4000)
    times, pair = [(index + 1) / 1000 for index in INDICES], (world.models[0], world.models[-1])
    return times, metrics.epsilon_gap(jax.random.key(seed), pair, (small, large), x0, times).tolist()


def curve(found: Tabulated, cost: dict[str, float], arm: str, config: ConfigDict) -> tuple[list[float], list[float]]:
    names = [f"{arm} {share:g}" for share in config[arm]]
    return [cost[name] for name in names], [float(np.mean(found[name]["distance"])) for name in names]


def world_rows(name: str, found: Tabulated, cost: dict[str, float], config: ConfigDict) -> list[Row]:
    of = {arm: np.asarray(row["distance"]) for arm, row in found.figures.items()}
    figure, within = f"{config.distance}, {config.steps} steps", {"direction": "lower", "margin": config.tolerance}
    convex, early = (of["first 1"] - of["first 0.6"]).tolist(), (of["first 0.4"] - of["first 0"]).tolist()
    of = {arm: values.tolist() for arm, values in of.items()}
    plain, first, wrong = of["first 0"], of["first 0.4"], (of["last 0.4"], of["first 0.4"])
    title = f"{name}: three models at {cost['three'] / config.steps:.2f} of the cost"
    few, good = {"published": "complementary", **within}, {"published": "40 % without loss", **within}
    return [
        Row(f"{name}: the first 40 % cost nothing", figure, first, plain, **good),
        Row(f"{name}: the curve is convex", "rise from r = 0.6 to 1, 0 to 0.4", convex, early, "higher", "flat, steep"),
        Row(f"{name}: the last 40 % are worse", figure, *wrong, "higher", config.published, config.worse),
        Row(title, figure, of["three"], plain, published="S, B and XL in one run", **within),
        Row(f"{name}: r = 0.4 against fewer steps", figure, first, of["fewer 0.4"], **few),
        Row(f"{name}: r = 0.8 against fewer steps", figure, of["first 0.8"], of["fewer 0.8"], **within),
    ]


def ring_rows(gaps: Sequence[float]) -> list[Row]:
    later, at_200 = max(gaps[INDICES.index(400) :]), gaps[INDICES.index(200)]
    return [
        Row("ring: models agree from index 400 on", "largest gap in epsilon", later, 1e-3, "lower", "below 1e-3"),
        Row("ring: they disagree at index 200", "gap in epsilon", at_200, 0.12, "equal", "0.12", margin=0.01),
    ]


def digit_rows(found: Tabulated, cost: dict[str, float], cosines: dict[str, list[float]]) -> list[Row]:
    first, plain = found["first 0.4"], found["first 0"]
    faster, promised = np.divide(plain["seconds"], first["seconds"]).tolist(), cost["first 0"] / cost["first 0.4"]
    kept = first["accuracy"], plain["accuracy"], "higher", "prompts are kept"
    return [
        Row("digits: the first 40 % keep labels", "accuracy, up to 2 points less", *kept, margin=-0.02),
        Row("digits: runs agree at the 40 % mark", "cosine of x_t", cosines["mark"], 0.95, "higher", "high"),
        Row("digits: and part later", "cosine at the end", cosines["end"], cosines["mark"], "lower", "falls"),
        Row("digits: time as operations say", "times faster at 0.4", faster, promised, "higher", "1.57", factor=0.85),
    ]
