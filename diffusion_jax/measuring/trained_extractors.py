"""Feature networks that were trained here: the network of a run, and a classifier trained on the labels of its data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import pixels, training
from diffusion_jax.clock import network_inputs
from diffusion_jax.config import load
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.measuring.feature_extractors import FeatureExtractor
from diffusion_jax.metrics import trained_judge
from diffusion_jax.models import Autoencoder, DualEncoder, Encoder, empty_condition, staged
from diffusion_jax.models.anatomy import anatomy_of
from diffusion_jax.training.storage import params_digest
from diffusion_jax.typing import Network

FEATURE_TIME = 0.1
"""The time at which a denoising network is shown an image: little noise, so that its features are of the image."""


def trained_extractor(kind: str, workdir: str, trust: Sequence[str] = ()) -> FeatureExtractor:
    """The network of the run in `workdir` (kind "run"), or a classifier of the classes of its data ("judge").

    trust: packages whose code the stored config may call, see `config.load`.
    """
    folder = Path(workdir).expanduser()
    file = folder / "config.json"
    if not file.is_file():
        raise InvalidInput(f"{file} does not exist: --features={kind}:WORKDIR needs the folder of a training run.")
    experiment = prepare(load(str(file), trust))
    if kind == "judge":
        return of_judge(experiment.source, experiment.held_out, workdir)
    return _of_run(experiment, folder)


def _fitted(shape):
    """A function that brings an image to the size and channels of one that a run was trained on."""
    if len(shape) != 3 or shape[-1] not in (1, 3):
        raise invalid("the shape of the run's data", shape, "features of images need a run on images [H, W, C]")
    height, width, channels = shape

    def prepare(image):
        image = pixels.to_channels(image, channels)
        return pixels.centre_crop(image, height) if height == width else pixels.resize(image, (height, width))

    told = f"as the run's data: {height} x {width}, bicubic with antialiasing (Pillow, float32), the middle kept"
    return prepare, told


def of_judge(source: Any, held_out: Any, name: str) -> FeatureExtractor:
    """A small classifier, trained on the labels of a run's data and kept in the cache (`metrics.trained_judge`)."""
    judge = trained_judge(source, held_out if held_out is not None else source)
    prepare, told = _fitted(np.shape(source[0]["x0"]))

    def apply(params, batch):
        return {"features": judge.features(np.asarray(batch))}

    # The judge compiles its own batches.
    return FeatureExtractor(f"judge:{name}", name, params_digest(judge.params), told, prepare, apply, jitted=False)


def _of_run(experiment: Experiment, workdir: Path) -> FeatureExtractor:
    """What an encoder, an autoencoder or a denoiser makes of an image."""
    average = experiment.config.sampling.get("ema")
    params = training.load_params(workdir, average)
    prepare_image, told = _fitted(np.shape(_image(experiment.source[0]["x0"])))
    apply, more = _trained_apply(experiment)
    return FeatureExtractor(
        f"run:{workdir}", str(workdir), params_digest(params), f"{told}; {more}", prepare_image, apply, params
    )


def _image(x0: Any) -> Any:
    return x0["image"] if isinstance(x0, Mapping) and "image" in x0 else x0


def _trained_apply(experiment) -> tuple[Callable[[Any, Any], Mapping[str, Any]], str]:
    network = experiment.network
    if isinstance(network, Encoder):
        return lambda params, batch: {"features": network.apply(params, batch).pooled}, "the encoder's pooled vector"
    if isinstance(network, DualEncoder):
        return lambda params, batch: {"features": network.embed(params, {"image": batch})["image"]}, "the image vector"
    if isinstance(network, Autoencoder):

        def latents(params, batch):
            z = network.encode(params, batch)
            return {"features": z.reshape(len(z), -1)}

        return latents, "the latents"
    if not isinstance(network, Network) or experiment.process is None:
        raise InvalidInput(f"The features of a {type(network).__name__} are not known.")
    depth = anatomy_of(network).depth
    stages = staged(network, head=max(1, depth // 2))
    example = experiment.example().get("cond")

    def apply(params, batch):
        t = jnp.full(batch.shape[:1], FEATURE_TIME)
        # The same noise for all images, so that features are a function of the image alone.
        keys = jnp.broadcast_to(jax.random.key(0), batch.shape[:1])
        x, _ = experiment.process.corrupt(keys, batch, t)
        cond = None
        if example is not None:
            rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], (len(batch), *leaf.shape[1:])), example)
            cond = empty_condition(experiment.conditions, rows)
        inputs = (*network_inputs(experiment.process, x, t), cond)
        h = stages.head(params, *inputs)
        if not depth:
            h = stages.body(params, h, *inputs)
        return {"features": h.astype(jnp.float32).reshape(len(h), -1, h.shape[-1]).mean(axis=1)}

    where = f"behind block {max(1, depth // 2)} of {depth}" if depth else "before the last norm"
    return apply, f"the mean over positions {where}, at t = {FEATURE_TIME}"
