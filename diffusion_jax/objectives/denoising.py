"""The denoising loss for every process: each example is noised to a drawn time, and the network predicts the target.

For an example x0 with time t (any prefix shape) and noise eps,

    loss = mean over the data of  w_draw * weight(process, t) * (network(x_t, t, cond) - target(x0, eps, t))^2   (1)

and for tokens the likelihood of `entries.tokens` in place of the weighted square. The code is the same for every type
of prediction, schedule and modality.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from diffusion_jax import timesteps
from diffusion_jax.clock import network_inputs
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.objectives.batches import (
    corrupted,
    distinct_draws,
    drawn,
    drop_condition,
    entry_weights,
    example_keys,
    updated,
)
from diffusion_jax.objectives.degradation import Degrade, degraded
from diffusion_jax.objectives.entries import EntryLoss, mean_at_times, per_example, regression, tokens
from diffusion_jax.processes import by_modality, is_discrete, is_gaussian, is_joint, with_condition
from diffusion_jax.randomness import split
from diffusion_jax.time_axes import each, expand, fill
from diffusion_jax.typing import Aux, Network, Objective, Process, TimestepDraw

NOISE_PREDICTIONS = ("epsilon", "score")
"""Predictions whose target does not contain the data."""


def denoising(
    network: Network,
    process: Process,
    draw: TimestepDraw | Mapping[str, TimestepDraw | str] | None = None,
    weight: Callable[[Any, Any], Any] | None = None,
    *,
    t_shape: str | int | Mapping[str, str | int] = "batch",
    cond_dropout: float = 0.0,
    null: Mapping[str, Any] | None = None,
    train: bool = True,
    modality_weights: Mapping[str, float | int] | None = None,
    missing_weight: float | int = 0.0,
    degrade: Degrade | None = None,
) -> Objective:
    """Equation (1) as an `Objective` on batches `{"x0"}`, optionally with "cond", "index", "weight" and "missing".

    x0: `[B, ...]`, or a dict of those for a joint process. index: `[B]` global index of each example, to which all its
        noise belongs; 0 .. B - 1 when absent.
    weight (of the batch): how much each entry of the data counts, of a prefix of its shape, such as `[B, H, W]`
        with 0 where a picture is not to be learned; `{modality: weight}` for joint data. The mean stays over all
        entries, and metrics without weights stay so.
    missing: `{modality: bool [B]}`, examples that lack a modality of joint data: it is pure noise to the network, at
        t = 1, and has no loss (see `missing_weight`); the mean is still over all examples.
    noise (of the batch): `[B, ...]` in the place of what would be drawn, such as that with which the run of a teacher
        began that ended in x0: training on such pairs straightens a flow (Liu et al. 2022, reflow).
    base (of the batch): `[B, ...]`, what is noised in the place of x0 while the target stays that of x0; for one array.
    draw: which times are trained, uniform by default; for joint data one draw gives all modalities the same time, a
        dict of draws gives each its own. A name in place of a draw is the time of that modality: with
        `{"image": uniform(), "vector": "image", "text": uniform()}` two parts of an image are noised together.
    weight: `(process, t) -> weight` of t's shape, see `timesteps`; 1 by default. Tokens have their likelihood's own.
    t_shape: "batch" for one time per example, or over how many leading axes of the data times vary: 2 for `[B, F]`
        frames or `[B, N]` tokens. With a dict of draws it may be a dict as well.
    cond_dropout: share of examples whose condition is replaced by `null`, for classifier-free guidance.
    null: what replaces each entry of `cond`, e.g. `{"label": 10}`; entries that it lacks are kept.
    train: whether the network is in training mode; False for validation.
    modality_weights: how much modalities of joint data count, 1 for those left out. The mean over its own entries makes
        modalities equal: under one mean over all entries each counts by their number.
    missing_weight: how much the loss of a missing modality counts. It is meant for noise predictions, whose target is
        known without the data: 1 as in UWM, where the network then repeats the noise that it sees.
    degrade: `(key, x0, t) -> base` of each example at its time; see `degraded`.

    A batch that holds "t" (and "t_weight") is trained at those times. Modalities of joint data are summed.
    Metrics: `mse` (`cross_entropy` for tokens), without weights. Per example: `loss` (weighted, but for the draw), `t`,
    and `loss_at_t`, the loss at each time of `t`, of its shape. Joint data has `mse/name` and `loss/name` too, where
    what is missing does not count; in `loss_at_t` it is NaN.

    Raises InvalidInput for a condition dropout without `null` or outside [0, 1], for weights that are negative or of
    unknown modalities, and for a missing_weight with another prediction than of noise.
    """
    gaussian, discrete = regression(weight), tokens()

    def entry(process, *args):
        return (discrete if is_discrete(process) else gaussian)(process, *args)

    return objective(
        network, process, entry, draw, t_shape=t_shape, cond_dropout=cond_dropout, null=null, train=train,
        modality_weights=modality_weights, missing_weight=missing_weight, degrade=degrade,
    )  # fmt: skip


def objective(
    network: Network,
    process: Process,
    entry: EntryLoss,
    draw: TimestepDraw | Mapping[str, TimestepDraw | str] | None = None,
    *,
    t_shape: str | int | Mapping[str, str | int] = "batch",
    cond_dropout: float = 0.0,
    null: Mapping[str, Any] | None = None,
    train: bool = True,
    modality_weights: Mapping[str, float | int] | None = None,
    missing_weight: float | int = 0.0,
    degrade: Degrade | None = None,
) -> Objective:
    """`denoising` with any entry loss; see `entries`."""
    draw = timesteps.uniform() if draw is None else draw
    axes = _axes(t_shape, draw)
    weights = _modality_weights(process, modality_weights, missing_weight)
    if not 0 <= cond_dropout <= 1:
        raise invalid("cond_dropout", cond_dropout, "a share between 0 and 1 is needed")
    if cond_dropout and null is None:
        raise InvalidInput("cond_dropout needs null=, what replaces each entry of the condition: none was given.")

    def init(key, params, batch):
        return (
            {name: d.init() for name, d in distinct_draws(draw).items()} if isinstance(draw, Mapping) else draw.init()
        )

    def prepare(state, batch, key):
        return drawn(draw, state, batch, key, axes, missing_weight)

    def loss(params, state, batch, key):
        batch = prepare(state, batch, key)
        x0, t = batch["x0"], fill(batch["t"], batch["x0"])
        noise_key, drop_key, network_key = split(example_keys(key, batch["index"]), 3)
        x_t, noise = corrupted(process, noise_key, batch, t)
        cond = drop_condition(drop_key, batch.get("cond"), null, cond_dropout)
        seen, cond = with_condition(process, cond)
        output, extras = network.apply(params, *network_inputs(seen, x_t, t), cond, train=train, key=network_key)

        def answered(x0, process, output, noise, x_t, t):
            return entry(process, output, x0, noise, x_t, t)

        def averaged(answer, draw_weight, weight, present, entry_weight, t):
            weighted, name, plain, share = answer
            weighted = weighted if weight == 1 else weight * weighted
            weighted = weighted if isinstance(entry_weight, float) else expand(entry_weight, weighted) * weighted
            shown = jnp.mean(present * plain) / jnp.maximum(jnp.mean(present * share), jnp.finfo(jnp.float32).tiny)
            recorded = per_example(weighted)
            at_t = recorded if jnp.ndim(t) == 1 else mean_at_times(weighted, t)
            return per_example(expand(draw_weight, weighted) * weighted), recorded, name, shown, at_t

        joint = isinstance(x0, Mapping)
        missing = batch.get("missing") or {}
        _check_known(process, missing, missing_weight)
        present = {name: 1.0 - jnp.asarray(missing[name]) if name in missing else 1.0 for name in x0} if joint else 1.0
        answers = each(answered, x0, by_modality(seen), output, noise, x_t, t)
        results = each(averaged, answers, batch["t_weight"], weights, present, entry_weights(batch), batch["t"])
        entries = results if joint else {"": results}
        total = sum((value[0] for value in entries.values()), start=jnp.zeros(()))
        recorded = {name: value[1] for name, value in entries.items()}
        # Draws ignore what is not finite: they learn nothing from what was not there.
        learned = {name: jnp.where(missing[name], jnp.nan, recorded[name]) for name in missing}
        at_t = {name: value[4] for name, value in entries.items()}
        at_t |= {name: jnp.where(expand(missing[name], at_t[name]), jnp.nan, at_t[name]) for name in missing}
        recorded |= {name: jnp.where(missing[name], 0.0, recorded[name]) for name in missing}
        weighted = sum(recorded.values())
        state = updated(draw, state, batch["t"], {**recorded, **learned} if isinstance(draw, Mapping) else weighted)
        metrics = {f"{kind}/{name}" if joint else kind: shown for name, (_, _, kind, shown, _) in entries.items()}
        by_name = {f"loss/{name}": value for name, value in recorded.items()} if joint else {}
        by_name |= {"loss_at_t": at_t if joint else at_t[""]}
        return total, Aux(state, metrics, {"loss": weighted, "t": batch["t"], **by_name}, extras)

    made = Objective(init, loss, prepare)
    return made if degrade is None else degraded(made, degrade)


def _modality_weights(process, weights, missing_weight):
    """A weight for each modality, or 1 for data that is one array."""
    processes = process.processes if is_joint(process) else {}
    for name, weight in (weights or {}).items():
        if name not in processes:
            raise unknown("a name in modality_weights", name, processes)
        if not weight >= 0:
            raise invalid(f"modality_weights[{name!r}]", weight, "it must not be negative")
    if not missing_weight >= 0:
        raise invalid("missing_weight", missing_weight, "it must not be negative")
    return {name: (weights or {}).get(name, 1.0) for name in processes} or 1.0


def _check_known(process, missing, missing_weight):
    """What is missing counts where its target is known: the noise is."""
    for name in missing if missing_weight else ():
        member = process.processes[name]
        if not is_gaussian(member) or member.prediction not in NOISE_PREDICTIONS:
            raise invalid(
                "missing_weight", missing_weight, f"the network predicts other things of {name!r} than noise: use 0"
            )


def _axes(t_shape, draw) -> int | dict[str, int]:
    if isinstance(t_shape, Mapping):
        if not isinstance(draw, Mapping) or set(t_shape) != set(draw):
            raise invalid("t_shape", dict(t_shape), "a dict needs a dict of draws for the same modalities")
        return {name: _leading_axes(axes) for name, axes in t_shape.items()}
    return _leading_axes(t_shape)


def _leading_axes(t_shape) -> int:
    if t_shape == "batch":
        return 1
    if isinstance(t_shape, bool) or not isinstance(t_shape, int) or t_shape < 1:
        raise invalid("t_shape", t_shape, "'batch' or a number of leading axes (at least 1) is needed")
    return t_shape
