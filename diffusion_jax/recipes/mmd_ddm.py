"""MMD-DDM (Aiello et al. 2024): a sampler of few steps is tuned end to end, so that what it draws matches data in the
maximum mean discrepancy of features.

Two worlds: a ring of Gaussians with an MLP, in three spaces of features and at two numbers of steps, and digits with a
class-conditional transformer, tuned in features of a random network and judged by a trained one. Each is compared with
its own network at more steps, with a solver of higher order and with as many ordinary updates.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, denoisers, metrics, objectives, pictures, processes, solvers, training
from diffusion_jax.baselines import CLASSES
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.study import Arm, Drawn, Results, Study, Tabulated, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.stages import Stage
from diffusion_jax.timesteps import leading, trailing
from diffusion_jax.typing import Condition, Grid


def tuned(config: ConfigDict, base: Stage) -> Experiment:
    """Further training of the base."""
    return prepare(config, begin=lambda key: base.value)


def study(s: Study) -> Results:
    captions, rows = {}, []
    for world, (measures, claims) in WORLDS.items():
        if world not in s.config:
            continue
        config = s.config[world]
        found = compared(s, world, measures(config))
        captions |= draw_curves(s, found, world)
        if world == "digits":
            captions |= draw_digits(s, found)
        rows += claims(found, config)
    if "memory" in s.config:
        rows += memory_rows(s.config.memory)
    return Results(rows, captions, "the tuning and the noise; each base is trained once")


def grid_of(steps: int) -> Grid:
    return leading(steps, 1000)


def compared(s: Study, world: str, measures: Callable[[Drawn], Mapping[str, float]]) -> Tabulated:
    """The base at several numbers of steps and with a solver of higher order, and what was tuned of it.

    Names end in the number of steps. The base is trained once.
    """
    config, ddim, few = s.config[world], solvers.ddim(), s.config[world].steps
    base = s.stage(world, config.base)
    cond: Condition = {"label": np.arange(config.count) % CLASSES} if world == "digits" else None
    denoiser = denoisers.denoiser(base.trained.network, base.trained.process)

    def arms(seed):
        made = {
            name: s.stage(f"{world}, {name} {seed}", entry, base, seed=seed, prepare=tuned).value
            for name, entry in config.tuned.items()
        }
        found = {f"plain, {steps}": Arm(denoiser, base.value, ddim, grid_of(steps), cond) for steps in config.plain}
        better = solvers.dpm_solver_pp(2)
        found |= {f"DPM-Solver++, {few}": Arm(denoiser, base.value, better, grid_of(few), cond)}
        found |= {f"trailing, {few}": Arm(denoiser, base.value, ddim, trailing(few, 1000), cond)}
        found[f"longer, {few}"] = Arm(denoiser, made.pop("longer"), ddim, grid_of(few), cond)
        for name, params in made.items():
            found[name] = Arm(denoiser, params, ddim, grid_of(int(name.split(", ")[1])), cond)
        many = config.plain[-1]
        found[f"tuned, {many}"] = Arm(denoiser, made[f"{config.headline}, {few}"], ddim, grid_of(many), cond)
        return found

    return table(arms, s.seeds, measures, shape=base.trained.shape, count=config.count)


def ring_measures(config: ConfigDict) -> Callable[[Drawn], Mapping[str, float]]:
    """Distances to as many held-out points, all of which are new to the networks."""
    points = data.stacked_examples(build(config.base.held_out), np.arange(config.count))["x0"]

    def measure(drawn):
        return {
            "distance": metrics.sliced_wasserstein(drawn.x, points),
            "mmd2": metrics.mmd2(drawn.x[:1000], points[:1000], bandwidth=0.3),
        }

    return measure


def digit_measures(config: ConfigDict) -> Callable[[Drawn], Mapping[str, float]]:
    """What a judge says whose features no network was tuned on."""
    asked = np.arange(config.count) % CLASSES
    return lambda drawn: metrics.judged(metrics.feature_network("digits"), drawn.x, asked)._asdict()


def equivalent_steps(found: Tabulated, arm: str, config: ConfigDict) -> list[float]:
    """How many plain steps are as good as `arm`, for each seed: between those that were run, by the logarithms; at
    most as many as were run."""
    plain = np.array([found[f"plain, {steps}"]["distance"] for steps in config.plain])
    best = np.log(np.minimum.accumulate(plain, axis=0))[::-1]
    steps = np.log(np.array(config.plain, float))[::-1]
    ours = np.log(found[arm]["distance"])
    return [float(np.exp(np.interp(value, best[:, i], steps))) for i, value in enumerate(ours)]


def ring_rows(found: Tabulated, config: ConfigDict) -> list[Row]:
    """The claims of the method, with what its calibration on this ring gave."""
    w2, mmd, few = "sliced W2", "held-out squared MMD", config.steps
    ours, many, equal = f"{config.headline}, {few}", config.plain[-1], "better at equal steps"
    rows = [
        Row(f"ring: {few} tuned steps are worth ten plain ones", "plain steps of the same sliced W2",
            equivalent_steps(found, ours, config), 10.0, "higher", "between 10 and 50"),
    ]  # fmt: skip
    claims = [
        ("and in random features", "distance", f"Fourier, {few}", "plain, 10", "lower", "0.072, 0.084", 1.0, w2),
        (f"three times nearer at {few} steps", "distance", ours, f"plain, {few}", "lower", "0.060, 0.229", 1 / 3, w2),
        ("three times nearer at 2 steps", "distance", "RBF, 2", "plain, 2", "lower", "0.059, 0.535", 1 / 3, w2),
        ("the discrepancy of held-out data", "mmd2", ours, f"plain, {few}", "lower", "a fifth", 0.2, mmd),
        ("better than as many ordinary updates", "distance", ours, f"longer, {few}", "lower", "", 1.0, w2),
        ("better than a solver of order 2", "distance", ours, f"DPM-Solver++, {few}", "lower", equal, 1.0, w2),
        ("better than plain steps from pure noise", "distance", ours, f"trailing, {few}", "lower", "", 1.0, w2),
        (f"it is worse at {many} steps now", "distance", f"tuned, {many}", f"plain, {many}", "higher", "0.09, 0.035",
         1.0, w2),
        ("moments alone are worse at 2 steps", "distance", "cubic, 2", "RBF, 2", "higher", "0.109, 0.059", 1.0, w2),
    ]  # fmt: skip
    return rows + [
        found.row(f"ring: {title}", measure, one, other, way, published, factor, figure=figure)
        for title, measure, one, other, way, published, factor, figure in claims
        if one in found.figures and other in found.figures
    ]


def digit_rows(found: Tabulated, config: ConfigDict) -> list[Row]:
    few, many, far = config.steps, config.plain[-1], "Fréchet distance, another judge"
    ours, equal = f"{config.headline}, {few}", "better at equal steps"
    rivals = {
        f"{few} plain steps": (f"plain, {few}", equal),
        "as many ordinary updates": (f"longer, {few}", ""),
        "a solver of order 2": (f"DPM-Solver++, {few}", equal),
        "plain steps from pure noise": (f"trailing, {few}", equal),
    }
    return [
        *(
            found.row(f"digits: nearer than {rival}", "distance", ours, arm, "lower", published, figure=far)
            for rival, (arm, published) in rivals.items()
        ),
        Row(f"digits: {few} tuned steps are worth ten plain ones", "plain steps of the same Fréchet distance",
            equivalent_steps(found, ours, config), 10.0, "higher", "fewer steps, equal FID"),
        found.row("digits: classes are kept", "accuracy", ours, f"plain, {few}", "higher", margin=-0.02,
                  figure="accuracy, up to 2 points less"),
        found.row(f"digits: it is worse at {many} steps now", "distance", f"tuned, {many}", f"plain, {many}", "higher",
                  "specialised", figure=far),
    ]  # fmt: skip


def memory_rows(config: ConfigDict) -> list[Row]:
    """Scratch memory of compiled training steps, as multiples of an ordinary one: nothing is run."""
    network, process = build(config.model), processes.vp_linear()
    batch, optimizer = {"x0": jnp.zeros(config.shape)}, training.optimizers.adamw(1e-4)

    def scratch(objective):
        begin = training.make_init(objective, optimizer, lambda key: network.init(
            key, batch["x0"][:1], jnp.zeros(1), None), batch)  # fmt: skip
        step = training.make_train_step(objective, optimizer).lower(jax.eval_shape(begin), batch)
        return step.compile().memory_analysis().temp_size_in_bytes

    def matching(remat):
        run = objectives.whole_runs(denoisers.denoiser(network, process), solvers.ddim(), grid_of(config.steps), remat)
        return objectives.kernel_matching(run, [objectives.raw_space(objectives.polynomial_kernel())])

    one, figure = scratch(objectives.denoising(network, process)), "scratch of a compiled step, times that of denoising"
    ratio, whole = (scratch(matching(remat)) / one for remat in (True, False))
    return [
        Row(f"memory: {config.steps} steps in that of little more than one", figure, ratio, 2.5, "lower"),
        Row("memory: less than half of that of steps that are kept", figure, ratio, whole, "lower", factor=0.5),
    ]


def draw_curves(s: Study, found: Tabulated, world: str) -> dict[Any, str]:
    """Distances by steps: a curve of the base, and a point for each that was tuned."""
    config, title = s.config[world], f"{world}: distance to held-out data"
    alone = [name for name in found.figures if not name.startswith(("plain", "tuned"))]
    points = {name: ([int(name.split(", ")[1])], [float(np.mean(found[name]["distance"]))]) for name in alone}
    mean = [float(np.mean(found[f"plain, {steps}"]["distance"])) for steps in config.plain]
    curves = {"plain DDIM": (list(config.plain), mean), **points}
    pictures.save_curves(s.picture(world), curves, x_label="steps", y_label="distance", title=title)
    worth = {name: float(np.mean(equivalent_steps(found, name, config))) for name in alone}
    told = ", ".join(f"{name} steps: {steps:.1f}" for name, steps in worth.items())
    return {s.picture(world): f"Distance to held-out data by steps, {world}. Plain steps that are as good: {told}."}


def draw_digits(s: Study, found: Tabulated) -> dict[Any, str]:
    """The same noise, by the base and by what was tuned of it."""
    config = s.config.digits
    shown = ("plain, {}", "longer, {}", f"{config.headline}, {{}}", f"plain, {config.plain[-1]}")
    strips = {name: found.samples[name][:20] for name in (one.format(config.steps) for one in shown)}
    strips["data"] = data.digits("test").x0[:20]
    pictures.save_strips(s.picture("samples"), strips, title=f"{config.steps} steps from the same noise")
    return {s.picture("samples"): "Digits of few steps, from the same noise; the last are data."}


WORLDS = {"digits": (digit_measures, digit_rows), "ring": (ring_measures, ring_rows)}
"""What is measured and claimed of each."""
