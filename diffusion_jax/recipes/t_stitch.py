"""T-Stitch: a small model runs the first, noisiest steps of the trajectory, the large one the rest.

Nothing is trained for it and nothing is cut: all good models of one data set agree where noise leaves only coarse
statistics, and detail is decided late. The knob is the share r of steps that the small model has (Pan et al. 2024),

    which(i) = small if i < r S else large,        cost(r) = r c_small + (1 - r) c_large                           (1)

Measured on a ring of Gaussians, whose denoisers are exact, and on digits with two transformers and one between them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax import metrics, pictures
from diffusion_jax.recipes.frame import seeds
from diffusion_jax.recipes.parts.stitched_digits import Digits, stitch_digits
from diffusion_jax.recipes.parts.stitched_ring import on_ring, ring_claims
from diffusion_jax.recipes.parts.stitching import gap_times
from diffusion_jax.recipes.report import Claim, Results, claim


def run(config: Any, workdir: Path) -> Results:
    numbers = list(seeds(config))
    ring = on_ring(config.ring, numbers) if config.ring else None
    digits = stitch_digits(config, numbers)
    files = [workdir / f"{name}.png" for name in ("quality", "gap", "samples")]
    label, shares = "share of steps of the small model", config.shares
    stitched_at = {share: np.mean(digits.distance["stitched", share]) for share in shares}
    fewer_at = {share: np.mean(digits.distance["fewer", share]) for share in config.fewer}
    curves = {
        "small model first": (shares, list(stitched_at.values())),
        "large alone, fewer steps, same cost": ([0.0, *fewer_at], [stitched_at[0.0], *fewer_at.values()]),
    }
    pictures.save_curves(files[0], curves, x_label=label, y_label="Fréchet distance, digits")
    gaps = {"digits": (gap_times(), digits.gap)}
    if ring:
        files.insert(1, workdir / "ring.png")
        curves = {
            f"small model {name}": (list(found), [np.mean(found[share]) for share in found])
            for name, found in (("first", ring.first), ("last", ring.last))
        }
        pictures.save_curves(files[1], curves, x_label=label, y_label="energy distance, ring")
        gaps = {"ring": (gap_times(), ring.gap), **gaps}
    pictures.save_curves(files[-2], gaps, x_label="t", y_label="squared gap in epsilon")
    rows = {f"r = {share:g}": digits.images["stitched", share] for share in shares}
    pictures.save_strips(files[-1], {**rows, "0.4 last": digits.images["reversed"]}, zoom=4)
    claims = [*(ring_claims(ring, config.ring.noise) if ring else ()), *digit_claims(digits, config)]
    return Results(claims, files, notes(digits, config))


def digit_claims(digits: Digits, config: Any) -> list[Claim]:
    distance, cost, noise, steps = digits.distance, digits.cost, digits.noise, config.steps
    alone, at_40, at_60 = (distance["stitched", share] for share in (0.0, 0.4, 0.6))
    at_end = distance["stitched", 1.0]
    mark = round(0.4 * steps)
    none, whole = digits.seconds[0.0], digits.seconds[1.0]
    straight = {share: none + share * (whole - none) for share in digits.seconds}
    bend = max(abs(taken - straight[share]) / none for share, taken in digits.seconds.items())
    measured = f"Fréchet distance to held-out digits, {config.size} samples a seed, DDIM {steps}"
    return [
        claim(
            "Digits: the first 40 % by the small model, within sampling noise",
            f"{measured}; the baseline is the large model, the margin its spread over other seeds",
            alone,
            at_40,
            "lower",
            "40 % of the early steps without loss",
            margin=noise,
            reason="a small network trained for a minute is worse at high noise too, and layouts are not undone later",
        ),
        claim(
            "Digits: the first 40 % by the small model, read as their label",
            "accuracy of the judge, at most 2 points lower; the baseline is the large model",
            digits.accuracy["stitched", 0.0],
            digits.accuracy["stitched", 0.4],
            "higher",
            "prompt alignment is kept",
            margin=-0.02,
            reason="a small network trained for a minute follows labels less well at high noise",
        ),
        claim(
            "Digits: the curve is convex",
            "rise of the Fréchet distance from r = 0.6 to 1; the baseline is that from 0 to 0.4",
            np.subtract(at_40, alone).tolist(),
            np.subtract(at_end, at_60).tolist(),
            "higher",
            "flat until 40 %",
        ),
        *(
            claim(
                f"Digits: at least as good as fewer steps of the large model at equal cost, r = {share:g}",
                f"{measured}; the baseline makes {round(cost['fewer', share] * steps)} steps",
                distance["fewer", share],
                distance["stitched", share],
                "lower",
                "complementary to fewer steps",
                margin=noise,
                reason="so few pixels need few steps: the large model loses nothing with the steps that it is left",
            )
            for share in (0.4, 0.8)
        ),
        claim(
            f"Digits: the same at DDIM {config.few_steps}, r = 0.4",
            "Fréchet distance; the baseline is the large model with fewer steps at equal cost",
            distance["few", "fewer"],
            distance["few", 0.4],
            "lower",
            "not given",
            margin=noise,
            reason="so few pixels need few steps: the large model loses nothing with the steps that it is left",
        ),
        claim(
            "Digits: the last 40 % by the small model are worse than the first",
            measured,
            at_40,
            distance["reversed"],
            "higher",
            "small models go first",
        ),
        *three_claims(digits, config, measured),
        claim(
            "Digits: both models' trajectories agree at the 40 % mark",
            "cosine similarity of x_t from the same noise",
            0.95,
            [float(alike[mark]) for alike in digits.similarity],
            "higher",
            "high along the trajectories of DiT-S, B and XL",
        ),
        claim(
            "Digits: and part later",
            "cosine similarity at the end; the baseline is that at the 40 % mark",
            [float(alike[mark]) for alike in digits.similarity],
            [float(alike[-1]) for alike in digits.similarity],
            "lower",
            "the similarity falls towards the data",
        ),
        claim(
            "Time falls linearly in r",
            "largest distance of the median seconds from the straight line between r = 0 and 1, in runs at r = 0",
            0.0,
            bend,
            "equal",
            "equation (1)",
            margin=0.05,
            reason="other programs ran on this machine while it was measured",
        ),
        claim(
            "Time: what the skipped FLOPs promise, r = 0.4",
            "speed-up over the large model, medians; the baseline is counted from FLOPs, of which 85 % are asked",
            1 / cost["stitched", 0.4],
            none / digits.seconds[0.4],
            "higher",
            "16.5 s for DiT-XL, 1.6 s for DiT-S",
            factor=0.85,
            reason="so small a network spends more on what is not a matrix product",
        ),
    ]


def three_claims(digits: Digits, config: Any, measured: str) -> list[Claim]:
    """None where three models were not stitched."""
    if not config.three:
        return []
    distance, cost = digits.distance, digits.cost
    return [
        claim(
            "Digits: three models within sampling noise, at less than half of the cost",
            f"{measured}; {config.three[0]:.0%} small, {config.three[1]:.0%} middle, cost {cost['three']:.2f}",
            distance["stitched", 0.0],
            distance["three"],
            "lower",
            "DiT-S, B and XL in one trajectory",
            margin=digits.noise,
            reason="the small and the middle network are worse where they run: each was trained for a minute or two",
        ),
    ]


def notes(digits: Digits, config: Any) -> str:
    errors = {
        arm: metrics.endpoint_error(digits.images[arm, 0.4], digits.images["stitched", 0.0])
        for arm in ("stitched", "fewer")
    }
    return (
        f"the small model costs {digits.cost['stitched', 1.0]:.3f} of the large one; one training of each model, "
        "three seeds of sampling. "
        f"Fewer steps stay nearer to the large model's own samples (root mean square distance {errors['fewer']:.3f} "
        f"against {errors['stitched']:.3f} at r = 0.4): stitching makes other samples, which are to be as good."
    )
