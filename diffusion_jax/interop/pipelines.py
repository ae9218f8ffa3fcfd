"""From a folder of components to images: class or text (or image) to image with the published latent models.

A `Pipeline` is the parts by name, to be used as they are or with some of them replaced: the denoiser by a cached or
adapted one, the solver or the grid by others. `generation.generate` runs it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffusion_jax.adapters import attached, combined_adapters, largest_rank
from diffusion_jax.denoisers import denoiser as lifted
from diffusion_jax.distributed import Rules
from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.interop.families import sample_size
from diffusion_jax.interop.fields import REQUIRED
from diffusion_jax.interop.files import local_folder
from diffusion_jax.interop.lora_files import check_components, components_of, load_lora, merged_files
from diffusion_jax.interop.pipeline_parts import file_parts, folder_parts, load_autoencoder
from diffusion_jax.interop.pretrained import Placement, Pretrained
from diffusion_jax.interop.prompts import (
    Prompter,
    class_prompts,
    clip_prompts,
    double_clip_prompts,
    t5_prompts,
    text_encoder,
)
from diffusion_jax.interop.schedulers import Scheduler, of_class, read_scheduler
from diffusion_jax.models import KLVAE, T5, CLIPText
from diffusion_jax.models.conditions import Label, Sizes
from diffusion_jax.models.layers.conditioning import find_stream
from diffusion_jax.typing import Denoiser, Network


class Pipeline(NamedTuple):
    """A published latent diffusion model, ready to `generate`; replace parts with `_replace`.

    denoiser, params: of the latents, not guided, and what they take. network: what the denoiser was made from, for
        adapters and export.
    scheduler: process, solver and grid of the checkpoint. prompter: prompts to conditions.
    autoencoder: between images and latents. channels: of the latents.
    size: default height and width in pixels, None where the checkpoint names none. num_steps, scale: defaults.
    inpaints: whether the network was trained to, and takes a mask and a masked image.
    mesh: where samples are split, or None.
    lift: the network, adapters included, as the denoiser of a process; the same one for the same process.
    """

    denoiser: Denoiser
    params: Any
    scheduler: Scheduler
    prompter: Prompter
    autoencoder: Pretrained
    size: tuple[int, int] | None
    num_steps: int
    scale: float
    channels: int
    inpaints: bool
    mesh: Mesh | None
    network: Pretrained
    lift: Callable[[Any], Denoiser]


class PipelineKind(NamedTuple):
    """How a class of pipelines is put together.

    network: the folder of the denoising network. num_steps, scale: the family's defaults. classes: whether its prompts
        are classes, not texts.
    prompter: (load, tokenizer, network, info) -> Prompter; `load(name)` and `tokenizer(name)` read a component, info is
        the `Fields` of model_index.json.
    """

    network: str
    prompter: Callable[..., Prompter]
    num_steps: int
    scale: float
    classes: bool = False


def _labels(load, tokenizer, network, info):
    stream = find_stream(network.network.module.conditions, Label)
    if stream is None:
        raise InvalidInput("model_index.json says DiTPipeline, but its network takes no class.")
    return class_prompts(stream.num_classes, info.raw("id2label"))


def _clip_encoder(encoder, tokenizer):
    """As long as the tokenizer says, and no longer than the encoder has positions."""
    if not isinstance(encoder.network.module, CLIPText):
        raise InvalidInput(f"A text encoder of the pipeline is a {encoder.family}, but CLIP's is needed.")
    positions = encoder.network.module.positions
    return text_encoder(encoder, tokenizer, min(tokenizer.max_length or positions, positions), masked=False)


def _clip(load, tokenizer, network, info):
    return clip_prompts(_clip_encoder(load("text_encoder"), tokenizer("tokenizer")))


def _double_clip(load, tokenizer, network, info):
    names = [name for name in ("text_encoder", "text_encoder_2") if (info.items(name, None) or (None,))[0]]
    if not names:
        raise InvalidInput(f"{info.source} names no text encoder: text_encoder or text_encoder_2 is needed.")
    encoders = [_clip_encoder(load(name), tokenizer(name.replace("text_encoder", "tokenizer"))) for name in names]
    scores = (6.0, 2.5) if info.flag("requires_aesthetics_score", None) else None
    return double_clip_prompts(encoders, info.flag("force_zeros_for_empty_prompt", True), scores)


def _t5(max_length):
    def prompter(load, tokenizer, network, info):
        pretrained = load("text_encoder")
        if not isinstance(pretrained.network.module, T5):
            raise InvalidInput(f"The text encoder of the pipeline is a {pretrained.family}, but T5's is needed.")
        encoder = text_encoder(pretrained, tokenizer("tokenizer"), max_length, masked=True)
        return t5_prompts(encoder, find_stream(network.network.module.conditions, Sizes) is not None)

    return prompter


KINDS = {
    "DiTPipeline": PipelineKind("transformer", _labels, 50, 4.0, classes=True),
    "LatentConsistencyModelImg2ImgPipeline": PipelineKind("unet", _clip, 4, 8.5),
    "LatentConsistencyModelPipeline": PipelineKind("unet", _clip, 4, 8.5),
    "PixArtAlphaPipeline": PipelineKind("transformer", _t5(120), 20, 4.5),
    "PixArtSigmaPipeline": PipelineKind("transformer", _t5(300), 20, 4.5),
    "StableDiffusionPipeline": PipelineKind("unet", _clip, 50, 7.5),
    "StableDiffusionImg2ImgPipeline": PipelineKind("unet", _clip, 50, 7.5),
    "StableDiffusionInpaintPipeline": PipelineKind("unet", _clip, 50, 7.5),
    "StableDiffusionXLPipeline": PipelineKind("unet", _double_clip, 50, 5.0),
    "StableDiffusionXLImg2ImgPipeline": PipelineKind("unet", _double_clip, 50, 5.0),
    "StableDiffusionXLInpaintPipeline": PipelineKind("unet", _double_clip, 50, 7.5),
}
"""By the class that model_index.json names."""


def load_pipeline(
    folder: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    variant: str | None = None,
    param_dtype: DTypeLike = jnp.float32,
    loras: Sequence[tuple[str | os.PathLike, int | float]] = (),
    vae: str | os.PathLike | None = None,
    scheduler: Mapping[str, Any] | str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction_type: str | None = None,
    **overrides: Any,
) -> Pipeline:
    """A folder with model_index.json and a folder for each component, the id of a repo, or one safetensors file in the
    layout of the original code: Stable Diffusion 1, 2 and XL, or DiT.

    mesh, rules, variant, param_dtype: of every component, see `load_pretrained`. loras: files and their weights, all
    at once: attached to the denoising network (see `with_lora`), merged into the text encoders that they adapt.
    vae: a folder or file with another autoencoder; a DiT in one file needs it. scheduler: another config, its folder or
    its file.
    tokenizer: for a single file, the folder of CLIP's tokenizer; `tokenizer` beside the file unless given.
    prediction_type: for a single file, "epsilon" or "v_prediction"; needed for Stable Diffusion 2, of which both exist.
    overrides: fields of the denoising network, such as `dtype="bfloat16"` or `remat="full"`.
    Raises InvalidInput for a class of pipelines that is not in `KINDS`, and whatever `load_pretrained` raises.
    """
    root, placement = local_folder(folder), Placement(mesh, rules, param_dtype)
    if root.is_file():
        parts = file_parts(root, placement, tokenizer, prediction_type)
    elif tokenizer is not None or prediction_type is not None:
        given = "tokenizer" if tokenizer is not None else "prediction_type"
        raise InvalidInput(f"{given}= is for a pipeline in a single file, and {root} is a folder, whose files say it.")
    else:
        parts = folder_parts(root, placement, variant)
    name = _class_name(parts)
    kind = KINDS[name]
    adaptable = ["unet"]

    def load(component, **fields):
        pretrained = parts.read(component, **fields)
        if component == kind.network:
            return pretrained
        adaptable.append(component)
        return merged_files(pretrained, loras, component)

    network = load(kind.network, **overrides)
    if not isinstance(network.network, Network):
        raise InvalidInput(f"{parts.source(kind.network)} is that of a {network.family}, but a denoiser is needed.")
    autoencoder = load("vae") if vae is None else load_autoencoder(vae, placement, name)
    if not isinstance(autoencoder.network.module, KLVAE):
        raise InvalidInput(f"{parts.source('vae')} is that of a {autoencoder.family}, but an autoencoder is needed.")
    if scheduler is None:
        noise = parts.scheduler()
    else:
        noise = read_scheduler(dict(scheduler) if isinstance(scheduler, Mapping) else Path(scheduler).expanduser())
    channels = autoencoder.network.module.latent_channels
    factor = autoencoder.network.module.factor
    sides = sample_size(network.family, network.config, parts.source(kind.network))
    lift = _lifting(network.network)
    pipeline = Pipeline(
        lift(noise.process),
        network.params,
        noise,
        kind.prompter(load, parts.tokenizer, network, parts.info),
        autoencoder,
        None if sides is None else (sides[0] * factor, sides[1] * factor),
        kind.num_steps,
        kind.scale,
        channels,
        bool(getattr(network.network.anatomy, "concat", 0)),
        mesh,
        network,
        lift,
    )
    check_components([path for path, _ in loras], adaptable)
    adapters = [(load_lora(path, network), weight) for path, weight in loras if "unet" in components_of(path)]
    return with_lora(pipeline, adapters) if adapters else pipeline


def with_lora(pipeline: Pipeline, weighted: Sequence[tuple[Any, int | float]], rank: int | None = None) -> Pipeline:
    """The pipeline with factors of `load_lora` attached to its network, `(factors, weight)` each, beside those that it
    has already.

    rank: the room for factors; what they need together, unless given. Later ones of that room swap in without
    compiling anew:

        pipeline._replace(params={**pipeline.params, "lora": adapters.combined_adapters(others, rank, like)})
    """
    if isinstance(pipeline.params, Mapping) and set(pipeline.params) == {"params", "lora"}:
        weighted = [(pipeline.params["lora"], 1.0), *weighted]
    if rank is None:
        rank = sum(largest_rank(factors) for factors, _ in weighted)
    factors = combined_adapters(weighted, rank)
    params = {"params": pipeline.network.params, "lora": factors}
    return with_network(pipeline, attached(pipeline.network.network, factors), params)


def with_network(pipeline: Pipeline, network: Network, params: Any) -> Pipeline:
    """The pipeline with another denoising network in the place of its own, such as its own with adapters."""
    lift = _lifting(network)
    return pipeline._replace(denoiser=lift(pipeline.scheduler.process), params=params, lift=lift)


def with_scheduler(pipeline: Pipeline, name: str) -> Pipeline:
    """The pipeline with another class of scheduler for the noise levels of its own, such as "LCMScheduler" for a
    student of few steps: `LCMScheduler.from_config(pipe.scheduler.config)` in diffusers.

    Raises InvalidInput for a class that is not read, and where a field of the checkpoint's config has a value that the
    class does not know.
    """
    return pipeline._replace(scheduler=of_class(pipeline.scheduler, name))


def pipeline_class(folder: str | os.PathLike, prediction_type: str | None = None) -> str:
    """The class of the pipeline in a folder or a file, a key of `KINDS`; no tensor is read."""
    root = local_folder(folder)
    if root.is_file():
        return _class_name(file_parts(root, Placement(), None, prediction_type))
    return _class_name(folder_parts(root, Placement(), None))


def _class_name(parts) -> str:
    name = parts.info.text("_class_name", REQUIRED)
    if name not in KINDS:
        raise unknown(f"{parts.info.source}: _class_name", name, KINDS)
    return name


def adapted_network(pipeline: Pipeline) -> Network:
    """The denoising network with the adapters that are attached to it: it takes `pipeline.params`."""
    if isinstance(pipeline.params, Mapping) and set(pipeline.params) == {"params", "lora"}:
        return attached(pipeline.network.network, pipeline.params["lora"])
    return pipeline.network.network


def _lifting(network):
    return lru_cache(maxsize=16)(partial(lifted, network))


def denoiser_of(pipeline: Pipeline) -> Denoiser:
    """The denoiser at the scheduler's process, for that decides what the network predicts and what it is told.

    Where the scheduler was replaced, the denoiser that was loaded is made anew. Raises InvalidInput for one of the
    user's own that was made for another process.
    """
    made, process = pipeline.denoiser.process, pipeline.scheduler.process
    if made == process:
        return pipeline.denoiser
    if pipeline.denoiser is not pipeline.lift(made):
        raise InvalidInput(
            "pipeline.denoiser was made for another process than that of pipeline.scheduler: make it of "
            "pipeline.lift(pipeline.scheduler.process)."
        )
    return pipeline.lift(process)
