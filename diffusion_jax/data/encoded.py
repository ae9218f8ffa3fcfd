"""Data in a latent space: every example of a source as an autoencoder has it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from diffusion_jax.data.sources import ArraySource, BatchSource, Indices, Source
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models import LatentSpace, latent_space, principal_components

KNOWN = ("num_classes", "vocab_size", "tokenizer", "class_names")


def stacked_examples(source: Source, indices: Indices) -> dict:
    """The examples of `source` at `indices`, stacked."""
    if isinstance(source, BatchSource):
        return source.take(np.asarray(indices))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(source[int(i)] for i in indices))


def encoded(
    source: Source, encode: Callable[[Any], Any], batch: int = 256, conditions: Sequence[str] = ()
) -> ArraySource:
    """All examples of `source` with `encode(x0)` in the place of x0, with their conditions, in memory.

    encode: x0 `[batch, ...]` (or a dict of those) to latents; every call has this many examples, so it compiles once.
    conditions: those that are encoded too, being such as x0 is.
    """
    if batch < 1:
        raise invalid("batch", batch, "it must be positive")
    if "weight" in source[0]:
        raise InvalidInput("The source weighs its pixels ('weight'), which latents have none of: leave the weight out.")
    if beside := sorted(source[0].keys() - {"x0", "cond", "weight"}):
        raise InvalidInput(f"The source has {beside} beside x0, which belong to it and not to its latents.")
    parts = []
    for start in range(0, len(source), batch):
        # The last ones are repeated until the batch is full.
        rows = np.minimum(np.arange(start, start + batch), len(source) - 1)
        there, part = min(batch, len(source) - start), stacked_examples(source, rows)
        cond = part.get("cond", {})
        for name in conditions:
            if name not in cond:
                raise invalid("conditions", tuple(conditions), f"the source has {sorted(cond)}")
        cond = {**cond, **{name: jax.device_get(encode(cond[name])) for name in conditions}}
        latents = {"x0": jax.device_get(encode(part["x0"])), "cond": cond}
        parts.append(jax.tree.map(lambda leaf, there=there: np.asarray(leaf)[:there], latents))
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    known: dict[str, Any] = {name: getattr(source, name, None) for name in KNOWN}
    return ArraySource(whole["x0"], whole["cond"], f"latents of {getattr(source, 'name', 'a source')}", **known)


@dataclass(frozen=True, eq=False)
class PrincipalLatents(ArraySource):
    """Latents, and the space that they lie in; see `principal_latents`."""

    space: LatentSpace = field(kw_only=True)


def principal_latents(source: Source, components: int, tokens: int | None = None, first: int = 500) -> PrincipalLatents:
    """`source` in the space of its principal components (`models.principal_components`).

    source: pictures `[H, W, C]`, or clips of them `[F, H, W, C]`, which become one token a frame.
    first: of so many first examples the components are found.
    The result's `space` encodes other data and decodes samples. The same call of a source that can be compared (each
    generated world) gives the same object, so the experiments of a study share it.
    """
    try:
        hash(source)
    except TypeError:
        return _in_components(source, components, tokens, first)
    return _kept(source, components, tokens, first)


def _in_components(source, components, tokens, first):
    pictures = stacked_examples(source, range(min(first, len(source))))["x0"]
    space = latent_space(*principal_components(pictures.reshape(-1, *pictures.shape[-3:]), components, tokens))
    whole = encoded(source, space.encode)
    return PrincipalLatents(**vars(whole), space=space)


_kept = functools.lru_cache(maxsize=4)(_in_components)
