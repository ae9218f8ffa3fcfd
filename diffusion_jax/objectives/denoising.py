"""The denoising loss of every process: corrupt each example to a drawn time and ask the network what was clean.

For an example x0 with time t (any prefix shape) and noise eps,

    loss = mean over the data of  w_draw * weight(process, t) * (network(x_t, t, cond) - target(x0, eps, t))^2   (1)

and for tokens the likelihood of `entries.tokens` in place of the weighted square. Nothing here knows which prediction,
schedule or modality it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from diffusion_jax import timesteps
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.objectives.batches import drawn, drop_condition, example_keys, updated
from diffusion_jax.objectives.entries import EntryLoss, per_example, regression, tokens
from diffusion_jax.randomness import split
from diffusion_jax.time_axes import each, expand, fill
from diffusion_jax.typing import Aux, Network, Objective, TimestepDraw


def denoising(
    network: Network,
    process: Any,
    draw: TimestepDraw | Mapping[str, TimestepDraw] | None = None,
    weight: Callable[[Any, Any], Any] | None = None,
    t_shape: str | int = "batch",
    cond_dropout: float = 0.0,
    null: Mapping[str, Any] | None = None,
    train: bool = True,
) -> Objective:
    """Equation (1) as an `Objective` on batches `{"x0"}`, optionally with "cond", "index" and "missing".

    x0: `[B, ...]`, or a dict of those for a joint process. index: `[B]` global index of each example, to which all its
        noise belongs; 0 .. B - 1 when absent.
    missing: `{modality: bool [B]}`, examples that lack a modality of joint data: it is pure noise to the network, at
        t = 1, and has no loss; the mean is still over all examples.
    draw: which times are trained, uniform by default; for joint data one draw gives all modalities the same time, a
        dict of draws gives each its own.
    weight: `(process, t) -> weight` of t's shape, see `timesteps`; 1 by default. Tokens have their likelihood's own.
    t_shape: "batch" for one time per example, or over how many leading axes of the data times vary: 2 for `[B, F]`
        frames or `[B, N]` tokens.
    cond_dropout: share of examples whose condition is replaced by `null`, for classifier-free guidance.
    null: what replaces each entry of `cond`, e.g. `{"label": 10}`; entries that it lacks are kept.
    train: whether the network is in training mode; False for validation.

    A batch that holds "t" (and "t_weight") is trained at those times. Modalities of joint data are summed.
    Metrics: `mse` (`cross_entropy` for tokens), without weights. Per example: `loss` (weighted, but for the draw), `t`.

    Raises InvalidInput for a condition dropout without `null` or outside [0, 1].
    """
    gaussian, discrete = regression(weight), tokens()

    def entry(process, *args):
        return (discrete if hasattr(process, "log_prob") else gaussian)(process, *args)

    return objective(network, process, entry, draw, t_shape, cond_dropout, null, train)


def objective(
    network: Network,
    process: Any,
    entry: EntryLoss,
    draw: TimestepDraw | Mapping[str, TimestepDraw] | None = None,
    t_shape: str | int = "batch",
    cond_dropout: float = 0.0,
    null: Mapping[str, Any] | None = None,
    train: bool = True,
) -> Objective:
    """`denoising` with any entry loss; see `entries`."""
    draw = timesteps.uniform() if draw is None else draw
    axes = _axes(t_shape)
    if not 0 <= cond_dropout <= 1:
        raise invalid("cond_dropout", cond_dropout, "a share between 0 and 1 is needed")
    if cond_dropout and null is None:
        raise InvalidInput("cond_dropout needs null=, what replaces each entry of the condition: none was given.")

    def init(key, params, batch):
        return {name: d.init() for name, d in draw.items()} if isinstance(draw, Mapping) else draw.init()

    def prepare(state, batch, key):
        return drawn(draw, state, batch, key, axes)

    def loss(params, state, batch, key):
        batch = prepare(state, batch, key)
        x0, t = batch["x0"], fill(batch["t"], batch["x0"])
        noise_key, drop_key, network_key = split(example_keys(key, batch["index"]), 3)
        x_t, noise = process.corrupt(noise_key, x0, t)
        cond = drop_condition(drop_key, batch.get("cond"), null, cond_dropout)
        output, _ = network.apply(
            params, process.network_input(x_t, t), process.network_time(t), cond, train=train, key=network_key
        )

        def losses(x0, process, output, noise, x_t, t, draw_weight):
            weighted, name, plain, share = entry(process, output, x0, noise, x_t, t)
            shown = jnp.mean(plain) / jnp.maximum(jnp.mean(share), jnp.finfo(jnp.float32).tiny)
            return per_example(expand(draw_weight, weighted) * weighted), per_example(weighted), name, shown

        processes = getattr(process, "processes", process)
        results = each(losses, x0, processes, output, noise, x_t, t, batch["t_weight"])
        joint = isinstance(x0, Mapping)
        entries = results if joint else {"": results}
        total = sum(value[0] for value in entries.values())
        recorded = {name: value[1] for name, value in entries.items()}
        weighted = sum(recorded.values())
        state = updated(draw, state, batch["t"], recorded if isinstance(draw, Mapping) else weighted)
        metrics = {f"{kind}/{name}" if joint else kind: shown for name, (_, _, kind, shown) in entries.items()}
        return total, Aux(state, metrics, {"loss": weighted, "t": batch["t"]})

    return Objective(init, loss, prepare)


def _axes(t_shape: str | int) -> int:
    if t_shape == "batch":
        return 1
    if isinstance(t_shape, bool) or not isinstance(t_shape, int) or t_shape < 1:
        raise invalid("t_shape", t_shape, "'batch' or a number of leading axes (at least 1) is needed")
    return t_shape
