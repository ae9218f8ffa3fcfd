"""A diffusion transformer on a folder of your own pictures, set up by what is found there.

    diffusion-jax train --config=image_folder:my_pictures --workdir=out/mine

Pictures in subfolders are classes; pictures with captions (NAME.txt beside NAME.jpg, metadata.jsonl, metadata.csv or
captions.csv) make a text-to-image model; other folders are learned without a condition. What was found and chosen is
printed, and every choice can be overridden:

    --config.data.size=32                 side in pixels (8 to 64, by the pictures); 128 needs --config.model.patch=8
    --config.data.channels=1              grey
    --config.data.fit=pad                 instead of "crop" (the middle); or "stretch"
    --config.data.on_error=skip           leaves pictures out that cannot be read
    --config.data.held_out=0.2            share of the pictures that is kept for validation and evaluation (0.1)
    --config.data.background=black        seen where a picture is transparent (white)
    --config.data.buckets=3               trains on three sizes of about the same area, for pictures of mixed aspects
    --config.train.transforms.flip.call=data.flip      mirrors half of them; off by default, since text and hands mirror

The network has 4 million parameters and at most 256 tokens a picture, so that a laptop can train it: between half a
step and one step a second with batches of 32 on two CPU cores, so about an hour and a half for all 3000 steps; minutes
on a GPU. Hundreds of pictures are memorised, thousands give new ones. For larger pictures train on latents
(`configs/latents.py`) or fine-tune a published checkpoint (`diffusion-jax finetune`).
"""

import os
import sys

from diffusion_jax import data
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import defaults

HELD_OUT = 0.1
PATCHES = {8: 1, 16: 2, 24: 2, 32: 2, 48: 4, 64: 4}
"""By side, so that a picture has 64 to 256 tokens."""


def get_config(folder: str = "") -> ConfigDict:
    if not folder:
        raise InvalidInput("Name the folder of your pictures: --config=image_folder:my_pictures.")
    found = data.folder_summary(os.path.abspath(os.path.expanduser(folder)))
    trained = round((1 - HELD_OUT) * found.count)
    # A power of two, which most numbers of devices divide.
    batch_size = 2 ** min(5, max(0, trained.bit_length() - 1))
    config = defaults(steps=3000, batch_size=batch_size)
    same = {"size": found.size, "channels": found.channels, "background": "white", "held_out": HELD_OUT}
    condition, conditions, null = None, (), None
    if found.captions:
        tokenizer = call("data.byte_tokenizer")
        config.data = call("data.captioned_folder", folder=found.folder, tokenizer=tokenizer, **same)
        conditions, null = (call("models.text", vocab_size=256),), {"tokens": 0, "tokens_mask": False}
        condition = call("data.conditions_of")
    else:
        config.data = call("data.image_folder", folder=found.folder, classes=bool(found.class_names), **same)
        if found.class_names:
            classes = len(found.class_names)
            conditions, null = (call("models.label", num_classes=classes),), {"label": classes}
            condition = call("data.cycled_labels", num_classes=classes)
    config.held_out = call("data.held_out")
    config.model = call(
        "models.dit",
        preset="S/2",
        patch=PATCHES[found.size],
        width=192,
        depth=6,
        heads=6,
        qk_norm=True,
        conditions=conditions,
        remat="dots_no_batch",
    )
    config.process = call("processes.rectified_flow")
    dropout = {} if null is None else {"cond_dropout": 0.1, "null": null}
    config.objective = call("objectives.denoising", draw=call("timesteps.logit_normal"), **dropout)
    rate = call("training.optimizers.cosine", peak=1e-3, warmup_steps=0.05)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.train.update(sample_every=500, validation_examples=64)
    guidance = {} if null is None else {"guidance": call("denoisers.guided", scale=2.0, null=null)}
    config.sampling.update(
        ema="average",
        solver=call("solvers.dpm_solver_pp", order=2),
        grid=call("timesteps.linspace", steps=20),
        transformations=guidance,
        condition=condition,
        batch_size=32,
        picture_columns=6,
        picture_zoom=max(1, 128 // found.size),
    )
    chosen = f"{found.size} x {found.size} pixels (--config.data.size)"
    held_out = f"{HELD_OUT:.0%} held out by their content (--config.data.held_out)"
    print(f"{found.told}\nunless overridden: {chosen}, {held_out}", file=sys.stderr)
    return config
