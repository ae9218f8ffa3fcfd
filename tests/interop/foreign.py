"""A made-up foreign layout of the text transformer, with every kind of row that a table can have."""

import jax.numpy as jnp

from diffusion_jax import models
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.fields import REQUIRED
from diffusion_jax.interop.tables import dense, vector

FIELDS = {"vocab_size": 12, "width": 16, "depth": 3, "heads": 2}


def fields(config, files):
    config.choice("act", ("gelu",))
    return {name: (config.layers if name == "depth" else config.whole)(name, REQUIRED) for name in FIELDS}


def table(module):
    block = "blocks/block"
    rows = vector("embed/embedding", "embed.weight")
    for part, name in enumerate("qkv"):
        rows |= dense(f"{block}/attention/attention/{name}", "layer.{}.qkv", part=part, parts=3)
    rows |= dense(f"{block}/attention/attention/out", "layer.{}.out")
    for branch in ("attention", "mlp"):
        part = ("attention", "mlp").index(branch)
        rows |= dense(f"{block}/{branch}/modulation/dense", "layer.{}.ada", part=part, parts=2)
    rows |= dense(f"{block}/mlp/feed_forward/up", "layer.{}.up") | dense(
        f"{block}/mlp/feed_forward/down", "layer.{}.down"
    )
    rows |= dense("condition/time/up", "layer.{}.time.0", copies=module.depth)
    rows |= dense("condition/time/down", "time.2")
    # Two parts of different lengths.
    rows |= dense("final_modulation/dense", "head", part=0, parts=2) | dense("final", "head", part=1, parts=2)
    return rows


def config(module):
    return {"_class_name": "Foreign", **{name: getattr(module, name) for name in FIELDS}}


def shapes(network):
    return models.param_shapes(network, (1, 4), dtype=jnp.int32)


FOREIGN = Family("diffusers", models.text_transformer, fields, table, config, shapes, ignored=(r"position_ids$",))
