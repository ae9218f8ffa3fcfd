"""What `evaluate` measures: a judge of a whole set of samples, by kind of data.

A `SetMetric` is `(samples, real, held_out) -> {name: number}`. `samples` holds arrays `x` and `cond.NAME` as they were
drawn; `real` is the source that was trained on and `held_out` the one that was not. Distances of samples are taken to
the held-out data, and so is the distance of the training data: what a perfect memory would score.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_jax.data import moving, scenes
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.metrics.arrays import signed_images
from diffusion_jax.metrics.distances import sliced_wasserstein
from diffusion_jax.metrics.frechet import frechet_distance
from diffusion_jax.metrics.judges import Judge, judged
from diffusion_jax.metrics.kernel import kernel_distance, mmd2
from diffusion_jax.metrics.manifold import manifold
from diffusion_jax.typing import Numbers

SetMetric = Callable[[Mapping[str, np.ndarray], Any, Any], dict[str, float]]


def _all(source: Any, limit: int) -> np.ndarray:
    count = min(len(source), limit)
    return np.stack([np.asarray(source[i]["x0"]) for i in range(count)])


def image_set(judge: Judge, max_images: int = 10_000) -> SetMetric:
    """Fréchet and kernel distance, precision, recall, density, coverage, and class accuracy.

    judge: in whose features, `feature_network("digits")` or one of any other world (`trained_judge`).

    `frechet_distance_real_split` is the distance between the training and the held-out data.
    """

    def measure(samples, real, held_out):
        drawn = judge.features(samples["x"][:max_images])
        train, test = (judge.features(_all(source, max_images)) for source in (real, held_out))
        kernel = kernel_distance(test, drawn, subset_size=min(1000, len(test), len(drawn)))
        near = manifold(test, drawn)
        values = {
            "frechet_distance": frechet_distance(drawn, test),
            "frechet_distance_real_split": frechet_distance(train, test),
            "kernel_distance": kernel.mean,
            "kernel_distance_standard_error": kernel.standard_error,
            **near._asdict(),
            "classifier_held_out_accuracy": judge.accuracy,
        }
        asked = samples.get(f"cond.{judge.target}")
        if asked is not None:
            values["class_accuracy"] = judged(judge, samples["x"], asked).accuracy
        return values

    return measure


def point_set(projections: int = 256, max_points: int = 2000) -> SetMetric:
    """Exact unbiased MMD² (Gaussian kernel) and sliced Wasserstein distance of low-dimensional points.

    The `_real_split` values are those of as many training points.
    """

    def measure(samples, real, held_out):
        drawn, test = samples["x"][:max_points], _all(held_out, max_points)
        train = _all(real, len(drawn))
        bandwidth = float(np.median(np.linalg.norm(test[:500, None] - test[None, :500], axis=-1))) or 1.0
        return {
            "mmd2": mmd2(test, drawn, bandwidth=bandwidth),
            "mmd2_real_split": mmd2(test, train, bandwidth=bandwidth),
            "sliced_wasserstein": sliced_wasserstein(test, drawn, projections),
            "sliced_wasserstein_real_split": sliced_wasserstein(test, train, projections),
        }

    return measure


def scene_set(max_images: int = 1000) -> SetMetric:
    """How well scenes keep to their captions, read back from the pixels by the world's verifier: the mean of each of
    its scores, and of the same on held-out scenes (what the verifier itself can reach)."""

    def mean(images, captions):
        scores = [scenes.verify(image, caption) for image, caption in zip(images, captions)]
        return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}

    def measure(samples, real, held_out):
        images = samples["x"][:max_images]
        tokens, mask = samples["cond.tokens"], samples["cond.tokens_mask"]
        captions = [held_out.tokenizer.decode(tokens[i][mask[i]]) for i in range(len(images))]
        count = min(len(held_out), len(images))
        truth = mean([held_out[i]["x0"] for i in range(count)], [held_out.caption(i) for i in range(count)])
        return mean(images, captions) | {f"{name}_of_real": value for name, value in truth.items()}

    return measure


def clip_distances(clips: Numbers, real: Numbers) -> dict[str, float]:
    """Fréchet distances of clips `[N, F, S, S, 3]` to the clips `real` of moving shapes of as many frames: "frames", of
    single frames, and "motion", of the differences between successive ones (`data.moving.frame_features`).

    Types and ranges are those of a `Judge`.
    """
    views = {"frames": moving.frame_features, "motion": moving.difference_features}
    clips, real = signed_images("clips", clips), signed_images("real", real)
    return {name: frechet_distance(features(clips), features(real)) for name, features in views.items()}


def token_set(order: int = 2) -> SetMetric:
    """Jensen-Shannon divergence, in bits, between the n-gram distributions of samples and held-out text.

    order: n. `ngram_divergence_real_split` is that of as much training text: what finite samples leave.
    """
    if order < 1:
        raise invalid("order", order, "it must be at least 1")

    def counts(tokens):
        grams = np.stack([tokens[:, i : tokens.shape[1] - order + 1 + i] for i in range(order)], axis=-1)
        keys, number = np.unique(grams.reshape(-1, order), axis=0, return_counts=True)
        return {tuple(key): n for key, n in zip(keys.tolist(), (number / number.sum()).tolist())}

    def divergence(a, b):
        p, q = counts(a), counts(b)
        total = 0.0
        for key in p.keys() | q.keys():
            x, y = p.get(key, 0.0), q.get(key, 0.0)
            middle = (x + y) / 2
            total += sum(0.5 * z * np.log2(z / middle) for z in (x, y) if z)
        return float(total)

    def measure(samples, real, held_out):
        drawn = samples["x"]
        if drawn.ndim != 2 or not np.issubdtype(drawn.dtype, np.integer):
            raise InvalidInput(
                f"token_set measures tokens [N, length], but the samples are {drawn.dtype}{drawn.shape}."
            )
        test = _all(held_out, len(held_out))
        return {
            "ngram_divergence": divergence(drawn, test),
            "ngram_divergence_real_split": divergence(_all(real, len(drawn)), test),
        }

    return measure
