"""Images from a pipeline: prompts are encoded, one compiled program denoises the latents, the autoencoder turns them
into images. On a mesh, samples are split over (data, fsdp) and parameters lie where the rules put them.

What may be asked for is checked in `requests`, pictures are read in `image_inputs`.
"""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import denoisers, randomness, solvers
from diffusion_jax.denoisers.branches import in_one_batch, steered
from diffusion_jax.denoisers.guidance import linear_rule
from diffusion_jax.distributed import batch_sharding, check_batch
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.interop import requests
from diffusion_jax.interop.image_inputs import fitted, fitted_masks, read_images, read_masks
from diffusion_jax.interop.pipelines import Pipeline, denoiser_of
from diffusion_jax.interop.prompts import PromptReading
from diffusion_jax.sampling import sample
from diffusion_jax.timesteps import spliced
from diffusion_jax.typing import Denoiser, Solver

GUIDANCE = "guidance_scale"
"""What a network that was distilled from guided answers reads the scale by."""

NAMES: tuple[str, ...] = ("first", "refiner")
"""What the conditions of several pipelines are called in one run."""


def generate(
    pipeline: Pipeline,
    key: Any,
    prompts: Any,
    *,
    negative: Any = None,
    images_per_prompt: Any = 1,
    num_steps: Any = None,
    scale: Any = None,
    rescale: Any = 0.0,
    size: Any = None,
    image: Any = None,
    mask: Any = None,
    strength: Any = None,
    fit: Any = None,
    background: Any = None,
    refiner: Any = None,
    handover: Any = 0.2,
    chunks: Any = 1,
    weighting: Any = None,
    clip_skip: Any = 0,
    noise: Any = None,
    cond: Any = None,
    index: Any = None,
) -> Any:
    """Images `[B, H, W, 3]` in [-1, 1], `images_per_prompt` of each prompt, one prompt after the other.

    key: one typed key. prompts: a list of texts, or of numbers or names of classes; one alone is a list of one.
    negative: one for all, or one a prompt.
    scale: of guidance; 1 or less is none, and the prompt alone, as in diffusers. A network that was distilled from
        guided answers is told the scale. rescale: see `denoisers.guided`.
    size: height and width in pixels, multiples of the autoencoder's factor (8; 16 for DiT and PixArt).
    image: to start from, one for all or one a prompt: a file, a Pillow image, bytes, floats in [-1, 1]. Noised to the
        time that `strength` in (0, 1] of the steps begins at (0.8 unless given, 1 with a mask).
    mask: 1 (white) where `image` is painted anew, 0 where it is kept. Between, a pixel is kept until the time has
        fallen to its value, so that it changes the less, the darker the mask (Levin & Fried 2023). A network that was
        trained to inpaint (9 channels) is given mask and masked image, and 1/2 and more are white.
    fit: how an image of another size is brought to `size` (or to the next smaller size that fits): "crop" keeps the
        proportions, "stretch" does not. None refuses it. background: a colour seen where `image` is transparent.
    refiner: a pipeline that takes over where the time has fallen to `handover` (0.2 is denoising_end=0.8 in diffusers).
    chunks: chunks of 75 tokens that a prompt may fill, or "auto" for as many as the longest needs; what is beyond is
        left out, with a warning. weighting: "a1111" or "comfyui" reads `(word:1.3)`, see `prompt_weights`.
    clip_skip: layers of CLIP left out, see `prompts.PromptReading`.
    cond: what the network is told besides, on both sides of guidance: `{"control": pictures}` of a ControlNet.
    noise: `[B, h, w, C]` of unit variance in place of that drawn from `key`.
    index: global index of each sample, `[B]`: sample i is the same in any batch. Calls of the same shapes do not
        compile anew, whatever key, prompts, scale, hand-over and strength (of equally many steps) are.
    Raises InvalidInput for what is of another kind, or does not fit together.
    """
    prompts, negatives = requests.asked_for(prompts, negative, images_per_prompt)
    count = len(prompts)
    requests.check_key(key)
    num_steps = requests.whole(
        "num_steps", pipeline.num_steps if num_steps is None else num_steps, 1, requests.MOST_STEPS
    )
    scale = pipeline.scale if scale is None else scale
    scale = requests.number("scale", scale, "a number of at least 0 is needed, where 1 or less is no guidance", 0)
    rescale = requests.number("rescale", rescale, "a number from 0 (off) to 1 is needed", 0, 1)
    strength = requests.strength_of(strength, image, mask)
    if fit is not None and image is None:
        raise InvalidInput("fit= says how an image is made to fit, but image= was not given.")
    pipelines = (pipeline,) if refiner is None else requests.checked_pair(pipeline, refiner, handover)
    requests.check_painting(pipelines, image, mask)
    check_batch(count, pipeline.mesh)
    image, mask, size = _pictures(pipeline, image, mask, size, fit, background, count, images_per_prompt)
    factor = pipeline.autoencoder.network.module.factor
    shape = (count, size[0] // factor, size[1] // factor, pipeline.channels)
    index = requests.indices(index, count)
    noise = None if noise is None else requests.noise_of(noise, shape)
    reading = PromptReading(1, weighting, clip_skip)
    reading = reading._replace(chunks=requests.count_chunks(chunks, pipelines, [*prompts, *negatives], reading))
    more = requests.condition("cond", cond)

    grid, which, first = _grid(pipelines, num_steps, handover, strength, shape)
    scheduler, last = pipelines[int(which[first])].scheduler, pipelines[-1]
    keys = randomness.sample_keys(key, index)
    noise = randomness.normal(randomness.prior_key(keys), shape) if noise is None else noise
    conds, nulls = zip(*(_conditions(one, prompts, negatives, size, reading, scale, more) for one in pipelines))
    if any(negatives) and not any(nulls):
        warnings.warn(f"negative= changes nothing: there is no guidance with scale={scale:g} here.", stacklevel=2)

    known = release = None
    start = scheduler.initial_scale(grid[first:]) * noise
    if image is not None:
        encode = _programs(pipeline.autoencoder.network)[0]
        latents = encode(pipeline.autoencoder.params, image)
        begin = grid[first]
        noised = scheduler.process.alpha(begin) * latents + scheduler.process.sigma(begin) * noise
        if mask is None or strength < 1:
            start = noised
        if mask is not None:
            # As diffusers makes a mask smaller.
            small = mask[:, ::factor, ::factor, None]
            if not pipeline.inpaints:
                known, release = latents, small
                # What is never painted begins as the rest does, as in diffusers.
                start = jnp.where((release > 0) & (begin > release), noised, start)
            else:
                behind = encode(pipeline.autoencoder.params, jnp.where(mask[..., None] >= 0.5, 0.0, image))
                concat = {"concat": jnp.concatenate([(small >= 0.5).astype(jnp.float32), behind], axis=-1)}
                conds = tuple({**side, **concat} for side in conds)
                nulls = tuple(side and {**side, **concat} for side in nulls)
    batch = (conds, nulls, start, noise, known, release, index)
    if pipeline.mesh is not None:
        batch = jax.device_put(batch, batch_sharding(pipeline.mesh))
    program = sampling_program(pipelines, rescale)
    params = tuple(one.params for one in pipelines)
    latents = program(params, key, grid, which, jnp.float32(scale), *batch, first=first)
    return _programs(last.autoencoder.network)[1](last.autoencoder.params, latents * last.scheduler.final_scale(grid))


def _pictures(pipeline, image, mask, size, fit, background, count, repeats) -> tuple[Any, Any, tuple[int, int]]:
    """Image and mask as `[B, H, W, 3]` and `[B, H, W]`, one a sample, and the size of the samples."""
    step = pixel_step(pipeline)
    if image is None:
        return None, None, requests.checked_size(pipeline.size if size is None else size, step)
    image = read_images(image, background=background)
    given = image.shape[1:3]
    mask = None if mask is None else read_masks(mask, given)
    wanted = given if size is None else requests.height_and_width("size", size)
    if fit is not None and size is None:
        wanted = requests.next_smaller(given, step)
    if wanted != given:
        if fit is None:
            told = f"the image is {given[0]} x {given[1]}: fit='crop' or fit='stretch' makes it fit"
            raise invalid("size", wanted, told)
        image = fitted(image, wanted, fit)
        mask = None if mask is None else fitted_masks(mask, wanted, fit)
    size = requests.checked_size(wanted, step)
    image = requests.one_a_sample("image", image, count, repeats)
    return image, None if mask is None else requests.one_a_sample("mask", mask, count, repeats), size


def pixel_step(pipeline: Pipeline) -> int:
    """What height and width of an image must be multiples of."""
    return pipeline.autoencoder.network.module.factor * getattr(pipeline.network.network.anatomy, "patch", 1)


def _grid(pipelines, num_steps, handover, strength, shape):
    """The grid of the run, the number of the pipeline that makes each step, and the step that it begins at."""

    def whole(pipeline):
        patch = getattr(pipeline.network.network.anatomy, "patch", 1)
        grid = jnp.asarray(pipeline.scheduler.grid(num_steps, seq_len=shape[1] * shape[2] // patch**2))
        steps = len(grid) - 1
        return grid, steps - max(1, int(steps * strength))

    def begun(pipeline, grid, first):
        return pipeline.scheduler.begun(grid, first, solver=pipeline.scheduler.solver)

    grid, first = whole(pipelines[0])
    if len(pipelines) == 1:
        return begun(pipelines[0], grid, first), jnp.zeros(len(grid) - 1, jnp.int32), first
    second, later = whole(pipelines[1])
    made = int(np.sum(np.asarray(second)[:-1] > handover + 1e-6))
    joined = spliced(grid, second, made)
    if first >= joined.stop:
        return begun(pipelines[1], second, later), jnp.ones(len(second) - 1, jnp.int32), later
    return begun(pipelines[0], joined.grid, first), joined.which, first


def _conditions(pipeline, prompts, negatives, size, reading, scale, more):
    """What the network is asked, and what it is asked on the other side of guidance, or None."""
    conditions = getattr(getattr(pipeline.network.network, "module", None), "conditions", ())
    cond = {**pipeline.prompter.main(prompts, size, reading), **more}
    if any(key.name == GUIDANCE for stream in conditions for key in stream.keys):
        return {**cond, GUIDANCE: jnp.full((len(prompts),), scale, jnp.float32)}, None
    return cond, {**pipeline.prompter.null(negatives, size, reading), **more} if scale > 1 else None


class SamplingStage(NamedTuple):
    """What makes some of the steps of a run."""

    denoiser: Denoiser
    solver: Solver
    transform: Any


def sampling_program(pipelines: Sequence[Pipeline], rescale: float = 0.0) -> Any:
    """The compiled run of one pipeline, or of several that take turns; the same for the same parts."""
    stages = (SamplingStage(denoiser_of(one), one.scheduler.solver, one.scheduler.transform) for one in pipelines)
    return _compiled(tuple(stages), float(rescale))


@lru_cache(maxsize=16)
def _compiled(stages: tuple[SamplingStage, ...], rescale: float):
    """What differs from call to call is an argument, so that nothing compiles anew."""

    def run(params, key, grid, which, scale, conds, nulls, start, noise, known, release, index, first):
        asked = []
        for stage, null in zip(stages, nulls):
            chosen = stage.denoiser
            if null is not None:
                # Not neutral at scale 1: the scale is traced, and a decision on it would compile both sides.
                rule = linear_rule(chosen.process, rescale)._replace(neutral=False)
                chosen = steered(in_one_batch(chosen, null), rule, scale)
            asked.append(stage.transform(chosen))
        denoiser, solver, own, cond = asked[0], stages[0].solver, params[0], conds[0]
        if len(stages) > 1:
            cond, own = dict(zip(NAMES, conds)), params
            denoiser = denoisers.switched(
                [
                    denoisers.scheduled_condition(one, lambda cond, step, name=name: cond[name])
                    for one, name in zip(asked, NAMES)
                ],
                which,
            )
            solver = solvers.switched([stage.solver for stage in stages], which)
        if known is not None:
            solver = solvers.released(solver, known, release, noise=noise, before=False, within=True)
        x = sample(key, denoiser, own, solver, grid, x_init=start, cond=cond, index=index, start=first).x
        # Grids may end above 0, where the known region still has a little noise.
        return x if known is None else jnp.where(release == 0, known, x)

    return jax.jit(run, static_argnames="first")


@lru_cache(maxsize=16)
def _programs(autoencoder):
    """Image to latents (the mean of the posterior) and back, compiled."""

    def decode(params, latents):
        return jnp.clip(autoencoder.decode(params, latents), -1.0, 1.0)

    return jax.jit(autoencoder.encode), jax.jit(decode)
