"""ERTACache (Peng et al. 2025): where, how far and with which correction an output is reused, from recorded runs.

Two worlds: the exact velocity of a Gaussian mixture by Euler's method in t, and a transformer on digits under guidance
by DDIM in s = sigma / alpha. In each the three parts are added one after the other and compared with uniform reuse and
with fewer steps of the plain solver, all at equal evaluations; so are schedules by a step's influence on the endpoint.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import acceleration, denoisers, pictures, processes, solvers, timesteps
from diffusion_jax.acceleration import Calibration, Trajectories
from diffusion_jax.acceleration.calibration import integrated
from diffusion_jax.baselines import CLASSES, NULL
from diffusion_jax.config import build
from diffusion_jax.metrics import endpoint_error, feature_network, judged
from diffusion_jax.recipes.study import Arm, Results, Study, Tabulated, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.typing import Condition, Denoiser, Params, Solver

PARTS = ("fewer steps", "uniform reuse", "schedule", "and times", "and correction", "all three parts", "by influence")
"""The arms at each setting: the plain solver, reuse, one part of the method after the other; all of them for outputs
in place of residuals, with a schedule that weighs a step by what it does to the end of the run."""


class Testbed(NamedTuple):
    """What is sampled. params: of a seed. fit: (runs, setting, **how) -> Calibration. recorded: what runs are recorded
    of, one calibration each."""

    inner: Denoiser
    solver: Solver
    grid: Any
    shape: tuple[int, ...]
    params: Callable[[int], Params]
    fit: Callable[..., Calibration]
    cond: Condition = None
    recorded: Sequence[Condition] = (None,)


def study(s: Study) -> Results:
    rows: list[Row] = []
    drawn: dict[Any, str] = {}
    for name, world_of in {"mixture": mixture_world, "digits": digit_world}.items():
        if name not in s.config:
            continue
        config, world = s.config[name], world_of(s)
        found, overlaps = compared(s, world, config)
        rows += part_rows(found, name, config)
        rows += mixture_rows(found) if name == "mixture" else digit_rows(found, overlaps, config)
        curves = {
            part: (means(found, part, "evaluations", config), means(found, part, "error", config)) for part in PARTS
        }
        labels: dict[str, Any] = {"x_label": "evaluations of the network", "y_label": "endpoint error"}
        pictures.save_curves(s.picture(name), curves, **labels, title=f"Distance to the full run: {name}")
        drawn[s.picture(name)] = f"Distance to the end of the full run by evaluations, {name}: lower is better."
    images = {
        arm: found.samples[arm][:10] for arm in ("full", f"uniform reuse {config.shown}", f"{PARTS[-2]} {config.shown}")
    }
    pictures.save_strips(s.picture("samples"), images, title="The same noise, in full and with fewer evaluations")
    drawn[s.picture("samples")] = f"Digits of one seed in full, and with {config.shown} of {len(world.grid) - 1} steps."
    return Results(rows, drawn, "the mixture's means, the recorded runs and the noise; the transformer is trained once")


def mixture_world(s: Study) -> Testbed:
    """The exact velocity of a mixture, whose means each seed draws anew."""
    config, flow = s.config.mixture, processes.rectified_flow()
    grid = timesteps.linspace(config.steps)

    def params(seed):
        points = jax.random.normal(jax.random.key(seed), (config.modes, config.dims))
        return denoisers.gaussian_mixture(points, config.std)

    def fit(runs, threshold, **how):
        return acceleration.calibrate(runs, grid, flow, threshold, **how)

    return Testbed(denoisers.analytic(flow), solvers.flow_euler(), grid, (config.dims,), params, fit)


def digit_world(s: Study) -> Testbed:
    """A trained network under guidance, recorded on either half of classes. Settings are numbers of computed steps."""
    config, base = s.config.digits, s.stage("digits", s.config.digits.base)
    network, process, grid = base.trained.network, base.trained.process, build(config.grid)
    # Without bounds one sample in a hundred of the full run itself leaves the range of pixels and is all that is seen.
    guided = denoisers.clipped(denoisers.guided(denoisers.denoiser(network, process), config.guidance, NULL))
    halves = [{"label": jnp.arange(config.calibration) % (CLASSES // 2) + first} for first in (0, CLASSES // 2)]

    def fit(runs, count, residual=True):
        threshold = acceleration.threshold_at_count(runs, count, residual=residual)
        return acceleration.calibrate(runs, grid, process, threshold, residual=residual)

    cond = {"label": jnp.arange(config.samples) % CLASSES}
    return Testbed(guided, solvers.ddim(), grid, base.trained.shape, lambda _: base.value, fit, cond, halves)


def by_influence(world: Testbed, runs: Trajectories, count: int) -> Calibration:
    """A calibration of outputs at equal evaluations, steps weighed by influence; data spread as the runs end."""
    process = world.inner.process
    weight = acceleration.endpoint_influence(process, world.grid, float(runs.x[-1].std()))
    how = {"residual": False, "weight": weight}
    threshold = acceleration.threshold_at_count(runs, count, **how)
    return acceleration.calibrate(runs, world.grid, process, threshold, **how)


def reusing(inner: Denoiser, residual: bool, computed: Any, correction: Any) -> Denoiser:
    """Reuse as a function of the schedule and the correction, so that all of them are one program."""
    options = {"prediction": integrated(inner.process), "residual": residual, "correction": correction}
    return acceleration.cached_outputs(inner, acceleration.on_schedule(computed), **options)


def settings_of(world: Testbed, calibration: Calibration, part: str) -> tuple[Any, Any]:
    """The grid of a part and the settings of its denoiser: it asks the network as often as `calibration` does."""
    steps, count = len(world.grid) - 1, int(calibration.computed.sum())
    computed, correction, grid = calibration.computed, calibration.correction, jnp.asarray(world.grid)
    if part not in PARTS[4:]:
        correction = jax.tree.map(jnp.zeros_like, correction)
    if part == "fewer steps":
        # The solver at `count` steps spread along the grid; further ones stand still, so that it is one program.
        coarse = jnp.interp(jnp.linspace(0, steps, count + 1), jnp.arange(steps + 1), grid)
        computed, grid = jnp.arange(steps) < count, timesteps.padded(coarse, steps)
    if part == "uniform reuse":
        computed = acceleration.spread_schedule(steps, count)
    if part == PARTS[3] or part in PARTS[5:]:
        grid = acceleration.calibrated_grid(grid, calibration, world.inner.process)
    return jax.device_get((grid, (jnp.asarray(computed), correction)))


def compared(s: Study, world: Testbed, config: ConfigDict) -> tuple[Tabulated, list[float]]:
    """The parts at every setting, the other calibrations of the config, and the overlap of those of the halves."""
    denoiser = {residual: partial(reusing, world.inner, residual) for residual in (True, False)}
    shape, solver, overlaps = (config.calibration, *world.shape), world.solver, []

    @jax.jit
    def record(key, params, cond):
        return acceleration.record_outputs(key, world.inner, params, solver, world.grid, shape=shape, cond=cond)

    def arms(seed):
        params, keys = world.params(seed), jax.random.split(jax.random.key(1000 + seed), len(world.recorded))
        runs = [record(key, params, cond) for key, cond in zip(keys, world.recorded, strict=True)]
        whole = Trajectories(*(jnp.concatenate(parts, axis=1) for parts in zip(*runs, strict=True)))
        if len(runs) == 2:
            overlaps.append(acceleration.reuse_overlap(*(world.fit(half, config.shown) for half in runs)))

        def arm(calibration, part):
            grid, settings = settings_of(world, calibration, part)
            return Arm(denoiser[calibration.valid_for["residual"]], params, solver, grid, world.cond, settings)

        found = {"full": Arm(world.inner, params, solver, world.grid, world.cond)}
        for at in config.settings:
            calibration = world.fit(whole, at)
            weighted = by_influence(world, whole, int(calibration.computed.sum()))
            kept = {part: weighted if part == PARTS[-1] else calibration for part in PARTS}
            found |= {f"{part} {at:g}": arm(one, part) for part, one in kept.items()}
        for name, (at, part, how) in config.others.items():
            found[name] = arm(world.fit(whole, at, **how), part)
        return found

    measures = {"error": lambda drawn: endpoint_error(drawn.x, drawn.reference)}
    if config.judged:
        judge = feature_network("digits")
        measures["accuracy"] = lambda drawn: judged(judge, drawn.x, drawn.cond["label"]).accuracy
    return table(arms, s.seeds, measures, shape=world.shape, count=config.samples, reference="full"), overlaps


def means(found: Tabulated, part: str, measure: str, config: ConfigDict) -> list[float]:
    return [float(np.mean(found[f"{part} {at:g}"][measure])) for at in config.settings]


def part_rows(found: Tabulated, name: str, config: ConfigDict) -> list[Row]:
    """What the corrections add to the schedule, and what all of it is worth against two simpler ways."""
    whole, influence = PARTS[-2:]
    told = [
        ("beats fewer steps", whole, "fewer steps", "not compared"),
        ("beats uniform reuse", whole, "uniform reuse", "PSNR 23.8 against 13.8 (Wan2.1)"),
        ("times and correction help", whole, "schedule", "PSNR 23.8 against 22.1 (Wan2.1)"),
        ("by influence, beats fewer steps", influence, "fewer steps", "not of the paper"),
    ]
    rows = []
    for at in config.settings:
        figure = f"endpoint error at {np.mean(found[f'{whole} {at:g}']['evaluations']):.3g} evaluations"
        for what, ours, part, published in told:
            sides = f"{ours} {at:g}", f"{part} {at:g}"
            rows.append(found.row(f"{name}, {at:g}: {what}", "error", *sides, "lower", published, figure=figure))
    return rows


def mixture_rows(found: Tabulated) -> list[Row]:
    """What the card's prototype found about the distance d by which a step is shortened."""
    told = "endpoint error with adjusted times"
    lose, gain = "mixture: d = change of v, residuals lose", "mixture: d = change of v, outputs gain"
    return [
        found.row("mixture: threshold 0 is the plain sampler", "error", "none", 0.0, "equal", "exact", margin=1e-5),
        found.row(lose, "error", "residual, change", "residual", "higher", "0.111 against 0.064", figure=told),
        found.row(gain, "error", "output, change", "output", "lower", "0.024 against 0.043", figure=told),
    ]


def digit_rows(found: Tabulated, overlaps: Sequence[float], config: ConfigDict) -> list[Row]:
    """Whether a calibration depends on the classes that it saw, and what reuse does to samples."""
    name, ours = f"digits, {config.shown}", f"{PARTS[-2]} {config.shown}"
    rows = [
        Row(f"{name}: other classes, same steps", "Jaccard index", list(overlaps), 0.8, "higher", "nearly the same"),
        found.row(f"{name}: residuals beat outputs", "error", ours, "output", "lower", "residuals are what is kept"),
    ]
    if config.judged:
        bounds = {"margin": -0.03, "figure": "share read as their label, up to 3 points"}
        title, published = f"{name}: samples are as good", "VBench 80.7 against 81.3 (2.17x)"
        rows.append(found.row(title, "accuracy", ours, "full", "higher", published, **bounds))
    return rows
