"""Cheaper runs against the run that they stand for, and how varied samples are: endpoints, trajectories, modes, pairs.

Two runs from the same noise are compared sample by sample, which tells more than any distance between sets does.
Everything is float64 on the host.
"""

import numpy as np

from diffusion_jax.errors import invalid
from diffusion_jax.metrics.arrays import real_numbers
from diffusion_jax.typing import Numbers


def endpoint_error(x: Numbers, reference: Numbers, *, relative: bool = False) -> float:
    """`sqrt(mean (x - reference)^2)` over all entries of two arrays of one shape: the root mean square error.

    relative: `||x - reference|| / ||reference||` instead, 0 for equal samples and 1 for x = 0.
    Raises InvalidInput for shapes that differ, for empty ones, and when relative to a reference that is zero.
    """
    x, reference = _alike("x", x, reference)
    error = np.sqrt(np.mean((x - reference) ** 2))
    if not relative:
        return float(error)
    size = np.sqrt(np.mean(reference**2))
    if size == 0:
        raise invalid("reference", 0.0, "an error relative to zero is undefined")
    return float(error / size)


def errors_by_sample(x: Numbers, reference: Numbers) -> np.ndarray:
    """The root mean square error of each sample, `[B]`, of two arrays `[B, ...]`.

    Its median is not moved by the few samples that end elsewhere, in another mode, which the error over all consists
    of; the share above a bound that no sample reaches within its mode counts those. Raises InvalidInput as
    `endpoint_error` does.
    """
    x, reference = _alike("x", x, reference)
    return np.sqrt(np.mean((x - reference).reshape(len(x), -1) ** 2, axis=1))


def trajectory_similarity(trace_a: Numbers, trace_b: Numbers) -> np.ndarray:
    """Cosine similarity `<a, b> / (||a|| ||b||)` of two runs at each saved step, the mean over samples: `[S]`.

    trace_a, trace_b: `[S, B, ...]`, e.g. `Samples.trace` of two runs from the same noise.
    Raises InvalidInput for shapes that differ or have no samples, and where a sample is zero and has no direction.
    """
    a, b = _alike("trace_a", trace_a, trace_b)
    if a.ndim < 2:
        raise invalid("trace_a.shape", a.shape, "[S, B, ...] was expected")
    a, b = (values.reshape(*values.shape[:2], -1) for values in (a, b))
    sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    if np.any(sizes == 0):
        raise invalid("the norm of a sample", 0.0, "a sample that is zero has no direction")
    return ((a * b).sum(axis=-1) / sizes).mean(axis=1)


def undecided(predictions: Numbers, x: Numbers) -> np.ndarray:
    """`||x0_t - x|| / ||x||` by step, the mean over samples: how far what is predicted of x0 is from what it becomes.

    predictions: of x0 along a run, `[S, B, ...]` (`denoisers.recorded`). x: where the run ended, `[B, ...]`. 0 where
    the sample is decided; 1 where nothing but zero is predicted (Gandikota & Bau 2025).
    Raises InvalidInput for shapes that do not fit, and for a sample that is zero.
    """
    said, x = real_numbers("predictions", predictions), real_numbers("x", x)
    if said.shape[1:] != x.shape or not said.size:
        raise invalid("predictions.shape", said.shape, f"[S, ...] behind which stands the shape of x, {x.shape}")
    sizes = np.linalg.norm(x.reshape(len(x), -1), axis=-1)
    if np.any(sizes == 0):
        raise invalid("the norm of a sample", 0.0, "a distance relative to zero is undefined")
    return (np.linalg.norm((said - x).reshape(*said.shape[:2], -1), axis=-1) / sizes).mean(axis=1)


def effective_modes(modes: Numbers) -> float:
    """`exp(-sum_k p_k log p_k)`, p the frequencies of modes: K when K modes are equally frequent, 1 when all agree.

    modes: the mode of each sample, integers `[N]`, or the probability of each, `[N, K]`, whose mean over samples is p.
    Raises InvalidInput for anything else.
    """
    modes = np.asarray(modes)
    if modes.ndim == 1 and modes.size and np.issubdtype(modes.dtype, np.integer):
        _, counts = np.unique(modes, return_counts=True)
        frequencies = counts / modes.size
    elif modes.ndim == 2 and modes.size and np.issubdtype(modes.dtype, np.floating):
        if np.any(modes < 0) or not np.allclose(modes.sum(axis=1), 1.0, atol=1e-3):
            raise invalid("modes", modes.sum(axis=1), "rows of probabilities must be positive and sum to 1")
        frequencies = modes.mean(axis=0, dtype=np.float64)
        frequencies = frequencies[frequencies > 0] / frequencies.sum()
    else:
        raise invalid("modes", (modes.shape, str(modes.dtype)), "integers [N] or probabilities [N, K] were expected")
    return float(np.exp(-(frequencies * np.log(frequencies)).sum()))


def pairwise_distance(features: Numbers, labels: Numbers | None = None) -> float:
    """`E ||f_i - f_j||` over pairs of different samples, how varied they are; `features [N, ...]`, flattened.

    labels: `[N]`; only pairs under the same condition count then, and each condition counts the same.
    Raises InvalidInput where fewer than two samples can be compared.
    """
    from scipy.spatial.distance import pdist

    features = real_numbers("features", features)
    features = features.reshape(len(features), -1)
    labels = np.zeros(len(features)) if labels is None else np.asarray(labels)
    if labels.shape != (len(features),):
        raise invalid("labels.shape", labels.shape, f"a label for each of {len(features)} samples was expected")
    groups = [features[labels == label] for label in np.unique(labels)]
    if not groups or min(map(len, groups)) < 2:
        raise invalid("samples of a condition", min(map(len, groups), default=0), "a pair needs at least two")
    return float(np.mean([pdist(group).mean() for group in groups]))


def _alike(name, x, reference):
    x, reference = real_numbers(name, x), real_numbers("reference", reference)
    if x.shape != reference.shape or not x.size:
        raise invalid(f"{name}.shape", x.shape, f"it must be that of what it is compared with, {reference.shape}")
    return x, reference
