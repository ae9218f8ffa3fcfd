"""Masked diffusion of tokens: its likelihood bound and its plain cross-entropy."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.objectives.denoising import objective
from diffusion_jax.objectives.entries import tokens
from diffusion_jax.typing import Network, Objective, Process, TimestepDraw


def masked(
    network: Network,
    process: Process,
    draw: TimestepDraw | None = None,
    weighting: str = "nelbo",
    *,
    t_shape: str | int = "batch",
    cond_dropout: float = 0.0,
    null: Mapping[str, Any] | None = None,
    train: bool = True,
) -> Objective:
    """Loss of a network of logits `[B, N, V]` on tokens `int32 [B, N]` of a discrete process.

    weighting: `nelbo`, an upper bound of `-log p(x0)` in nats per token (Sahoo et al. 2024, equation 10), or
        `cross_entropy`, the mean over lost tokens (Chang et al. 2022, equation 3), which is also for processes that are
        not absorbing.
    The rest as in `denoising`. Metrics: `cross_entropy` per lost token.

    Raises InvalidInput for an unknown weighting, or for `nelbo` with a process that is not absorbing.
    """
    options = {"t_shape": t_shape, "cond_dropout": cond_dropout, "null": null, "train": train}
    return objective(network, process, tokens(weighting), draw, **options)
