"""Training inputs made of imperfect data, as the later steps of a run meet them, with the true data as the target.

A run noises nothing: at time t it holds what its own earlier answers made of x, errors included. Noising
`base = degrade(key, x0, t)` in the place of x0 shows the network such inputs (Pang et al. 2025, ADDP),

    x_t = alpha base + sigma eps,       target(x0, (x_t - alpha x0) / sigma).                                      (1)

The target's eps grows as alpha / sigma where base is not x0: train x0, or weigh low noise down
(`timesteps.soft_min_snr_weight`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from diffusion_jax.errors import InvalidInput
from diffusion_jax.objectives.batches import example_keys
from diffusion_jax.randomness import fold
from diffusion_jax.typing import Objective

Degrade = Callable[[Any, Any, Any], Any]
"""`(key, x0 [...], t) -> base [...]` of one example."""


def degraded(objective: Objective, degrade: Degrade) -> Objective:
    """`objective` on batches whose `base`, equation (1), is `degrade(key, x0, t)` at the times that it draws.

    objective: one that noises x0: `denoising`, `consistency`, `progressive`, `mean_flow`, `shortcut`, and what wraps
        them. degrade: of one example `[...]`, its t a scalar or what is left of a prefix of the data's shape; it is
        called with a key of the example, and may depend on nothing else. A batch that has a "base" keeps it.
    Raises InvalidInput for joint data, and for an objective that does not draw its times before the loss.
    """
    draw = objective.prepare
    if draw is None:
        raise InvalidInput("degraded needs an objective that draws times before its loss (Objective.prepare).")

    def prepare(state, batch, key):
        batch = draw(state, batch, key)
        if "base" in batch:
            return batch
        if isinstance(batch["x0"], Mapping):
            raise InvalidInput(f"degrade is for data of one array; these have {', '.join(sorted(batch['x0']))}.")
        keys = fold(example_keys(key, batch["index"]), 3)
        return {**batch, "base": jax.vmap(degrade)(keys, batch["x0"], batch["t"])}

    def loss(params, state, batch, key):
        return objective.loss(params, state, prepare(state, batch, key), key)

    def gradient(params, state, batch, key):
        assert objective.gradient is not None
        return objective.gradient(params, state, prepare(state, batch, key), key)

    return Objective(objective.init, loss, prepare, objective.gradient and gradient)
