"""A class-conditional transformer on handwritten digits of 8 x 8 pixels: the base model of cheaper sampling.

It predicts epsilon on the linear-beta process of DDPM, as the published ones do, and has eight blocks: deep enough for
a part of it to be left out, small enough to be trained in minutes.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config import call
from diffusion_jax.experiment import defaults

CLASSES = 10
NULL = {"label": CLASSES}


def digit_transformer(steps: int = 2000, **fields: Any) -> ConfigDict:
    """The config of the transformer, trained in about two minutes of one core; fields: of `models.dit` that differ."""
    config = defaults(steps=steps, batch_size=64)
    config.data = call("data.digits", split="train")
    config.held_out = call("data.digits", split="test")
    conditions = (call("models.label", num_classes=CLASSES),)
    size = {"preset": "S/2", "width": 64, "depth": 8, "heads": 4, "conditions": conditions, "qk_norm": True}
    config.model = call("models.dit", **{**size, **fields})
    config.process = call("processes.vp_linear")
    config.objective = call("objectives.denoising", draw=call("timesteps.stratified"), cond_dropout=0.1, null=NULL)
    rate = call("training.optimizers.cosine", peak=2e-3, total_steps=steps, warmup_steps=min(100, steps // 2))
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    return config


def tiny_digit_transformer(steps: int = 4, **fields: Any) -> ConfigDict:
    """What stands for it where a study only has to run: two narrow blocks, on one device; with 0 steps untrained."""
    config = digit_transformer(max(steps, 2), **{"width": 24, "depth": 2, "heads": 2, **fields})
    config.train.steps, config.ema = steps, {}
    config.optimizer = call("training.optimizers.sgd")
    config.mesh = call("distributed.make_mesh", devices=1)
    return config


GARMENTS_OF = {"train": 2000, "test": 500}
"""How many of Fashion-MNIST stand for the digits of a split."""


def on_garments(config: ConfigDict) -> ConfigDict:
    """The same with Fashion-MNIST, in 8 x 8 pixels and ten classes too, wherever `data.digits` is called."""

    def changed(entry):
        if isinstance(entry, Mapping):
            if entry.get("call") == "data.digits":
                split = entry.get("split", "train")
                return call("data.fashion_mnist", split=split, size=8, length=GARMENTS_OF[split]).to_dict()
            return {name: changed(value) for name, value in entry.items()}
        return tuple(map(changed, entry)) if isinstance(entry, tuple) else entry

    return ConfigDict(changed(config.to_dict()))
