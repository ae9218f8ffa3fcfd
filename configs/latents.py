"""A diffusion transformer on latents of your own pictures, which `diffusion-jax encode` wrote.

    diffusion-jax encode --pretrained=checkpoints/sd15 --data=my_pictures --size=256 --output=out/latents
    diffusion-jax train --config=latents:out/latents --workdir=out/mine

Classes, captions (encoded by the text encoder of the checkpoint, or as bytes) and sizes are those that were encoded.
Pictures of samples are decoded by the autoencoder of the latents (`--config.sampling.decoder=FOLDER` if it has moved).
The network is DiT-S/2 (33 million parameters): made for a GPU or TPU; `--config.model.width=192 --config.model.depth=6`
is for patient laptops, and `latents:out/latents` with `--config.model.width=768 --config.model.heads=12` is DiT-B/2.
"""

import os

from diffusion_jax import data
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import defaults


def get_config(folder: str = "") -> ConfigDict:
    if not folder:
        raise InvalidInput(
            "Name the folder of latents that `diffusion-jax encode` wrote: --config=latents:out/latents."
        )
    folder = os.path.abspath(os.path.expanduser(folder))
    source = data.latents(folder) if os.path.isfile(os.path.join(folder, "latents.json")) else None
    told = source and source.description
    if told is None:
        raise InvalidInput(f"{folder!r} is no folder that `diffusion-jax encode` wrote: it has no latents.json.")
    batch_size = 2 ** min(6, max(0, len(source).bit_length() - 1))
    config = defaults(steps=20_000, batch_size=batch_size)
    config.data = call("data.latents", folder=folder)
    config.held_out = call("data.held_out") if source.held_out is not None else None
    condition, conditions, null = None, (), None
    if told.get("text"):
        conditions, null = (call("models.context"),), {"context": 0.0, "context_mask": False}
    elif source.vocab_size is not None:
        conditions, null = (call("models.text", vocab_size=source.vocab_size),), {"tokens": 0, "tokens_mask": False}
    elif source.num_classes is not None:
        conditions, null = (call("models.label", num_classes=source.num_classes),), {"label": source.num_classes}
        condition = call("data.cycled_labels", num_classes=source.num_classes)
    if null is not None and condition is None:
        condition = call("data.conditions_of")
    config.model = call("models.dit", preset="S/2", qk_norm=True, conditions=conditions, remat="dots_no_batch")
    config.process = call("processes.rectified_flow")
    dropout = {} if null is None else {"cond_dropout": 0.1, "null": null}
    config.objective = call("objectives.denoising", draw=call("timesteps.logit_normal"), **dropout)
    rate = call("training.optimizers.cosine", peak=3e-4, warmup_steps=0.05)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.train.update(sample_every=1000, validation_examples=64)
    if source.held_out is None:
        config.train.validate_every = None
    guidance = {} if null is None else {"guidance": call("denoisers.guided", scale=3.0, null=null)}
    config.sampling.update(
        ema="average",
        solver=call("solvers.dpm_solver_pp", order=2),
        grid=call("timesteps.linspace", steps=25),
        transformations=guidance,
        condition=condition,
        decoder=told.get("autoencoder", {}).get("folder"),
        batch_size=16,
        picture_columns=4,
        picture_zoom=1,
    )
    return config
