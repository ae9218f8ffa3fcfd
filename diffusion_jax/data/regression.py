"""Answers that follow from their condition: the smallest world in which a diffusion model is used as a predictor."""

import numpy as np

from diffusion_jax.data.sources import ArraySource, check_split
from diffusion_jax.errors import invalid


def smooth_function(
    split: str = "train", length: int = 100_000, inputs: int = 6, outputs: int = 2, waves: int = 8, seed: int = 0
) -> ArraySource:
    """`x0 [length, outputs]` is a smooth function of `cond["pooled"] [length, inputs]`, which is N(0, I).

    The function is a sum of `waves` sinusoids in random directions, whose outputs have variance 1; one per `seed`,
    which both splits share. Example i is a function of (seed, split, i).
    """
    check_split(split)
    if min(length, inputs, outputs, waves) < 1:
        raise invalid("length, inputs, outputs, waves", (length, inputs, outputs, waves), "each must be at least 1")
    world = np.random.default_rng((seed, 2))
    directions, phases = world.normal(0.0, 0.7 / inputs**0.5, (inputs, waves)), world.uniform(0.0, 2 * np.pi, waves)
    heights = world.standard_normal((waves, outputs))
    given = np.random.default_rng((seed, ("train", "test").index(split))).standard_normal((length, inputs))
    # Scaled by what the function is on points of its own, so that both splits share it.
    probe = np.sin(world.standard_normal((4096, inputs)) @ directions * 2 + phases) @ heights
    answers = (np.sin(given @ directions * 2 + phases) @ heights - probe.mean(axis=0)) / probe.std(axis=0)
    return ArraySource(answers.astype(np.float32), {"pooled": given.astype(np.float32)}, f"smooth function/{split}")
