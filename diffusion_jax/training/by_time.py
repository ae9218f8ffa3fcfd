"""The training loss by bins of t: which times are learned, in each record of the log.

It is part of the training step, from the times that a batch was trained at: no further evaluation and no work of the
host. A record is that of one batch; many records together tell how the loss depends on t.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

BINS = 8
"""Equal bins of [0, 1]; the held-out loss is evaluated at their middles."""


def sums_by_time(per_example: Mapping[str, Any]) -> dict[str, Any]:
    """`{modality: [2, BINS]}`: in each bin the sum of the losses and their number; "" for data that are one array.

    per_example: of an objective's `Aux`. `t` and `loss_at_t` have one shape, whatever that is (`[B]`, `[B, F]` of
    frames, `[B, N]` of tokens), and are dicts for joint data; without `loss_at_t` the `loss [B]` is that of t. Losses
    that are not finite do not count, as those of what is missing. Empty for objectives without times.
    """
    losses: Any = per_example.get("loss_at_t", per_example.get("loss"))
    t: Any = per_example.get("t")
    if losses is None or t is None:
        return {}
    if not isinstance(losses, Mapping):
        losses, t = {"": losses}, {"": t}
    times = t if isinstance(t, Mapping) else dict.fromkeys(losses, t)
    return {
        name: _sums(values, times[name])
        for name, values in losses.items()
        if not isinstance(times[name], Mapping) and jnp.shape(values) == jnp.shape(times[name])
    }


def _sums(losses: Any, t: Any) -> Any:
    # Not flattened: axes may be split over devices.
    losses = losses.astype(jnp.float32)
    place = jnp.clip((t * BINS).astype(jnp.int32), 0, BINS - 1)
    inside = (place[..., None] == jnp.arange(BINS)) & jnp.isfinite(losses)[..., None]
    axes = tuple(range(losses.ndim))
    return jnp.stack(
        [jnp.where(inside, losses[..., None], 0.0).sum(axis=axes), inside.sum(axis=axes, dtype=jnp.float32)]
    )


def means_by_time(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Scalars `loss/t=0.0625`, named by the middles of the bins (`loss/image/t=0.0625`); NaN where a bin is empty."""
    return {
        f"loss/{name}{'/' if name else ''}t={(i + 0.5) / BINS:.4g}": values[0, i] / values[1, i]
        for name, values in sums.items()
        for i in range(BINS)
    }


def without_empty(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a step without the bins of t in which no example was."""
    return {name: value for name, value in metrics.items() if value == value or not _NAME.fullmatch(name)}


def latest_curves(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Curves `{name: (times, losses)}` of a log: the training loss of its last fifth, by modality where there are
    several, and the last held-out loss."""
    trained = [record for record in records if any(_NAME.fullmatch(name) for name in record)]
    held_out = [record for record in records if any(_HELD_OUT.fullmatch(name) for name in record)]
    found: dict[str, dict[float, list[float]]] = {}
    for which, pattern, title in (
        (trained[len(trained) * 4 // 5 :], _NAME, "training"),
        (held_out[-1:], _HELD_OUT, "held out"),
    ):
        for record in which:
            for name, value in record.items():
                match = pattern.fullmatch(name)
                if match and isinstance(value, float):
                    curve = f"{title}, {match['modality']}" if match["modality"] else title
                    found.setdefault(curve, {}).setdefault(float(match["t"]), []).append(value)
    return {name: (sorted(bins), [sum(bins[t]) / len(bins[t]) for t in sorted(bins)]) for name, bins in found.items()}


_NAME = re.compile(r"loss/(?:(?P<modality>.+)/)?t=(?P<t>[\d.]+)")
_HELD_OUT = re.compile(f"validation/{_NAME.pattern}")
