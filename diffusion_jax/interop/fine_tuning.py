"""Fine-tuning of a loaded pipeline: which of its parts learn, the loss they learn by, and the pipeline that they make.

For a picture with latents x0 and a prompt c, a time t of the checkpoint's own table and noise eps, the loss is that of
`objectives.denoising`,

    w(t) |network(x_t, t, cond(c)) - target(x0, eps, t)|^2,   x_t = alpha(t) x0 + sigma(t) eps                  (1)

where process, target (noise, v or x0) and times are the scheduler's, and cond(c) is what `Pipeline.prompter` makes of
the prompt. The autoencoder, the text encoders and, beside adapters, the weights of the network do not learn: they are
`typing.Frozen`, so that checkpoints do not hold them.

    pipeline = interop.load_pipeline("checkpoints/sd15")
    tuned = interop.fine_tuning(pipeline, partial(objectives.denoising, cond_dropout=0.1), size=(512, 512),
                                adapter=partial(adapters.lora, rank=8, select=interop.adapted_layers(pipeline.network)))
    data = interop.latent_examples(interop.prompted(source, pipeline, (512, 512)), pipeline)
    state = training.train(tuned.objective, optimizer, data.pipeline(...), init_params=tuned.init, steps=1000)
    images = interop.generate(tuned.pipeline_of(state.params), key, ["a red cube"])
    tuned.save("out/pytorch_lora_weights.safetensors", state.params)
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.adapters import Lora, at_scale
from diffusion_jax.denoisers import denoiser, guided
from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.interop.generation import GUIDANCE, pixel_step
from diffusion_jax.interop.lora_files import save_lora
from diffusion_jax.interop.lora_targets import modules_of
from diffusion_jax.interop.pipelines import Pipeline, with_network
from diffusion_jax.interop.pretrained import Pretrained, save_pretrained
from diffusion_jax.interop.requests import checked_size
from diffusion_jax.objectives import on_latents, with_frozen
from diffusion_jax.timesteps import on_grid, trailing, uniform
from diffusion_jax.typing import Denoiser, Network, Number, Objective, Process, TimestepDraw

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of attention, as diffusers calls them: what its scripts for LoRA adapt."""


class FineTuning(NamedTuple):
    """What learns of a pipeline, and how.

    objective: of what learns alone, on batches `{"x0", "cond"}` of latents or pictures.
    init: key -> what learns, as it is before training: `init_params` of `training.train`.
    network, process: what the objective asks, whose parameters are `params_of(learned)`.
    pipeline_of: (learned) -> the pipeline to sample from; it compiles once for all states of a run.
    save: (path, learned) -> a LoRA file for adapters, else the folder of the network, as diffusers reads them.
    """

    objective: Objective
    init: Callable[[Any], Any]
    network: Network
    process: Process
    pipeline_of: Callable[[Any], Pipeline]
    save: Callable[[Any, Any], Path]


def fine_tuning(
    pipeline: Pipeline,
    objective: Callable[..., Objective],
    size: tuple[int, int],
    *,
    adapter: Callable[[Network], Lora] | None = None,
    pictures: bool = False,
    guidance: Number | None = None,
) -> FineTuning:
    """Training of the denoising network of `pipeline`, or of low-rank factors beside it, by equation (1).

    objective: `objectives.denoising`, with what it should be set to; it is called with network=, process=, null= (what
        the network is asked where nothing is: for the dropout of captions) and draw= (`training_times`).
    size: height and width of the pictures, multiples of 8 (16 for DiT and PixArt).
    adapter: network -> `adapters.lora` of it, whose factors learn; the whole network learns when None.
    guidance: of a teacher, for objectives that distil, such as `objectives.consistency`: they are called with teacher=
        and teacher_params= as well, which are the checkpoint as it is, guided by this scale (1: not guided). What
        learns is sampled without guidance. With low-rank factors and `consistency` that is LCM-LoRA (Luo et al. 2023).
    pictures: whether batches hold pictures `[B, H, W, 3]` in [-1, 1], which the step encodes (to the mean of the
        posterior), and not their latents.

    Of a network that also says the variance of its steps (DiT, PixArt), the variance is left as it is, as in diffusers.
    Raises InvalidInput for a pipeline that has adapters already, that was trained to inpaint or distilled from guided
    answers, for a size that the autoencoder cannot halve, and, without an adapter, for parameters in half precision.
    """
    size = checked_size(size, pixel_step(pipeline))
    base, autoencoder = pipeline.network, pipeline.autoencoder
    _check_tunable(pipeline, whole=adapter is None)
    nothing = _nothing_asked(pipeline, size)
    lora = None if adapter is None else adapter(base.network)
    network = base.network if lora is None else lora.network
    process = pipeline.scheduler.process

    null = _dropped(pipeline, nothing, size)
    told: dict[str, Any] = {"network": network, "process": process}
    if guidance is None:
        told |= {"null": null, "draw": training_times(process)}
    else:
        told |= {"teacher": _teacher(base.network, process, guidance, null), "teacher_params": base.params}
    own = objective(**told)
    if lora is not None:
        own = with_frozen(own, {"params": base.params}, "lora")
    if pictures:
        own = on_latents(own, autoencoder.network.encode, autoencoder.params)

    def init(key):
        if lora is None:
            return base.params
        factor = autoencoder.network.module.factor
        x = jnp.zeros((1, size[0] // factor, size[1] // factor, pipeline.channels))
        return lora.init(key, base.params, x, jnp.zeros(1), nothing)

    whole = pipeline if lora is None else with_network(pipeline, lora.network, None)

    def pipeline_of(learned):
        if lora is None:
            return whole._replace(params=learned, network=base._replace(params=learned))
        return whole._replace(params={"params": base.params, "lora": learned})

    def save(path, learned):
        if lora is None:
            return save_pretrained(path, base._replace(params=learned))
        return save_lora(path, base, at_scale({}, learned, lora.scale)["lora"])

    return FineTuning(own, init, network, process, pipeline_of, save)


def _teacher(network: Network, process: Process, guidance: Number, null: Mapping[str, Any]) -> Denoiser:
    plain = denoiser(network, process)
    return plain if guidance == 1 else guided(plain, guidance, null=null)


def training_times(process: Process) -> TimestepDraw:
    """Which times the networks of published checkpoints were trained at: all indices of a table of betas alike, or, of
    a process without one, all of [0, 1]."""
    steps = getattr(getattr(process, "schedule", None), "num_steps", None)
    return uniform() if steps is None else on_grid(trailing(steps, steps))


def adapted_layers(pretrained: Pretrained, targets: Iterable[str] = ATTENTION) -> tuple[str, ...]:
    """The paths of layers for the `select` of `adapters.lora`, from the ends of their names here ("q", "mlp/up") or in
    diffusers ("to_q", "ff.net.0.proj").

    Raises InvalidInput for a target that is the end of no name, with the nearest one.
    """
    paths = [
        (module.name, slot.path.removesuffix("/kernel"))
        for module in modules_of(pretrained).values()
        if module.weight is not None and module.weight.low_rank
        for slot in module.weight.slots
    ]
    found: dict[str, None] = {}
    for target in targets:
        chosen = [path for name, path in paths if _ends(name, target, ".") or _ends(path, target, "/")]
        if not chosen:
            endings = {name.rpartition(".")[2] for name, _ in paths if not name[-1].isdigit()}
            raise unknown("a target of lora", target, endings)
        found |= dict.fromkeys(chosen)
    return tuple(found)


def _ends(name: str, target: str, separator: str) -> bool:
    return name == target or name.endswith(separator + target)


def _check_tunable(pipeline: Pipeline, whole: bool) -> None:
    params, module = pipeline.params, pipeline.network.network.module
    if set(params) == {"params", "lora"}:
        raise InvalidInput("The pipeline has adapters already: load it without loras=, or merge them first.")
    if pipeline.inpaints:
        raise InvalidInput("A network that was trained to inpaint is not fine-tuned here: it needs masks to learn by.")
    if any(key.name == GUIDANCE for stream in module.conditions for key in stream.keys):
        raise InvalidInput(
            "This network was distilled from guided answers (it reads the scale of guidance), which fine-tuning by "
            "denoising would undo: fine-tune the checkpoint that it was distilled from."
        )
    halves = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params) if leaf.dtype != jnp.float32})
    if whole and halves:
        raise InvalidInput(
            f"The parameters are {', '.join(halves)}, which cannot hold what a step adds: load them with "
            "param_dtype='float32' (dtype='bfloat16' still computes in half precision)."
        )


def _nothing_asked(pipeline: Pipeline, size: tuple[int, int]) -> dict[str, Any]:
    return pipeline.prompter.null([None], size)


def _dropped(pipeline: Pipeline, nothing: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """What a dropped caption is replaced by: what a sampler asks on the other side of guidance, but for the frame."""
    frame = pipeline.prompter.framed(np.zeros((1, 2)), np.zeros((1, 2)), size)
    return {name: value[0] for name, value in nothing.items() if name not in frame}
