"""What `evaluate` does with images: their features, kept between runs, the distances of two sets, and the report."""

import json
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from diffusion_jax import __version__, distributed, metrics, pixels, reading
from diffusion_jax.cache import cache_folder
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.measuring.feature_extractors import FeatureExtractor, published_extractor, text_vectors
from diffusion_jax.measuring.image_sets import ImageSet, as_bytes, digest_of
from diffusion_jax.metrics.comparison import clip_scores, frechet_to, mean_and_error
from diffusion_jax.metrics.frechet import moments_in_chunks
from diffusion_jax.metrics.statistics import Statistics, gaussian
from diffusion_jax.whole_files import written_whole

FEATURES_VERSION = 1
"""Part of the key of cached features: counts up whenever a change here or below would give other features."""

MOST_SIZES = 5
"""How many sizes of images a report lists."""


class ImageFeatures(NamedTuple):
    """Features of a set: arrays `[N, D]` by name, the indices of the images in the set, and how many have each size,
    such as "64 x 48". skipped: what images that could not be decoded are called."""

    arrays: dict[str, np.ndarray]
    indices: np.ndarray
    sizes: dict[str, int]
    skipped: list[str]

    @property
    def count(self) -> int:
        return len(self.indices)


def chosen_indices(count: int, most: int | None, seed: int) -> np.ndarray:
    """The indices of all images, or of `most` random ones, in ascending order."""
    if most is None or most >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def image_features(
    extractor: FeatureExtractor,
    images: ImageSet,
    indices: np.ndarray | None = None,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> ImageFeatures:
    """The features of the images at `indices` (all when None), computed in batches or read from the cache.

    Raises InvalidInput where no image is left.
    """
    if batch_size < 1:
        raise invalid("--batch-size", batch_size, "it must be at least 1")
    indices = np.arange(images.count) if indices is None else indices
    file = _cache_file(extractor, images, indices)
    found = _cached(file)
    if found is None:
        found = _computed(extractor, images, indices, batch_size, progress)
        _keep(file, found)
    if found.skipped:
        told = ", ".join(found.skipped[:3]) + (" ..." if len(found.skipped) > 3 else "")
        warnings.warn(f"{len(found.skipped)} of {len(indices)} images are skipped: {told}.", stacklevel=2)
    return found


def _computed(extractor, images, indices, batch_size, progress):
    mesh = distributed.make_mesh(devices=jax.local_devices())
    batch_size = -(-batch_size // len(jax.local_devices())) * len(jax.local_devices())
    params = jax.device_put(extractor.params, NamedSharding(mesh, PartitionSpec()))
    apply = jax.jit(extractor.apply) if extractor.jitted else extractor.apply
    parts, kept, sizes, skipped, waiting = [], [], Counter(), [], None

    def collect(outputs, count):
        parts.append({name: np.asarray(value)[:count] for name, value in outputs.items()})

    with tqdm(total=len(indices), desc=f"{extractor.name} features", unit="image", disable=_quiet(progress)) as bar:
        for rows in _prepared(extractor, images, indices, batch_size, kept, sizes, skipped):
            full = np.concatenate([rows, np.repeat(rows[-1:], batch_size - len(rows), axis=0)])
            outputs = apply(params, distributed.shard_batch(full, mesh))
            # The next batch is read while this one is computed.
            if waiting is not None:
                collect(*waiting)
            waiting = outputs, len(rows)
            bar.update(len(kept) + len(skipped) - bar.n)
        if waiting is None:
            raise InvalidInput(f"No image of {images.name} could be read.")
        collect(*waiting)
    arrays = {name: np.concatenate([part[name] for part in parts]).astype(np.float32) for name in parts[0]}
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise InvalidInput(
                f"The {name} of {images.name} by {extractor.name} are not finite: are its weights whole?"
            )
    return ImageFeatures(arrays, np.asarray(kept), dict(sizes.most_common()), skipped)


def _quiet(progress: bool) -> bool | None:
    """What tqdm is told: None shows a bar on a terminal alone."""
    return None if progress else True


def _prepared(extractor, images, indices, batch_size, kept, sizes, skipped) -> Iterator[np.ndarray]:
    """Batches of what the network takes; notes which images were kept, of which sizes, and which were skipped."""
    rows: list[np.ndarray] = []
    for index, image in zip(indices, images.read(indices), strict=True):
        if image is None:
            skipped.append(images.label(int(index)))
            continue
        row = np.asarray(extractor.prepare(pixels.scaled(image, images.name)), np.float32)
        if rows and row.shape != rows[0].shape:
            raise invalid("sizes of images", [rows[0].shape, row.shape], f"{extractor.name} gives them no common size")
        rows.append(row)
        kept.append(int(index))
        sizes[f"{image.shape[0]} x {image.shape[1]}"] += 1
        if len(rows) == batch_size:
            yield np.stack(rows)
            rows = []
    if rows:
        yield np.stack(rows)


def _cache_file(extractor: FeatureExtractor, images: ImageSet, indices: np.ndarray) -> Path | None:
    if images.identity is None:
        return None
    made_of = [FEATURES_VERSION, extractor.name.partition(":")[0], extractor.digest, extractor.resizing]
    return cache_folder() / "features" / f"{digest_of([*made_of, images.identity, indices.tolist()])}.npz"


def _cached(file: Path | None) -> ImageFeatures | None:
    if file is None or not file.is_file():
        return None
    try:
        arrays = reading.read_arrays(file)
        told = reading.parse_json(str(arrays.pop("told")), str(file))
        return ImageFeatures(arrays, arrays.pop("indices"), told["sizes"], told["skipped"])
    except (InvalidInput, KeyError):
        warnings.warn(f"The cached features {file} are damaged; they are computed again.", stacklevel=3)
        return None


def _keep(file: Path | None, found: ImageFeatures) -> None:
    if file is None:
        return
    told = np.asarray(json.dumps({"sizes": found.sizes, "skipped": found.skipped}))
    try:
        with written_whole(file) as draft, draft.open("wb") as opened:
            arrays: dict[str, Any] = {**found.arrays, "indices": found.indices, "told": told}
            np.savez(opened, **arrays)
    except OSError as error:
        warnings.warn(f"The features could not be cached in {file.parent} ({error}).", stacklevel=3)


class ReferenceSet(NamedTuple):
    """What images are compared with: other images, statistics of them, or both."""

    name: str
    images: ImageSet | None = None
    statistics: Statistics | None = None


def statistics_of(extractor: FeatureExtractor, found: ImageFeatures) -> Statistics:
    """The statistics of features, with what they were made by. Raises InvalidInput for fewer than two images."""
    if found.count < 2:
        raise InvalidInput(f"Statistics need at least 2 images; there is {found.count}.")
    gaussians = {name: gaussian(moments_in_chunks(values)) for name, values in found.arrays.items()}
    made_by = {
        "features": extractor.name,
        "digest": extractor.digest,
        "resizing": extractor.resizing,
        "count": found.count,
        "diffusion_jax": __version__,
    }
    return Statistics(gaussians["features"], gaussians.get("spatial"), made_by)


def check_statistics(statistics: Statistics, extractor: FeatureExtractor, name: str) -> list[str]:
    """Warnings about statistics of another program. Raises InvalidInput for those of another network or resizing."""
    made_by = statistics.made_by
    for field, ours in (("digest", extractor.digest), ("resizing", extractor.resizing)):
        if field in made_by and made_by[field] != ours:
            told = f"here it is {ours!r}"
            raise invalid(f"the {field} of the features in {name}", made_by[field], f"{told}: they do not compare")
    if made_by:
        return []
    return [
        f"{name} does not say by which network and which resizing it was made; the distance means something only if "
        f"they are those of this report ({extractor.name}, {extractor.resizing})."
    ]


def measure(
    extractor: FeatureExtractor,
    images: ImageSet,
    reference: ImageSet | ReferenceSet,
    *,
    most: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, Any]:
    """The report of images against a reference: numbers by name, and how they were measured.

    most: images of each side, chosen at random, all when None. seed: of that choice and of the subsets of metrics.
    """
    told: list[str] = []
    if isinstance(reference, ImageSet):
        reference = ReferenceSet(reference.name, reference)
    statistics = reference.statistics
    if reference.images is not None and extractor.name != "inception":
        # Beside images there are only statistics of Inception, in the reference batches of guided-diffusion.
        statistics = None
    if statistics is not None:
        told += check_statistics(statistics, extractor, reference.name)
    options = {"batch_size": batch_size, "progress": progress}
    ours = image_features(extractor, images, chosen_indices(images.count, most, seed), **options)
    theirs = None
    if reference.images is not None:
        indices = chosen_indices(reference.images.count, most, seed)
        theirs = image_features(extractor, reference.images, indices, **options)
    # Statistics of Inception are of a whole data set, of which a file holds some images alone.
    whole = statistics.features if statistics is not None else None
    other = theirs.arrays["features"] if theirs is not None else whole
    assert other is not None
    if whole is not None and theirs is not None:
        told.append(
            f"The Fréchet distances are to the mean and covariance in {reference.name}, the other numbers to its "
            f"{theirs.count} images."
        )
    stated = statistics.made_by.get("count") if statistics is not None else None
    found = metrics.compare_features(
        ours.arrays["features"], other, gaussian_reference=whole, reference_count=stated, seed=seed
    )
    values = found.values
    spatial = _spatial(ours, theirs, statistics)
    if spatial is not None:
        values = {"frechet_distance": values["frechet_distance"], "spatial_frechet_distance": spatial, **values}
    count = theirs.count if theirs is not None else stated
    if theirs is not None:
        told += _notes_on_pairs(ours, theirs, images, reference.images)
    return {
        "num_samples": ours.count,
        **({} if count is None else {"num_reference": count}),
        **values,
        "features": features_told(extractor, ours),
        "images": images_told(images, ours),
        "against": {"from": reference.name} | ({} if theirs is None else images_told(reference.images, theirs)),
        "settings": found.settings,
        "not_measured": found.not_measured,
        "warnings": told + found.warnings,
    }


def _notes_on_pairs(ours: ImageFeatures, theirs: ImageFeatures, images: ImageSet, others: Any) -> list[str]:
    """What to know of two sets: that they are the same images, or of different sizes."""
    if images.identity is not None and images.identity == others.identity:
        return [
            "Both sides are the same images. The kernel distance of a set with itself is below 0: it is unbiased for "
            "two sets that were drawn independently."
        ]
    if len(ours.sizes) == 1 and set(ours.sizes) != set(theirs.sizes):
        size = next(iter(ours.sizes))
        side = size.partition(" ")[0]
        return [
            f"The images are {size}, the reference is not: differences in sharpness are measured too. --size={side} "
            "brings both sides to one size first."
        ]
    return []


def at_size(extractor: FeatureExtractor, size: int) -> FeatureExtractor:
    """The extractor for images that are first brought to `size` x `size`, as data to train on is: the shorter side
    resized, the middle kept, rounded to 8 bits."""

    def prepare(image):
        made = as_bytes(pixels.centre_crop(image, size), "an image")
        return extractor.prepare(pixels.scaled(made, "an image"))

    first = f"the middle at {size} x {size}, bicubic with antialiasing (Pillow, float32), 8 bits; then "
    return extractor._replace(prepare=prepare, resizing=first + extractor.resizing)


def _spatial(ours: ImageFeatures, theirs: ImageFeatures | None, statistics: Statistics | None) -> float | None:
    if "spatial" not in ours.arrays:
        return None
    other: Any = statistics.spatial if statistics is not None else None
    if other is None and theirs is not None:
        other = theirs.arrays["spatial"]
    return None if other is None else frechet_to(ours.arrays["spatial"], other)


def measure_prompts(
    folder: Path,
    images: ImageSet,
    prompts: Sequence[str],
    *,
    most: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, Any]:
    """How well images show what they should, by CLIP's score: the mean, its standard error, and each image's.

    folder: of a whole CLIP, in the layout of transformers. The rest as in `measure`.
    """
    extractor = published_extractor("clip", folder)
    indices = chosen_indices(images.count, most, seed)
    found = image_features(extractor, images, indices, batch_size=batch_size, progress=progress)
    asked = [prompts[int(index)] for index in found.indices]
    scores = clip_scores(found.arrays["features"], text_vectors(folder, asked))
    mean, error = mean_and_error(scores)
    each = [
        {"image": images.label(int(index)), "prompt": text, "clip_score": float(score)}
        for index, text, score in zip(found.indices, asked, scores, strict=True)
    ]
    known = {} if np.isnan(error) else {"clip_score_standard_error": error}
    return {
        "num_samples": found.count,
        "clip_score": mean,
        **known,
        "images": images_told(images, found),
        "clip": features_told(extractor, found),
        "per_image": each,
    }


def features_told(extractor: FeatureExtractor, found: ImageFeatures) -> dict[str, Any]:
    """The feature network of a report."""
    return {
        "network": extractor.name,
        "from": extractor.source,
        "digest": extractor.digest,
        "dimension": found.arrays["features"].shape[1],
        "resizing": extractor.resizing,
    }


def images_told(images: ImageSet | None, found: ImageFeatures) -> dict[str, Any]:
    """A set of images of a report."""
    if images is None:
        return {}
    sizes = dict(list(found.sizes.items())[:MOST_SIZES])
    if len(found.sizes) > MOST_SIZES:
        sizes["others"] = sum(found.sizes.values()) - sum(sizes.values())
    told = {"from": images.name, "count": found.count, "of": images.count, "sizes": sizes}
    return told | ({"skipped": found.skipped} if found.skipped else {})


def lines_of(report: dict[str, Any], more: Sequence[str] = ()) -> list[str]:
    """A report as it is printed: what was measured how, the numbers, what is missing, and notes."""
    lines = []
    for name in ("images", "against"):
        if told := report.get(name):
            lines.append(f"{name:10}{told['from']}{_sizes_told(told)}")
    for name in ("features", "clip"):
        if told := report.get(name):
            network = told["network"] if told["digest"] is None else f"{told['network']} ({told['digest']})"
            lines.append(f"{name:10}{network} from {told['from']}, {told['dimension']} numbers an image")
            lines.append(f"{'resizing':10}{told['resizing']}")
    numbers = {name: value for name, value in report.items() if isinstance(value, int | float)}
    width = max(map(len, numbers), default=0)
    lines += [f"{name:{width}}  {value:.4g}" for name, value in numbers.items()]
    reasons: dict[str, list[str]] = {}
    for name, reason in report.get("not_measured", {}).items():
        reasons.setdefault(reason, []).append(name)
    sentences = [f"not measured: {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    sentences += [f"note: {text}" for text in (*report.get("warnings", ()), *more)]
    # Commands within a note are not broken at their hyphens, so that they can be copied.
    return [*lines, *(textwrap.fill(one, 100, subsequent_indent="  ", break_on_hyphens=False) for one in sentences)]


def _sizes_told(told: dict[str, Any]) -> str:
    if "sizes" not in told:
        return ""
    count = f"{told['count']} images" if told["count"] == told["of"] else f"{told['count']} of {told['of']} images"
    one = len(told["sizes"]) == 1
    return f", {count} of {next(iter(told['sizes'])) if one else 'different sizes'}"
