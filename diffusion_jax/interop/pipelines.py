"""From a folder of components to images: class or text (or image) to image with the published latent models.

A `Pipeline` is the parts by name, to be used as they are or with some of them replaced: the denoiser by a cached or
adapted one, the solver or the grid by others. `generate` runs it: prompts are encoded, one compiled program denoises
the latents, the autoencoder turns them into images. On a mesh, samples are split over (data, fsdp) and parameters lie
where the rules put them.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffusion_jax import randomness
from diffusion_jax.adapters import attached, combined_adapters, largest_rank
from diffusion_jax.denoisers import denoiser as lifted
from diffusion_jax.denoisers.branches import in_one_batch, steered
from diffusion_jax.denoisers.guidance import linear_rule
from diffusion_jax.distributed import Rules, batch_sharding, check_batch
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.interop.files import local_folder, read_json
from diffusion_jax.interop.lora_files import check_components, components_of, load_lora, merged_files
from diffusion_jax.interop.pretrained import Pretrained, load_pretrained
from diffusion_jax.interop.prompts import (
    Prompter,
    class_labels,
    clip_prompts,
    double_clip_prompts,
    t5_prompts,
    text_encoder,
)
from diffusion_jax.interop.schedulers import Scheduler, read_scheduler
from diffusion_jax.interop.tokenizers import load_tokenizer
from diffusion_jax.models.conditions import Label, Sizes
from diffusion_jax.models.layers.conditioning import find_stream
from diffusion_jax.sampling import sample
from diffusion_jax.solvers import inpainted
from diffusion_jax.typing import Denoiser, Keys


class Pipeline(NamedTuple):
    """A published latent diffusion model, ready to `generate`; replace parts with `_replace`.

    denoiser, params: of the latents, not guided, and what they take. network: what the denoiser was made from, for
        adapters and export.
    scheduler: process, solver and grid of the checkpoint. prompter: prompts to conditions.
    autoencoder: between images and latents. channels: of the latents.
    size: default height and width in pixels. num_steps, scale: defaults of sampling.
    inpaints: whether the network was trained to, and takes a mask and a masked image.
    mesh: where samples are split, or None.
    """

    denoiser: Denoiser
    params: Any
    scheduler: Scheduler
    prompter: Prompter
    autoencoder: Pretrained
    size: tuple[int, int]
    num_steps: int
    scale: float
    channels: int
    inpaints: bool
    mesh: Mesh | None
    network: Pretrained


class PipelineKind(NamedTuple):
    """How a class of pipelines is put together.

    network: the folder of the denoising network. num_steps, scale: the family's defaults.
    prompter: (load, tokenizer, network, info) -> Prompter; `load(name)` and `tokenizer(name)` read a component, info is
        model_index.json.
    """

    network: str
    prompter: Callable[..., Prompter]
    num_steps: int
    scale: float


def _labels(load, tokenizer, network, info):
    return class_labels(find_stream(network.network.module.conditions, Label).num_classes, info.get("id2label"))


def _clip(load, tokenizer, network, info):
    return clip_prompts(text_encoder(load("text_encoder"), tokenizer("tokenizer"), 77, masked=False))


def _double_clip(load, tokenizer, network, info):
    names = [name for name in ("text_encoder", "text_encoder_2") if (info.get(name) or [None])[0]]
    encoders = [
        text_encoder(load(name), tokenizer(name.replace("text_encoder", "tokenizer")), 77, masked=False)
        for name in names
    ]
    scores = (6.0, 2.5) if info.get("requires_aesthetics_score") else None
    return double_clip_prompts(encoders, info.get("force_zeros_for_empty_prompt", True), scores)


def _t5(max_length):
    def prompter(load, tokenizer, network, info):
        encoder = text_encoder(load("text_encoder"), tokenizer("tokenizer"), max_length, masked=True)
        return t5_prompts(encoder, find_stream(network.network.module.conditions, Sizes) is not None)

    return prompter


KINDS = {
    "DiTPipeline": PipelineKind("transformer", _labels, 50, 4.0),
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
    **overrides: Any,
) -> Pipeline:
    """A folder with model_index.json and a folder for each component, or the id of a repo.

    mesh, rules, variant, param_dtype: of every component, see `load_pretrained`. loras: files and their weights, all
    at once: attached to the denoising network (see `with_lora`), merged into the text encoders that they adapt.
    overrides: fields of the denoising network, such as `dtype="bfloat16"` or `remat="full"`.
    Raises InvalidInput for a class of pipelines that is not in `KINDS`, and whatever `load_pretrained` raises.
    """
    root = local_folder(folder)
    if not (root / "model_index.json").is_file():
        raise InvalidInput(f"{root} has no model_index.json; for a single network use load_pretrained.")
    info = read_json(root / "model_index.json")
    name = info.get("_class_name")
    if name not in KINDS:
        raise unknown("pipeline", name, KINDS)
    kind = KINDS[name]
    encoders = [part for part in ("text_encoder", "text_encoder_2") if (root / part).is_dir()]
    check_components([path for path, _ in loras], ("unet", *encoders))

    def load(component, **fields):
        where = {"mesh": mesh, "rules": rules, "variant": _variant(root / component, variant)}
        pretrained = load_pretrained(root / component, **where, param_dtype=param_dtype, **fields)
        return pretrained if component == kind.network else merged_files(pretrained, loras, component)

    network, autoencoder = load(kind.network, **overrides), load("vae")
    scheduler = read_scheduler(root / "scheduler")
    channels = autoencoder.network.module.latent_channels
    factor = autoencoder.network.module.factor
    size = network.config.get("sample_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    pipeline = Pipeline(
        lifted(network.network, scheduler.process),
        network.params,
        scheduler,
        kind.prompter(load, lambda component: load_tokenizer(root / component), network, info),
        autoencoder,
        (height * factor, width * factor),
        kind.num_steps,
        kind.scale,
        channels,
        bool(getattr(network.network.anatomy, "concat", 0)),
        mesh,
        network,
    )
    adapters = [(load_lora(path, network), weight) for path, weight in loras if "unet" in components_of(path)]
    return with_lora(pipeline, adapters) if adapters else pipeline


def with_lora(pipeline: Pipeline, weighted: Sequence[tuple[Any, int | float]], rank: int | None = None) -> Pipeline:
    """The pipeline with factors of `load_lora` attached to its network, `(factors, weight)` each.

    rank: the room for factors; what they need together, unless given. Later ones of that room swap in without
    compiling anew:

        pipeline._replace(params={**pipeline.params, "lora": adapters.combined_adapters(others, rank, like)})
    """
    if rank is None:
        rank = sum(largest_rank(factors) for factors, _ in weighted)
    factors = combined_adapters(weighted, rank)
    network = attached(pipeline.network.network, factors)
    params = {"params": pipeline.network.params, "lora": factors}
    return pipeline._replace(denoiser=lifted(network, pipeline.scheduler.process), params=params)


def _variant(folder: Path, variant: str | None) -> str | None:
    """The variant, where a component has it; published folders often lack it for some."""
    return variant if variant and list(folder.glob(f"*.{variant}.*")) else None


def generate(
    pipeline: Pipeline,
    key: Keys,
    prompts: Sequence[Any],
    *,
    negative: Sequence[str] | str | None = None,
    num_steps: int | None = None,
    scale: int | float | None = None,
    rescale: int | float = 0.0,
    size: tuple[int, int] | None = None,
    image: Any = None,
    mask: Any = None,
    strength: int | float | None = None,
    noise: Any = None,
    cond: Mapping[str, Any] | None = None,
    index: Any = None,
) -> Any:
    """Images `[B, H, W, 3]` in [-1, 1], one a prompt.

    key: one typed key. prompts: texts, or numbers or names of classes. negative: one for all, or one a prompt.
    scale: of guidance, 1 for none. rescale: see `denoisers.guided`. size: height and width in pixels.
    image: `[B, H, W, 3]` in [-1, 1] (or one for all) to start from: noised to the time that `strength` in (0, 1] of
        the steps begins at (0.8 unless given, 1 with a mask).
    mask: `[B, H, W]` (or one for all), true where `image` is to be painted anew; the rest is kept. A network that was
        trained to inpaint (9 channels) is given mask and masked image; others are led.
    cond: what the network is told besides, on both sides of guidance: `{"control": pictures}` of a ControlNet.
    noise: `[B, h, w, C]` of unit variance in place of that drawn from `key`.
    index: global index of each sample, `[B]`: sample i is the same in any batch. Calls of the same shapes do not
        compile anew, whatever key, prompts, scale and strength (of equally many steps) are.
    Raises InvalidInput for what does not fit together.
    """
    prompts = list(prompts)
    if not prompts:
        raise invalid("prompts", prompts, "at least one is needed")
    negatives = [negative] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
    if len(negatives) != len(prompts):
        raise invalid("negative", negatives, f"one for all or one for each of the {len(prompts)} prompts is needed")
    if strength is not None and not 0 < strength <= 1:
        raise invalid("strength", strength, "it must be in (0, 1]")
    if mask is not None and image is None:
        raise InvalidInput("mask= says what of an image is painted anew, but image= was not given.")
    if image is None and strength is not None:
        raise InvalidInput("strength= is for a run that starts from an image, but image= was not given.")
    if strength is None:
        strength = 0.8 if image is not None and mask is None else 1.0
    num_steps = pipeline.num_steps if num_steps is None else num_steps
    scale = pipeline.scale if scale is None else scale
    check_batch(len(prompts), pipeline.mesh)
    image, mask, size = _checked_pictures(pipeline, image, mask, size, len(prompts))
    factor = pipeline.autoencoder.network.module.factor
    shape = (len(prompts), size[0] // factor, size[1] // factor, pipeline.channels)

    patch = getattr(pipeline.network.network.anatomy, "patch", 1)
    grid = jnp.asarray(pipeline.scheduler.grid(num_steps, seq_len=shape[1] * shape[2] // patch**2))
    grid = grid[len(grid) - 1 - max(1, int((len(grid) - 1) * strength)) :]
    index = jnp.arange(len(prompts)) if index is None else jnp.asarray(index)
    keys = randomness.sample_keys(key, index)
    noise = randomness.normal(randomness.prior_key(keys), shape) if noise is None else jnp.asarray(noise, jnp.float32)
    if noise.shape != shape:
        raise invalid("noise.shape", noise.shape, f"{shape} is needed")

    more = {} if cond is None else dict(cond)
    cond, null = ({**side(asked, size), **more} for side, asked in zip(pipeline.prompter, (prompts, negatives)))
    known = keep = None
    start = pipeline.scheduler.initial_scale(grid) * noise
    if image is not None:
        latents = _programs(pipeline.autoencoder.network)[0](pipeline.autoencoder.params, image)
        if mask is None or strength < 1:
            process = pipeline.scheduler.process
            start = process.alpha(grid[0]) * latents + process.sigma(grid[0]) * noise
    if image is not None and mask is not None:
        small = mask.reshape(len(prompts), shape[1], factor, shape[2], factor)[:, :, 0, :, 0]
        if not pipeline.inpaints:
            known, keep = latents, jnp.broadcast_to(~small[..., None], shape)
        else:
            behind = jnp.where(mask[..., None], 0.0, image)
            behind = _programs(pipeline.autoencoder.network)[0](pipeline.autoencoder.params, behind)
            concat = jnp.concatenate([small[..., None].astype(jnp.float32), behind], axis=-1)
            cond, null = {**cond, "concat": concat}, {**null, "concat": concat}
    batch = (cond, null if scale != 1 else None, start, noise, known, keep, index)
    if pipeline.mesh is not None:
        batch = jax.device_put(batch, batch_sharding(pipeline.mesh))
    program = _sampler(pipeline.denoiser, pipeline.scheduler.solver, pipeline.scheduler.transform, float(rescale))
    latents = program(pipeline.params, key, grid, jnp.float32(scale), *batch) * pipeline.scheduler.final_scale(grid)
    return _programs(pipeline.autoencoder.network)[1](pipeline.autoencoder.params, latents)


def _checked_pictures(pipeline, image, mask, size, count) -> tuple[Any, Any, tuple[int, int]]:
    if image is not None:
        image = jnp.asarray(image, jnp.float32)
        image = jnp.broadcast_to(image, (count, *image.shape[-3:]))
        if size is not None and tuple(size) != image.shape[1:3]:
            raise invalid("size", tuple(size), f"the image is {image.shape[1]} x {image.shape[2]}")
        size = image.shape[1:3]
    size = pipeline.size if size is None else tuple(size)
    factor = pipeline.autoencoder.network.module.factor
    if len(size) != 2 or any(side < factor or side % factor for side in size):
        raise invalid("size", size, f"height and width must be multiples of {factor}")
    if mask is not None:
        mask = jnp.asarray(mask)
        mask = mask if mask.dtype == bool else mask > 0.5
        if mask.shape[-2:] != size:
            raise invalid("mask.shape", mask.shape, f"it must be that of the image, {size}")
        mask = jnp.broadcast_to(mask, (count, *size))
    elif image is not None and pipeline.inpaints:
        raise InvalidInput("This network was trained to inpaint: give mask= with image=.")
    if image is None and pipeline.inpaints:
        raise InvalidInput("This network was trained to inpaint: give image= and mask=.")
    return image, mask, size


@lru_cache(maxsize=16)
def _sampler(denoiser, solver, transform, rescale):
    """The compiled run. What differs from call to call is an argument, so that nothing compiles anew."""

    def run(params, key, grid, scale, cond, null, start, noise, known, keep, index):
        chosen, stepped = denoiser, solver
        if null is not None:
            # Not neutral at scale 1: the scale is traced, and a decision on it would compile both sides.
            rule = linear_rule(denoiser.process, rescale)._replace(neutral=False)
            chosen = steered(in_one_batch(denoiser, null), rule, scale)
        if known is not None:
            stepped = inpainted(solver, known, keep, noise=noise, before=False)
        chosen = transform(chosen)
        x = sample(key, chosen, params, stepped, grid, x_init=start, cond=cond, index=index).x
        # Grids may end above 0, where the known region still has a little noise.
        return x if known is None else jnp.where(keep, known, x)

    return jax.jit(run)


@lru_cache(maxsize=16)
def _programs(autoencoder):
    """Image to latents (the mean of the posterior) and back, compiled."""

    def decode(params, latents):
        return jnp.clip(autoencoder.decode(params, latents), -1.0, 1.0)

    return jax.jit(autoencoder.encode), jax.jit(decode)
