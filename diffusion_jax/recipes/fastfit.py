"""FastFit (Chong et al. 2025): pictures of garments are encoded once, and a person is painted who wears them.

References know an embedding of their category in the place of the time, and nobody but themselves, so their keys and
values are a cache without loss. Measured against a twin of the same size and training whose references know the time
and attend to everything, encoded in every step; and against that twin with the references of its first step kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import denoisers, metrics, models, pictures
from diffusion_jax.clock import network_inputs
from diffusion_jax.config import build
from diffusion_jax.data import wardrobe
from diffusion_jax.data.wardrobe import CATEGORIES
from diffusion_jax.models import Referenced, cache_references
from diffusion_jax.randomness import prior_key, sample_keys
from diffusion_jax.recipes.study import Arm, Drawn, Results, Study, Tabulated, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.sampling import Samples, sample
from diffusion_jax.typing import Denoiser, Network

LEAST, CHANCE = 0.85, 0.3
"""Share of items that are right with references, at least, and without them, at most."""
VARIED = "persons, outfits and noise, and the rounds of timing (medians of three); each network is trained once"


def measures_of(task: Callable[[Drawn], wardrobe.Task]) -> dict[str, Callable[[Drawn], Any]]:
    """What is measured of pictures that should be the answer of their task."""

    def outside(drawn):
        return (drawn.x - task(drawn).before) * (task(drawn).cond["concat"][..., :1] < 0.5)

    def item(drawn, which: int | None = None):
        right = wardrobe.correct(wardrobe.read(drawn.x, task(drawn).parsing), task(drawn).outfits)["item"]
        return np.nanmean(right if which is None else right[:, which])

    def psnr(drawn):
        x, truth, mask = map(jnp.asarray, (drawn.x, task(drawn).truth, task(drawn).cond["concat"][..., :1]))
        return metrics.psnr(x, truth, mask=mask).mean()

    return {
        "item": item,
        **{name: partial(item, which=number) for number, name in enumerate(CATEGORIES)},
        "psnr": psnr,
        "ssim": lambda drawn: metrics.ssim(*map(jnp.asarray, (drawn.x, task(drawn).truth))).mean(),
        "difference": lambda drawn: np.abs(drawn.x - drawn.reference).max(),
        "outside": lambda drawn: np.abs(outside(drawn)).max(),
    }


def paint(
    key: Any, denoiser: Denoiser, params: Any, solver: Any, grid: Any, *, cond: Any, told: Any = None, **start: Any
) -> Samples:
    """A run, and what is outside of the mask put back. told: what the network is told in the place of its task."""
    result = sample(key, denoiser, params, solver, grid, cond=cond if told is None else told, **start)
    mask, known = cond["concat"][..., :1], cond["concat"][..., 1:]
    return result._replace(x=jnp.where(mask > 0.5, result.x, known))


def paint_cached(
    key: Any, denoiser: Denoiser, params: Any, solver: Any, grid: Any, *, cond: Any, forms: Referenced, **start: Any
) -> Any:
    """A run with the references encoded before it."""
    told = cache_references(forms, params, cond)
    return paint(key, denoiser, params, solver, grid, cond=cond, told=told, **start)


def paint_first(
    key: Any, denoiser: Denoiser, params: Any, solver: Any, grid: Any, *, cond: Any, shape: Any, twin: Network
) -> Any:
    """A run with the references as the twin sees them in its first step."""
    x = denoiser.process.prior(prior_key(sample_keys(key, jnp.arange(shape[0]))), shape)
    inputs = network_inputs(denoiser.process, x, jnp.full(shape[:1], grid[0]))
    told = {"concat": cond["concat"], "cache": twin.apply(params, *inputs, cond)[1]["cache"]}
    return paint(key, denoiser, params, solver, grid, cond=cond, told=told, x_init=x)


def bound(network: Network) -> Network:
    """The network whose references are bound to x: otherwise XLA takes their encoding out of the loop over steps."""

    def apply(params, x, t, cond, train=False, key=None):
        x, references = jax.lax.optimization_barrier((x, cond["references"]))
        return network.apply(params, x, t, {**cond, "references": references}, train=train, key=key)

    return network._replace(apply=apply)


def study(s: Study) -> Results:
    config = s.config
    base = {name: s.stage(name, config[name]) for name in ("fastfit", "coupled") if name in config}
    source, process = base["fastfit"].trained.held_out, base["fastfit"].trained.process
    forms = models.referenced(build(config.fastfit.model.network), len(CATEGORIES), concat=True)
    solver, grids = build(config.solver), {name: build(grid) for name, grid in config.grids.items()}
    networks = {"cached": forms.cached, "encoding": bound(forms.encoding), "coupled": forms.coupled}
    denoiser = {name: denoisers.denoiser(network, process) for name, network in networks.items()}
    once, first = partial(paint_cached, forms=forms), partial(paint_first, twin=forms.coupled)
    ways = {
        "ours": ("fastfit", "cached", "full", once),
        "in every step": ("fastfit", "encoding", "full", paint),
        "ours, fewer steps": ("fastfit", "cached", "fewer", once),
        "twin": ("coupled", "coupled", "full", paint),
        "twin, fewer steps": ("coupled", "coupled", "fewer", paint),
        "twin, first step kept": ("coupled", "cached", "full", first),
    }
    ways = {name: way for name, way in ways.items() if "coupled" in base or name in ("ours", "in every step")}
    todo: dict[int, dict[str, wardrobe.Task]] = {}

    def arm(way, cond):
        weights, form, grid, sampled = ways[way]
        return Arm(denoiser[form], base[weights].value, solver, grids[grid], cond, sampled=sampled)

    def arms(seed):
        tasks = todo[seed] = source.tasks(np.arange(seed * config.people, (seed + 1) * config.people) % len(source))
        blind = denoisers.null_condition(tasks["paired"].cond, {"references": 0.0})
        others = {"nothing": arm("ours", blind), "unpaired": arm("ours", tasks["unpaired"].cond)}
        return {name: arm(name, tasks["paired"].cond) for name in ways} | others

    def task(drawn):
        return todo[drawn.seed]["unpaired" if drawn.arm == "unpaired" else "paired"]

    found = table(arms, s.seeds, measures_of(task), shape=source.shape, count=config.people, reference="ours")
    people = source.take(range(config.timed.people))["cond"]
    runs = {}
    for way in ("ours", "in every step", "twin"):
        for count in config.timed.references if way in ways else ():
            made = arm(way, wardrobe.repeated_references(people, count))
            shape = (config.timed.people, *source.shape)
            run = jax.jit(partial(made.sampled, jax.random.key(0), made.denoiser, solver=solver, shape=shape))
            runs[way, count] = partial(run, params=made.params, grid=jnp.asarray(made.grid), cond=made.cond)
    rounds = metrics.interleaved(runs, 3 * len(s.seeds))
    times = {run: np.median(np.reshape(seconds, (-1, 3)), axis=1).tolist() for run, seconds in rounds.items()}
    return Results(try_on_rows(s, found, times), try_on_pictures(s, todo[s.seeds[0]], found, times), VARIED)


def try_on_rows(s: Study, found: Tabulated, times: dict[tuple[str, int], list[float]]) -> list[Row]:
    """What the paper says and what its card expects of a small network. Times are compared round by round."""
    few, usual, many = s.config.timed.references
    ours, item = found["ours"], "share of items with the right colour and texture"
    rows = [
        Row("no loss", "largest difference of a pixel from references encoded in every step",
            found["in every step"]["difference"], 0.0, "equal", "lossless", margin=1e-6),
        Row("what is not hidden stays", "largest change outside the mask", found["unpaired"]["outside"], 0.0, "equal"),
        Row("clothes of another person", item, found["unpaired"]["item"], LEAST, "higher", "qualitative"),
        *(Row(f"the right cloth: {name}", item, ours[name], LEAST, "higher") for name in CATEGORIES),
        Row("without references", item, found["nothing"]["item"], CHANCE, "lower"),
        Row("references tell", "SSIM of whole pictures", ours["ssim"], found["nothing"]["ssim"], "higher",
            "0.907 on DressCode"),
    ]  # fmt: skip
    if "twin" in found.figures:
        twin, kept = found["twin"], found["twin, first step kept"]
        bound, called = found["twin, fewer steps"], f"{np.mean(found['twin, fewer steps']['evaluations']):g} steps"
        rows += [
            Row("as right as the twin", f"{item}, up to 2 points", ours["item"], twin["item"], "higher",
                "better FID and LPIPS", margin=-0.02),
            Row("as exact as the twin", "PSNR under the mask, up to 0.5 dB", ours["psnr"], twin["psnr"], "higher",
                "better FID and LPIPS", margin=-0.5),
            Row("the twin cannot be cached", f"{item}, references of its first step", kept["item"], twin["item"],
                "lower", "features depend on t", margin=-0.1),
            Row("half the time of the twin", f"seconds of a run, {usual} references", times["ours", usual],
                times["twin", usual], "lower", "3.5 times as fast", factor=0.5),
            Row("beats the twin at fewer steps", f"PSNR, the twin at {called}, which take as long", ours["psnr"],
                bound["psnr"], "higher"),
            Row("fewer steps are as fast for both", f"seconds of {called}", found["ours, fewer steps"]["seconds"],
                bound["seconds"], "lower", "3.5 times as fast", factor=0.5),
            Row("more references slow down the twin", f"seconds, {many} references against {few}",
                times["twin", many], times["twin", few], "higher", factor=2.0),
        ]  # fmt: skip
    return [
        *rows,
        Row("half the time of encoding in every step", f"seconds of a run, {usual} references", times["ours", usual],
            times["in every step", usual], "lower", "3.5 times as fast", factor=0.5),
        Row("more references cost little", f"seconds, {many} references against {few}", times["ours", many],
            times["ours", few], "lower", factor=1.5),
    ]  # fmt: skip


def try_on_pictures(
    s: Study, tasks: dict[str, wardrobe.Task], found: Tabulated, times: dict[tuple[str, int], list[float]]
) -> dict[Any, str]:
    """Persons, what they are given and what comes out, for both tasks of the first seed; time against references."""
    shown, titles = (
        slice(s.config.shown),
        {"unpaired": ("unpaired",), "paired": ("ours", "twin", "twin, first step kept")},
    )
    for which, arms in titles.items():
        task, cond = tasks[which], {name: leaf[shown] for name, leaf in tasks[which].cond.items()}
        items = np.where(cond["present"][..., None, None, None], cond["references"], 1.0)
        strips = {
            "person": task.before[shown],
            "hidden, with pose": cond["concat"][..., 1:],
            "items": np.moveaxis(items, 1, 0),
        }
        strips |= {name: found.samples[name][shown] for name in arms if name in found.samples}
        strips["as it should be"] = task.truth[shown]
        pictures.save_strips(s.picture(which), strips, title=f"Try-on, {which}")
    counts = sorted(set(s.config.timed.references))
    curves = {way: (counts, [np.mean(times[way, count]) for count in counts]) for way, _ in times}
    labels: dict[str, Any] = {"x_label": "number of references", "y_label": "seconds of a run"}
    pictures.save_curves(s.picture("time"), curves, **labels, title="Time of a run by its references", log=False)
    return {
        s.picture("unpaired"): "Held-out persons in the clothes of the next one, and what the picture should be.",
        s.picture("paired"): "Persons in their own clothes by FastFit, its twin, and the twin with references kept.",
        s.picture("time"): "Seconds of a run by the number of references: flat for FastFit, steep for its twin.",
    }
