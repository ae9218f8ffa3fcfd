"""Networks in whose features images are compared: Inception-v3, DINOv2 and CLIP from local files, and thumbnails of
pixels. Nothing is downloaded. Networks that were trained here are in `trained_extractors`.

An image is resized on the host, one by one and in float32, so that images of many sizes are one set; batches of one
size go through one compiled program.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax import interop, pixels
from diffusion_jax.cache import cache_folder
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.interop.prompts import PLAIN, text_encoder
from diffusion_jax.metrics.inception import inception_file, inception_outputs, read_inception
from diffusion_jax.models import Encoder
from diffusion_jax.reading import read_json

NAMES = ("inception", "dinov2", "clip", "pixels")

BEST_FIRST = ("dinov2", "inception", "clip")
"""What is taken where nobody says: DINOv2's features agree best with what people see (Stein et al. 2023)."""

RESIZINGS = {
    "clean": "to 299 x 299, bicubic with antialiasing (Pillow, float32), (x - 128) / 128, as clean-fid's mode clean",
    "pytorch-fid": "to 299 x 299, bilinear without antialiasing, half-pixel centres, as pytorch-fid",
    "tensorflow": "to 299 x 299, bilinear without antialiasing, TensorFlow 1's grid, (x - 128) / 128, as "
    "guided-diffusion's evaluator",
}
"""How images are brought to Inception's size. Numbers from different ways do not compare."""

INCEPTION_SIZE, THUMBNAIL = 299, 8

HUB = {
    "dinov2": tuple(f"facebook/dinov2-{size}" for size in ("large", "base", "small", "giant")),
    "clip": ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32", "openai/clip-vit-base-patch16"),
}
"""Repositories that are looked for in the cache of Hugging Face's hub, the preferred one first."""

OFFERED = {
    "dinov2": "`hf download facebook/dinov2-base --local-dir models/dinov2`, then --features-from=models/dinov2",
    "clip": "`hf download openai/clip-vit-large-patch14 --local-dir models/clip`, then --features-from=models/clip",
    "inception": "convert pytorch-fid's weights once (docs/evaluate.md), then --features-from=inception.safetensors",
}
"""How the files of each network are had, and how they are named then."""

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of the colours that DINOv2 and CLIP expect, where a folder does not say."""


class FeatureExtractor(NamedTuple):
    """A feature network.

    name: "inception", "dinov2", ... source: where it is from. digest: of its weights, where it has any.
    resizing: what is done to an image before, in words.
    prepare: (image in [-1, 1], [H, W, 1 or 3]) -> the array that the network takes, on the host.
    apply: (params, batch [B, ...]) -> {"features": [B, D], ...}; pure. jitted: whether it is to be compiled as one.
    """

    name: str
    source: str
    digest: str | None
    resizing: str
    prepare: Callable[[np.ndarray], np.ndarray]
    apply: Callable[[Any, Any], Mapping[str, Any]]
    params: Any = ()
    jitted: bool = True


def published_extractor(
    kind: str, source: str | os.PathLike | None = None, resizing: str | None = None
) -> FeatureExtractor:
    """The network `kind`, one of `NAMES`, from the folder or file `source`; from what is at hand when None.

    resizing: a key of `RESIZINGS`, for Inception alone; "clean" when None. Raises InvalidInput where there are no
    weights, with the command that gets them.
    """
    if kind not in NAMES:
        raise unknown("--features", kind, [*NAMES, "run:WORKDIR", "judge:WORKDIR"])
    if resizing is not None and kind != "inception":
        raise invalid("--resize", resizing, f"it is for Inception; {kind} has one way of its own")
    if kind == "pixels":
        return _pixels()
    found = Path(source).expanduser() if source is not None else at_hand(kind)
    if found is None:
        raise InvalidInput(
            f"--features={kind} needs the weights of the network, and none are at hand: {OFFERED[kind]}. "
            "--features=pixels needs none."
        )
    return _inception(found, resizing or "clean") if kind == "inception" else _encoder(kind, found)


def kind_of_weights(source: str | os.PathLike) -> str:
    """Which of the networks the files in a folder are of. Raises InvalidInput for others."""
    path = Path(source).expanduser()
    if not path.exists():
        raise InvalidInput(f"--features-from: {path} does not exist.")
    if not path.is_dir() or not (path / "config.json").is_file():
        inception_file(path)
        return "inception"
    config = read_json(path / "config.json")
    told = str(config.get("model_type") or (config.get("architectures") or [""])[0]).lower()
    for kind in ("dinov2", "clip"):
        if told.startswith(kind):
            return kind
    raise InvalidInput(
        f"{path} holds a network of the type {told!r}, but features are of DINOv2, CLIP or Inception; a run of this "
        "library is named by --features=run:WORKDIR."
    )


def at_hand(kind: str) -> Path | None:
    """The weights of a network that are on this machine: in `cache_folder()/networks/KIND`, or in the cache of
    Hugging Face's hub."""
    folder = cache_folder() / "networks" / kind
    beside = [folder.with_suffix(suffix) for suffix in (".safetensors", ".npz")]
    for path in (folder, *beside):
        if path.exists():
            return path
    if kind not in HUB:
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for repository in HUB[kind]:
        found = try_to_load_from_cache(repository, "config.json")
        if isinstance(found, str) and any(Path(found).parent.glob("*.safetensors")):
            return Path(found).parent
    return None


def _digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(2**22):
                found.update(block)
    return f"sha256:{found.hexdigest()[:16]}"


def _pixels() -> FeatureExtractor:
    def prepare(image):
        return np.clip(pixels.resample(pixels.to_channels(image, 3), THUMBNAIL), -1.0, 1.0)

    def apply(params, batch):
        return {"features": batch.reshape(len(batch), -1)}

    told = f"stretched to {THUMBNAIL} x {THUMBNAIL}, bicubic with antialiasing (Pillow, float32)"
    return FeatureExtractor("pixels", "the images themselves", None, told, prepare, apply)


def bilinear_matrix(old: int, new: int, half_pixel: bool) -> np.ndarray:
    """The matrix `[new, old]` of bilinear resizing without antialiasing.

    half_pixel: whether pixels have their centres at i + 1/2 (PyTorch), or at i, as TensorFlow 1 has them.
    """
    at = (np.arange(new) + 0.5) * (old / new) - 0.5 if half_pixel else np.arange(new) * (old / new)
    at = np.clip(at, 0.0, old - 1)
    lower = np.floor(at).astype(int)
    upper = np.minimum(lower + 1, old - 1)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new), lower), 1 - (at - lower))
    np.add.at(matrix, (np.arange(new), upper), at - lower)
    return matrix.astype(np.float32)


_matrix = functools.lru_cache(maxsize=64)(bilinear_matrix)


def inception_input(image: np.ndarray, resizing: str) -> np.ndarray:
    """An image in [-1, 1] as Inception-v3 takes it, `[299, 299, 3]`, in one of the ways of `RESIZINGS`."""
    if resizing not in RESIZINGS:
        raise unknown("--resize", resizing, RESIZINGS)
    image = pixels.to_channels(image, 3)
    if resizing == "clean":
        image = np.clip(pixels.resample(image, INCEPTION_SIZE), -1.0, 1.0)
    else:
        half = resizing == "pytorch-fid"
        rows, columns = (_matrix(side, INCEPTION_SIZE, half) for side in image.shape[:2])
        image = np.einsum("ri,cj,ijd->rcd", rows, columns, image, optimize=True)
    # (x - 128) / 128 of x in 0 .. 255.
    return image if resizing == "pytorch-fid" else (image * 127.5 - 0.5) / 128.0


def _inception(path: Path, resizing: str) -> FeatureExtractor:
    if resizing not in RESIZINGS:
        raise unknown("--resize", resizing, RESIZINGS)
    file = inception_file(path)
    prepare = functools.partial(inception_input, resizing=resizing)

    def apply(variables, batch):
        outputs = inception_outputs(variables, batch)
        return {name: outputs[name] for name in ("features", "spatial")}

    return FeatureExtractor(
        "inception", str(path), _digest([file]), RESIZINGS[resizing], prepare, apply, read_inception(file)
    )


class ImageEncoder(NamedTuple):
    """The image half of a checkpoint, with what is done to images before."""

    pretrained: Any
    preprocess: interop.Preprocessor
    digest: str


def image_encoder(kind: str, folder: Path) -> ImageEncoder:
    """DINOv2 or CLIP's image half from a folder in the layout of transformers."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = str((config.get("architectures") or [""])[0])
    family = None
    if kind == "clip" and named != "CLIPVisionModel":
        family = "CLIPVisionModelWithProjection"
    pretrained = interop.load_pretrained(folder, family=family)
    if not isinstance(pretrained.network, Encoder):
        raise InvalidInput(f"{folder} holds a {pretrained.family}, but {kind} is needed.")
    if (folder / "preprocessor_config.json").is_file():
        preprocess = interop.load_preprocessor(folder)
    else:
        module = pretrained.network.module
        side = min(224, module.image_size) // module.patch * module.patch
        mean, std = IMAGENET if kind == "dinov2" else OPENAI
        shortest = side * 256 // 224 if kind == "dinov2" else side
        preprocess = interop.Preprocessor(shortest, None, (side, side), mean, std)
    return ImageEncoder(pretrained, preprocess, _digest(sorted(folder.glob("*.safetensors"))))


def preprocessed(preprocess: interop.Preprocessor, image: np.ndarray) -> np.ndarray:
    """An image in [-1, 1] resized and cropped as a preprocessor says, before its colours are normalised."""
    image = pixels.to_channels(image, 3)
    size = preprocess.resized(*image.shape[:2])
    image = np.clip(pixels.resample(image, size), -1.0, 1.0)
    if preprocess.crop is None:
        return image
    top, left = ((whole - kept) // 2 for whole, kept in zip(size, preprocess.crop))
    if top < 0 or left < 0:
        raise invalid("size of an image", size, f"it is smaller than what the network reads, {preprocess.crop}")
    return image[top : top + preprocess.crop[0], left : left + preprocess.crop[1]]


def told_of(preprocess: interop.Preprocessor) -> str:
    """What a preprocessor does, in words."""
    way = "bicubic with antialiasing (Pillow, float32)"
    if preprocess.size is not None:
        told = f"stretched to {preprocess.size[0]} x {preprocess.size[1]}, {way}"
    else:
        told = f"shorter side to {preprocess.shortest}, {way}" if preprocess.shortest else "not resized"
    return told if preprocess.crop is None else f"{told}, the middle {preprocess.crop[0]} x {preprocess.crop[1]} kept"


def encoder_outputs(encoder: ImageEncoder) -> Callable[[Any, Any], Mapping[str, Any]]:
    """`(params, batch) -> {"features": [B, D]}` of what `preprocessed` makes."""
    mean, std = (jnp.asarray(value, jnp.float32) for value in (encoder.preprocess.mean, encoder.preprocess.std))

    def apply(params, batch):
        return {"features": encoder.pretrained.network.apply(params, (batch / 2 + 0.5 - mean) / std).pooled}

    return apply


def _encoder(kind: str, folder: Path) -> FeatureExtractor:
    encoder = image_encoder(kind, folder)
    prepare = functools.partial(preprocessed, encoder.preprocess)
    resizing = told_of(encoder.preprocess)
    params = encoder.pretrained.params
    return FeatureExtractor(kind, str(folder), encoder.digest, resizing, prepare, encoder_outputs(encoder), params)


def text_vectors(folder: str | os.PathLike, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """CLIP's vectors `[N, D]` of texts, by the text half and the tokenizer of a folder in the layout of transformers.

    A text that is too long is cut, which is told in a warning.
    """
    pretrained = interop.load_pretrained(folder, family="CLIPTextModelWithProjection")
    tokenizer = interop.load_tokenizer(folder)
    encoder = text_encoder(pretrained, tokenizer, pretrained.network.module.positions, masked=False)
    different = list(dict.fromkeys(texts))
    parts = []
    for start in range(0, len(different), batch_size):
        part = different[start : start + batch_size]
        # Batches of one size compile once.
        found = encoder.encode([*part, *[part[-1]] * (batch_size - len(part))], PLAIN)
        parts.append(np.asarray(found.pooled)[: len(part)])
    rows = {text: row for row, text in enumerate(different)}
    return np.concatenate(parts)[[rows[text] for text in texts]]
