"""Residual shadow removal: the state of a run is between the picture with its shadow and the one without, plus noise.

A U-Net is trained on latents of pictures without shadows and frozen; a control branch learns to remove shadows beside
it, of a process from noise alone, of the residual process, and of that with states that the model made itself. Branches
have the same network and as many updates. Occluders and pictures of the test are of other kinds than those of training.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, denoisers, metrics, models, objectives, pictures, solvers, timesteps
from diffusion_jax.config import build
from diffusion_jax.data.shadows import best_gain, light_error
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.study import Arm, Drawn, Results, Study, Tabulated, by_seed, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.stages import Stage

WAYS = ("noise", "residual", "enhanced")


def latents_of(config: ConfigDict) -> dict[str, Any]:
    """The linear autoencoder of pictures with shadows and without, and pairs of each split in its latents."""
    sources = {split: build(config[split]) for split in ("train", "test")}
    seen = np.concatenate([sources["train"].x0, sources["train"].cond["picture"]])
    linear = build(config.autoencoder)
    encode = jax.jit(partial(linear.encode, params := linear.init(None, seen)))
    found = {split: data.encoded(source, encode, conditions=("picture",)) for split, source in sources.items()}
    return {"space": params, **{split: {"clear": z.x0, "shadow": z.cond["picture"]} for split, z in found.items()}}


def without_shadows(config: ConfigDict, latents: Stage) -> Experiment:
    """A prior: ordinary diffusion of latents without shadows."""
    return prepare(config, source=data.ArraySource(np.asarray(latents.value["train"]["clear"])))


def condition_of(process: Any, shadow: Any) -> dict[str, Any]:
    """All branches see the latents with the shadow; a residual process ends there too."""
    return {"control": shadow, **({"endpoint": shadow} if hasattr(process, "given") else {})}


def beside(config: ConfigDict, latents: Stage, prior: Stage) -> Experiment:
    """A branch beside the frozen prior."""
    clear, shadow = (np.asarray(latents.value["train"][name]) for name in ("clear", "shadow"))
    branch, process = build(config.branch), build(config.process)
    network, cond = models.controlled(prior.trained.network, branch), condition_of(process, shadow)
    source = data.ArraySource(clear, cond)
    plain = prepare(config, source=source, network=network).objective
    objective = objectives.with_frozen(plain, {"unet": prior.value}, "control")
    if config.enhanced:
        parts = {"objective": objective, "denoiser": denoisers.denoiser(network, process)}
        whole = lambda learned, state: {**state.frozen.value, "control": learned}  # noqa: E731
        objective = build(config.enhanced, **parts, whole=whole)

    def begin(key):
        made = branch.init(key, clear[:1], jnp.zeros(1), {"control": shadow[:1]})
        return models.control_from_unet(prior.value, made)

    return prepare(config, source=source, network=network, objective=objective, begin=begin)


def seeing(config: ConfigDict, latents: Stage) -> Experiment:
    """What the decoder sees of the picture with the shadow."""
    autoencoder = build(config.latents.autoencoder)
    decoder = models.detailed(autoencoder, config.width)
    objective = objectives.detail_loss(decoder, autoencoder, latents.value["space"])
    return prepare(config, network=decoder, objective=objective, begin=decoder.init)


class Test:
    """Held-out pairs, their latents, and what of a picture is measured in which region."""

    def __init__(self, config: ConfigDict, latents: Stage):
        source, self.space = build(config.latents.test), latents.value["space"]
        self.autoencoder = build(config.latents.autoencoder)
        self.truth, self.picture = source.x0, source.cond["picture"]
        self.masks = {"whole": np.ones_like(source.visibility), **source.regions(np.arange(len(source)))}
        self.clear, self.shadow = (np.asarray(latents.value["test"][name]) for name in ("clear", "shadow"))
        self.runs: dict[tuple[int, str], np.ndarray] = {}
        self.decode = jax.jit(lambda latents: jnp.clip(self.autoencoder.decode(self.space, latents), -1, 1))

    def psnr(self, x: Any) -> dict[str, float]:
        return metrics.psnr_by_region(x, self.truth, self.masks)

    def measures(self, drawn: Drawn) -> dict[str, float]:
        """Of two runs of each picture: mean PSNR by region, and the variance between the two in lit pixels."""
        self.runs[drawn.seed, drawn.arm] = drawn.x
        first, second = (np.asarray(self.decode(part)) for part in np.split(drawn.x, 2))
        one, other, lit = self.psnr(first), self.psnr(second), self.masks["lit"]
        spread = 0.5 * np.square(first - second).mean(-1, keepdims=True)
        return {name: (one[name] + other[name]) / 2 for name in one} | {"spread": np.average(spread, weights=lit)}


def study(s: Study) -> Results:
    config = s.config
    latents = s.stage("latents", config.latents, make=latents_of)
    priors = {name: s.stage(f"prior, {name}", config.priors[name], latents, prepare=without_shadows) for name in
              ("noise", "residual")}  # fmt: skip
    priors["enhanced"], test = priors["residual"], Test(config, latents)
    processes = {name: build(config[name].process) for name in WAYS}
    network = models.controlled(priors["noise"].trained.network, build(config.noise.branch))
    denoiser = {name: denoisers.denoiser(network, processes[name]) for name in ("noise", "residual")}
    denoiser["enhanced"] = denoiser["residual"]
    twice, solver = np.concatenate([test.shadow, test.shadow]), solvers.ddim()
    # One program for all numbers of steps: the last ones stand still.
    grids = {steps: timesteps.padded(timesteps.linspace(steps), max(config.steps)) for steps in config.steps}

    def tree(name, seed):
        learned = s.stage(name, config[name], latents, priors[name], seed=seed, prepare=beside).value
        return {"unet": priors[name].value, "control": learned}

    def arms(seed):
        told = {name: condition_of(processes[name], twice) for name in WAYS}
        return {f"{name}, {steps}": Arm(denoiser[name], tree(name, seed), solver, grids[steps], told[name])
                for name in WAYS for steps in config.steps}  # fmt: skip

    found = table(arms, s.seeds, test.measures, shape=test.clear.shape[1:], count=len(twice))
    walk = jax.jit(partial(metrics.exposure_errors, denoiser=denoiser["enhanced"], x0=test.clear,
                           grid=timesteps.linspace(config.walk)))  # fmt: skip
    cond = condition_of(processes["enhanced"], test.shadow)
    own = lambda seed, name: walk(jax.random.key(seed), params=tree(name, seed), cond=cond)  # noqa: E731
    steps = {name: by_seed(s.seeds, lambda seed, name=name: metrics.exposure_figures(own(seed, name)))
             for name in WAYS[1:]}  # fmt: skip
    restored, seen = decoded(s, latents, test)
    rows = removal_rows(found, config.steps, steps) + seen
    return Results(rows, drawn(s, test, found, restored, steps), "branch, decoder and noise; priors are trained once")


def decoded(s: Study, latents: Stage, test: Test) -> tuple[np.ndarray, list[Row]]:
    """Pictures restored by the decoder that sees the picture with the shadow, and rows on it."""
    decoder, last = models.detailed(test.autoencoder, s.config.details.width), f"enhanced, {s.config.final}"
    decode = jax.jit(lambda learned, z: jnp.clip(decoder.decode(learned, test.space, z, test.picture), -1, 1))
    plain, shadow, kept = np.asarray(test.decode(test.clear)), test.masks["shadow"], []

    def figures(seed):
        learned = s.stage("details", s.config.details, latents, seed=seed, prepare=seeing).value
        seen, restored = decode(learned, test.clear), decode(learned, test.runs[seed, last][: len(test.truth)])
        kept.append(np.asarray(restored))
        measured = {f"restored, {name}": value for name, value in test.psnr(restored).items()}
        return {"lit": test.psnr(seen)["lit"], "left": light_error(seen, test.truth, shadow), **measured}

    measured, psnr = by_seed(s.seeds, figures), "PSNR, dB"
    rows = [
        Row("The decoder that sees the picture keeps details", f"{psnr}, lit pixels, latents of the truth",
            measured["lit"], test.psnr(plain)["lit"], "higher", "details are restored", margin=2.0),
        Row("It does not bring the shadow back", "size of the log ratio of light in the shadow", measured["left"],
            light_error(plain, test.truth, shadow), "lower", "not reported"),
        Row("Better than the picture with its shadow", f"{psnr}, in the shadow", measured["restored, shadow"],
            test.psnr(test.picture)["shadow"], "higher", "best LPIPS and FID"),
        Row("Better than the best gain of each picture", f"{psnr}, whole picture", measured["restored, whole"],
            test.psnr(best_gain(test.picture, test.truth))["whole"], "higher", "best LPIPS and FID"),
    ]  # fmt: skip
    return kept[0], rows


def removal_rows(found: Tabulated, steps: tuple[int, ...], walk: dict[str, dict[str, list[float]]]) -> list[Row]:
    """The residual process against the same branch of a process from pure noise, and self-enhancement."""
    (few, some, many), ours, plain = steps, walk["enhanced"], walk["residual"]

    def row(title, measure, n, direction, published, figure, **more):
        arms = f"residual, {n}", f"noise, {n}"
        return found.row(f"{title} {n} steps", measure, *arms, direction, published, figure=figure, **more)

    lit, kept = "PSNR, dB, lit pixels", "content is kept"
    ahead = {n: np.subtract(found[f"residual, {n}"]["lit"], found[f"noise, {n}"]["lit"]).tolist() for n in steps}
    return [
        row("Residual, not noise:", "whole", few, "higher", kept, "PSNR, dB, whole picture"),
        row("Lit pixels stay:", "lit", few, "higher", kept, lit, margin=1.5),
        row("Lit pixels stay:", "lit", some, "higher", kept, lit),
        Row("Most at few steps", f"dB ahead in lit pixels; {few}, {many} steps", ahead[few], ahead[many], "higher",
            "not reported"),
        row("Half the variance between noises,", "spread", few, "lower", "not reported", "variance, lit pixels",
            factor=0.5),
        Row("Self-enhanced: no step makes it worse", "largest fall of PSNR of x0, dB", ours["fall"], 0.0, "equal",
            "errors are corrected", margin=0.01),
        Row("Self-enhanced: own states cost 20 % less", "added square error at the last step", ours["gap"],
            plain["gap"], "lower", "errors are corrected", factor=0.8),
    ]  # fmt: skip


def drawn(s: Study, test: Test, found: Tabulated, restored: Any, steps: Any) -> dict[Any, str]:
    few, count = s.config.steps[0], s.config.shown
    made = {f"{name}, {few} steps": found.samples[f"{name}, {few}"][:count] for name in WAYS}
    strips = {"with the shadow": test.picture[:count], **{name: np.asarray(test.decode(x)) for name, x in made.items()}}
    strips |= {"seen by the decoder": restored[:count], "truth": test.truth[:count]}
    pictures.save_strips(s.picture("pictures"), strips, title="Shadows removed from held-out pictures")
    walk = np.arange(s.config.walk)
    curves = {name: (walk + 1, np.mean([made[f"step {i}"] for i in walk], axis=1)) for name, made in steps.items()}
    title, label = "What is predicted at each step of a run", "PSNR of x0 in latents, dB"
    pictures.save_curves(s.picture("steps"), curves, x_label="step", y_label=label, title=title, log=False)
    return {
        s.picture("pictures"): f"Held-out pictures; the branch of each process at {few} steps with the plain decoder, "
        "and the self-enhanced one with the decoder that sees the picture. Lit pixels should stay as they are.",
        s.picture("steps"): "The answer at each step, with states that the model made itself in training and without.",
    }
