"""Quality against wall-clock time, for every way of doing less on one trained model: `docs/images/frontier.png`.

The transformer on digits that the recipes share draws the same samples from the same noise with the plain solver at
fewer and fewer steps, with every preset and method at several settings, and with some of them combined. Two measures:
how far a sample ends from where the plain run of all steps ends (relative L2), and the Fréchet distance of the samples
to held-out digits. Times are medians of runs that take turns; each round draws with a seed of its own.

    python -m benchmarks.run frontier
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import interleave, ratio, summarise
from benchmarks.report import Row
from diffusion_jax import metrics, models, pictures, solvers, timesteps
from diffusion_jax.acceleration import (
    cached_features,
    cached_outputs,
    calibrate,
    cg_taylor,
    ertacache,
    every,
    exit_by_uncertainty,
    first_block_cached,
    guided_with_reuse,
    record_outputs,
    static_widths,
    tabulated,
    taylor,
)
from diffusion_jax.baselines import NULL, digit_transformer
from diffusion_jax.config import build, load
from diffusion_jax.denoisers import by_share, denoiser, guided, switched
from diffusion_jax.recipes import deediff, dydit
from diffusion_jax.recipes.parts.digits import judged
from diffusion_jax.recipes.parts.stitched_digits import digit_models
from diffusion_jax.sampling import sample
from diffusion_jax.stages import Stage, stage
from diffusion_jax.typing import Denoiser

PICTURE = Path("docs/images/frontier.png")
GUIDED = "guided, "


class Arm(NamedTuple):
    """One point of the picture. family: its curve. label: its setting. grid: the one that it runs on."""

    family: str
    label: str
    denoiser: Denoiser
    params: Any
    grid: Any


class Plan(NamedTuple):
    """Sizes of the comparison. steps: of the full run. samples: of each round."""

    steps: int = 50
    samples: int = 250
    smoke: bool = False


def frontier(rounds: int, smoke: bool, compiled_peers: bool) -> list[Row]:
    """Every arm against the plain run of all steps, and the picture of all of them."""
    plan = Plan(8, 10, True) if smoke else Plan()
    found = arms(plan)
    labels = jnp.arange(plan.samples) % 10
    drawn: dict[int, list] = {index: [] for index in range(len(found))}
    calls, costs = {}, {}
    for index, arm in enumerate(found):
        run = jax.jit(
            lambda key, params, arm=arm: sample(
                key,
                arm.denoiser,
                params,
                solvers.ddim(),
                arm.grid,
                shape=(plan.samples, 8, 8, 1),
                cond={"label": labels},
            )
        )

        def call(run=run, arm=arm, index=index):
            # The same noise for all arms of a round.
            out = jax.block_until_ready(run(jax.random.key(len(drawn[index])), arm.params))
            drawn[index].append(np.asarray(out.x))
            costs[index] = float(out.cost.compute)

        calls[index] = call
    # Turns long enough not to be repeated: each call is a round with a seed of its own.
    times = interleave(calls, rounds, turn=0.0, settled=0.0)
    rows, points = [], []
    for index, arm in enumerate(found):
        base = _base(found, arm)
        reference, samples = drawn[base], drawn[index]
        error = np.mean([metrics.endpoint_error(a, b, relative=True) for a, b in zip(samples, reference, strict=True)])
        scores = [judged(x, labels) for x in samples]
        distance = float(np.mean([score.distance for score in scores]))
        spread = float(np.std([score.distance for score in scores]))
        faster = ratio(times[base], times[index])
        points.append((faster.value, float(error), distance))
        rows.append(
            Row(
                case=f"{arm.family}, {arm.label}",
                ours=summarise(times[index]),
                peer=f"{GUIDED if arm.family.startswith(GUIDED) else ''}plain, {plan.steps} steps",
                theirs=summarise(times[base]),
                ratio=faster,
                note=f"operations predict {costs[base] / costs[index]:.2f}x; endpoint error {error:.3f}; "
                f"Fréchet {distance:.2f} ± {spread:.2f}; accuracy {np.mean([s.accuracy for s in scores]):.3f}",
            )
        )
        print(f"  {rows[-1].case}: {faster.value:.2f}x, {rows[-1].note}", flush=True)
    if not smoke:
        draw([arm.family for arm in found], points, PICTURE)
    return rows


def arms(plan: Plan) -> list[Arm]:
    """All that is compared; the first is the plain run of all steps."""
    config = digit_transformer(steps=4, width=24, depth=2, heads=2) if plan.smoke else digit_transformer()
    keep = not plan.smoke
    base = stage("digits", config, keep=keep)
    experiment = base.trained
    network, process, params = experiment.network, experiment.process, base.value
    plain, grid = denoiser(network, process), timesteps.linspace(plan.steps)
    small, *_ = digit_models(load(f"configs/recipes/t_stitch.py{':smoke' if plan.smoke else ''}").models)
    found: list[Arm] = []

    def add(family: str, settings: dict[str, Denoiser], params: Any = params, grid: Any = grid) -> None:
        found.extend(Arm(family, label, made, params, grid) for label, made in settings.items())

    def taylor_cached(order: int, interval: int) -> Denoiser:
        return cached_features(network, process, taylor(order), every(interval, 2))

    def stitched(share: float, last: Denoiser) -> Denoiser:
        return switched([small.denoiser, last], by_share(share, 1 - share), compute=(small.cost, 1.0))

    for steps in (plan.steps, *(plan.steps * k // 50 for k in (35, 25, 17, 12, 8))):
        add("plain solver", {f"{steps} steps": plain}, grid=timesteps.linspace(steps))
    for order, intervals in ((0, (2, 3, 5)), (1, (3, 5, 8)), (3, (3, 5))):
        family = f"TaylorSeer, m = {order}" if order else "feature reuse"
        add(family, {f"N = {interval}": taylor_cached(order, interval) for interval in intervals})
    for order in (0, 1):
        family = "output forecast, m = 1" if order else "output reuse"
        add(family, {f"N = {n}": cached_outputs(plain, every(n, 2), taylor(order)) for n in (2, 3, 5)})
    add("CG-Taylor", {f"threshold {d:g}": cg_taylor(network, process, d) for d in (0.01, 0.03, 0.1)})
    add("first-block cache", {f"threshold {d:g}": first_block_cached(network, process, d) for d in (0.05, 0.15, 0.3)})
    for threshold, (made, moved) in calibrated(plain, params, grid, plan).items():
        add("ERTACache", {f"threshold {threshold:g}": made}, grid=moved)
    both = (small.params, params)
    add("T-Stitch", {f"r = {share:g}": stitched(share, plain) for share in (0.3, 0.5, 0.7)}, both)
    add("T-Stitch + TaylorSeer", {"r = 0.4, N = 3, m = 1": stitched(0.4, taylor_cached(1, 3))}, both)

    variant = ":smoke" if plan.smoke else ""
    tuned = load(f"configs/recipes/deediff.py{variant}").tuned
    exits = models.early_exit(network)
    left = stage("tuned", tuned, base, prepare=deediff.with_exits, keep=keep).value
    add("early exit", {f"threshold {d:g}": exit_by_uncertainty(exits, process, d) for d in (0.03, 0.06, 0.1)}, left)
    config = load(f"configs/recipes/dydit.py{variant}")
    learned = stage("dynamic", config.dynamic, base, prepare=dydit.with_widths, keep=keep).value
    narrow, cut = narrowed(config, base, learned, grid)
    add("DyDiT", {"half of the compute": narrow}, cut)
    add("DyDiT + output forecast", {"N = 2, m = 1": cached_outputs(narrow, every(2, 2), taylor(1))}, cut)

    def led(inner: Denoiser) -> Denoiser:
        return guided(inner, 1.5, null=NULL)

    def reused_guide(inner: Denoiser) -> Denoiser:
        return guided_with_reuse(inner, 1.5, NULL, refresh=every(2, 2))

    add(f"{GUIDED}plain solver", {f"{plan.steps} steps": led(plain)})
    add(f"{GUIDED}plain solver", {f"{plan.steps // 3} steps": led(plain)}, grid=timesteps.linspace(plan.steps // 3))
    add(f"{GUIDED}TaylorSeer, m = 1", {"N = 3": led(taylor_cached(1, 3))})
    add(f"{GUIDED}guide reuse", {"N = 2": reused_guide(plain)})
    add(f"{GUIDED}CG-Taylor", {"threshold 0.03": led(cg_taylor(network, process, 0.03))})
    add(f"{GUIDED}T-Stitch + TaylorSeer", {"r = 0.4, N = 3, m = 1": led(stitched(0.4, taylor_cached(1, 3)))}, both)
    return found


def calibrated(plain: Denoiser, params: Any, grid: Any, plan: Plan) -> dict[float, tuple[Denoiser, Any]]:
    """ERTACache at several thresholds, from one recording with a seed that no round uses."""
    labels = {"label": jnp.arange(min(64, plan.samples)) % 10}
    shape = (len(labels["label"]), 8, 8, 1)
    runs = record_outputs(jax.random.key(1000), plain, params, solvers.ddim(), grid, shape=shape, cond=labels)
    process = plain.process
    return {
        threshold: ertacache(plain, calibrate(runs, grid, process, threshold), grid) for threshold in (0.03, 0.08, 0.2)
    }


def narrowed(config: Any, base: Stage, tree: Any, grid: Any) -> tuple[Denoiser, Any]:
    """The transformer whose widths depend on the timestep, as `dydit` trains it, with cut weights; its parameters."""
    network, process = base.trained.network, base.trained.process
    routed = build(config.dynamic.routed, network=network)
    gates = tabulated(routed.fill, tree, process, grid[:-1])
    cut = static_widths(network, process, grid[:-1], gates, dydit.costs_of(base, routed, tree), config.buckets)
    return cut.denoiser, cut.prepare({"params": tree["params"]})


def draw(families: Sequence[str], points: Sequence[tuple[float, float, float]], path: Path) -> None:
    """One panel a measure and kind of run, one curve a family; points: (times faster, endpoint error, distance)."""
    titles = [f"{kind}{measure}" for kind in ("", GUIDED) for measure in ("endpoint error", "Fréchet distance")]
    panels: dict[str, dict] = {title: {} for title in titles}
    for family, (faster, *values) in zip(families, points, strict=True):
        kind = GUIDED if family.startswith(GUIDED) else ""
        for measure, value in zip(("endpoint error", "Fréchet distance"), values, strict=True):
            # The plain run of all steps has no error, and no place on a logarithmic axis.
            if value:
                xs, ys = panels[f"{kind}{measure}"].setdefault(family.removeprefix(GUIDED), ([], []))
                xs.append(faster)
                ys.append(value)
    pictures.save_panels(path, panels, x_label="times faster than the plain run")


def _base(found, arm):
    """The plain run of all steps that an arm is compared with."""
    family = f"{GUIDED}plain solver" if arm.family.startswith(GUIDED) else "plain solver"
    return next(index for index, other in enumerate(found) if other.family == family)
