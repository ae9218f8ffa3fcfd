"""Residual shadow removal: the state of a run is between the picture with its shadow and the one without, plus noise.

A U-Net is trained on latents of pictures without shadows and frozen; a control branch learns to remove shadows beside
it, of a process from noise alone, of the residual process, and of that with states that the model made itself. Branches
have the same network and as many updates. Occluders and pictures of the test are of other kinds than those of training.
"""

from collections.abc import Callable
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
VARIED = "branch, decoder and noise; autoencoder and prior are trained once"


def of_both(config: ConfigDict) -> Experiment:
    """The autoencoder sees pictures with shadows and without."""
    source = build(config.data)
    return prepare(config, source=data.ArraySource(np.concatenate([source.x0, source.cond["picture"]])))


def latents_of(config: ConfigDict, image: Stage) -> dict[str, Any]:
    """Pairs of each split in latents, and what shifts and scales them to mean 0 and variance 1 over all of training."""
    encode = image.trained.network.encode
    one = jax.jit(lambda x: encode(image.value, x))
    sources = {split: build(config[split]) for split in ("train", "test")}
    found = {
        split: {name: data.encoded(data.ArraySource(x), one).x0
                for name, x in (("clear", source.x0), ("shadow", source.cond["picture"]))}
        for split, source in sources.items()
    }  # fmt: skip
    known = np.concatenate(list(found["train"].values()))
    shift, factor = known.mean(), 1 / known.std()
    found = {split: {name: (z - shift) * factor for name, z in pair.items()} for split, pair in found.items()}
    return found | {"scale": {"shift": np.float32(shift), "factor": np.float32(factor)}}


def scaled(image: Stage, latents: Stage) -> models.Autoencoder:
    """The autoencoder with latents of that scale."""
    shift, factor = (float(latents.value["scale"][name]) for name in ("shift", "factor"))
    model = {**image.trained.config.model.to_dict(), "shift_factor": shift, "scaling_factor": factor}
    return build(ConfigDict(model))


def without_shadows(config: ConfigDict, latents: Stage) -> Experiment:
    """The prior: ordinary diffusion of latents without shadows."""
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
        denoiser = denoisers.denoiser(network, process)
        objective = build(config.enhanced, objective=objective, denoiser=denoiser, whole=with_prior)

    def begin(key):
        made = branch.init(key, clear[:1], jnp.zeros(1), {"control": shadow[:1]})
        return models.control_from_unet(prior.value, made)

    return prepare(config, source=source, network=network, objective=objective, begin=begin)


def with_prior(learned: Any, state: Any) -> dict[str, Any]:
    return {**state.frozen.value, "control": learned}


def seeing(config: ConfigDict, image: Stage, latents: Stage) -> Experiment:
    """What the decoder sees of the picture with the shadow."""
    autoencoder = scaled(image, latents)
    decoder = models.detailed(autoencoder, config.width)
    objective = objectives.detail_loss(decoder, autoencoder, image.value)
    return prepare(config, network=decoder, objective=objective, begin=decoder.init)


class Test:
    """Held-out pairs, their latents, and what of a picture is measured in which region."""

    def __init__(self, s: Study, image: Stage, latents: Stage):
        source, self.vae, self.params = build(s.config.latents.test), scaled(image, latents), image.value
        self.truth, self.picture = source.x0, source.cond["picture"]
        self.masks = {"whole": np.ones_like(source.visibility), **source.regions(np.arange(len(source)))}
        self.clear, self.shadow = (np.asarray(latents.value["test"][name]) for name in ("clear", "shadow"))
        self.runs: dict[tuple[int, str], np.ndarray] = {}
        self.decode = jax.jit(lambda latents: jnp.clip(self.vae.decode(self.params, latents), -1, 1))

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
    image = s.stage("autoencoder", config.image, prepare=of_both)
    latents = s.stage("latents", config.latents, image, make=latents_of)
    prior = s.stage("prior", config.prior, latents, prepare=without_shadows)
    test = Test(s, image, latents)
    processes = {name: build(config[name].process) for name in WAYS}
    network = models.controlled(prior.trained.network, build(config.noise.branch))
    denoiser = {name: denoisers.denoiser(network, processes[name]) for name in ("noise", "residual")}
    denoiser["enhanced"] = denoiser["residual"]
    twice, solver = np.concatenate([test.shadow, test.shadow]), solvers.ddim()
    # One program for all numbers of steps: the last ones stand still.
    grids = {steps: timesteps.padded(timesteps.linspace(steps), max(config.steps)) for steps in config.steps}

    def tree(name, seed):
        learned = s.stage(name, config[name], latents, prior, seed=seed, prepare=beside).value
        return {"unet": prior.value, "control": learned}

    def arms(seed):
        return {
            f"{name}, {steps}": Arm(denoiser[name], tree(name, seed), solver, grids[steps],
                                    condition_of(processes[name], twice))
            for name in WAYS for steps in config.steps
        }  # fmt: skip

    found = table(arms, s.seeds, test.measures, shape=prior.trained.shape, count=len(twice))
    walk = walked(test, denoiser["enhanced"], config.walk)
    steps = {name: by_seed(s.seeds, lambda seed, name=name: walk(tree(name, seed), seed)) for name in WAYS[1:]}
    restored, seen = decoded(s, image, latents, test)
    rows = removal_rows(found, config.steps, steps) + seen
    return Results(rows, drawn(s, test, found, restored, steps), VARIED)


def walked(test: Test, denoiser: Any, steps: int) -> Callable[[Any, int], dict[str, float]]:
    """By `(params, seed)`: PSNR of the predicted x0 at each step of a run, in latents, the largest fall from one to the
    next, and what a run's own states cost at the last step."""
    run = jax.jit(partial(metrics.exposure_errors, denoiser=denoiser, x0=test.clear, grid=timesteps.linspace(steps)))

    def measure(params, seed):
        cond = condition_of(denoiser.process, test.shadow)
        free, forced = jax.device_get(run(jax.random.key(seed), params=params, cond=cond))
        curve = -10 * np.log10(free).mean(1)
        falls = {"fall": max(0.0, float(-np.diff(curve).min(initial=0.0))), "gap": float((free - forced)[-1].mean())}
        return falls | {f"step {step}": value for step, value in enumerate(curve)}

    return measure


def decoded(s: Study, image: Stage, latents: Stage, test: Test) -> tuple[np.ndarray, list[Row]]:
    """Pictures restored by the decoder that sees the picture with the shadow, and rows on it."""
    decoder, last = models.detailed(test.vae, s.config.details.width), f"enhanced, {s.config.final}"
    decode = jax.jit(lambda learned, z: jnp.clip(decoder.decode(learned, image.value, z, test.picture), -1, 1))
    plain, shadow, kept = np.asarray(test.decode(test.clear)), test.masks["shadow"], []

    def figures(seed):
        learned = s.stage("details", s.config.details, image, latents, seed=seed, prepare=seeing).value
        seen = np.asarray(decode(learned, test.clear))
        restored = decode(learned, test.runs[seed, last][: len(test.truth)])
        kept.append(np.asarray(restored))
        return {
            "lit": test.psnr(seen)["lit"],
            "left": light_error(seen, test.truth, shadow),
            **{f"restored, {name}": value for name, value in test.psnr(restored).items()},
        }

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
    lit, psnr = "lit pixels", "PSNR, dB"
    ahead = {n: np.subtract(found[f"residual, {n}"]["lit"], found[f"noise, {n}"]["lit"]).tolist() for n in steps}
    return [
        found.row(f"Residual, not noise: {few} steps", "whole", f"residual, {few}", f"noise, {few}", "higher",
                  "content is kept", figure=f"{psnr}, whole picture"),
        found.row(f"Lit pixels stay: {few} steps", "lit", f"residual, {few}", f"noise, {few}", "higher",
                  "content is kept", figure=f"{psnr}, {lit}", margin=1.5),
        found.row(f"Lit pixels stay: {some} steps", "lit", f"residual, {some}", f"noise, {some}", "higher",
                  "content is kept", figure=f"{psnr}, {lit}"),
        Row("Most at few steps", f"dB ahead in {lit}; {few}, {many} steps", ahead[few], ahead[many], "higher",
            "not reported"),
        found.row(f"Half the variance between noises, {few} steps", "spread", f"residual, {few}", f"noise, {few}",
                  "lower", "not reported", figure=f"variance, {lit}", factor=0.5),
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
