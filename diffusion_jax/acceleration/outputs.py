"""Output caching: whole outputs are forecast, so a skipped step does not run the network at all.

A prediction is stored as the output of some parameterisation,

    y = output(x0, eps, t)        or, as a residual, y = output(x0, eps, t) - input(x, t),                     (1)

and a skipped step turns the forecast of y, and the x of that very step, into the pair (x0, eps) again. Since the pair
is found from x, it is consistent whatever y was kept, and the choice decides what is taken to be constant between two
refreshes: the velocity, the noise, the clean sample, or what the network adds to its input. Nothing is known of what
answers: networks, guided ones and exact denoisers are all alike.

With a solver that integrates the kept output (`velocity` by Euler in t, `epsilon` by DDIM), reuse of the output itself
is the plain solver on the grid of the computed steps alone; residuals are not.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.acceleration import forecasting
from diffusion_jax.acceleration.forecasting import Forecaster, Table, reuse
from diffusion_jax.acceleration.refresh import COORDINATES, Refresh, RefreshHistory, after, coordinate, due, no_history
from diffusion_jax.denoisers.base import cost_like, with_pair
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.processes import is_joint, members, need_gaussian
from diffusion_jax.time_axes import batch_axes, each
from diffusion_jax.typing import NO_COST, Denoiser, Prediction


class Outputs(NamedTuple):
    """The carry. inner: of the denoiser within. table: what is known of the output. history: when it was computed."""

    inner: Any
    table: Table
    history: RefreshHistory


class Correction(NamedTuple):
    """What a forecast output is wrong by, as a line through it: `slope * output + bias`, by step.

    slope, bias: `[S, ...]`; an entry broadcasts against the data from its last axis on: `[S]` or `[S, C]`.
    """

    slope: Any
    bias: Any


def cached_outputs(
    inner: Denoiser,
    refresh: Refresh,
    forecaster: Forecaster | None = None,
    *,
    prediction: str | None = None,
    residual: bool = False,
    along: str = "index",
    correction: Correction | Any = None,
) -> Denoiser:
    """`inner` at the steps that `refresh` chooses, and a forecast of its output at the others, without an evaluation.

    forecaster: how outputs are forecast from those computed so far; `reuse()` when absent.
    prediction: the parameterisation of equation (1), a key of `PARAMETERIZATIONS`; the process's own when absent.
    residual: stores the output minus the network's input, and adds the input of the skipped step.
    along: the coordinate in which outputs are extrapolated, one of `refresh.COORDINATES`.
    correction: `Correction`, a pair `(slope, bias)`, or for joint data a dict of them: subtracted from forecasts at the
        entry of `step.index`. Data, so another one compiles nothing.

    If every step is computed, predictions are those of `inner` bit for bit, without extras, which skipped steps lack.
    The decision is made for the whole batch, whatever the shape of t. The carry holds (order + 1) outputs. Raises
    InvalidInput for discrete processes, an unknown parameterisation, and a correction that is not by step.
    """
    need_gaussian("cached_outputs", inner.process)
    check_along(along, inner.process)
    forecaster = reuse() if forecaster is None else forecaster
    kept_as = parameterized(inner.process, prediction)
    correction = _checked(correction)

    def kept(prediction, x, t):
        output = output_of(kept_as, prediction, t)
        return (
            each(lambda y, x, process, t: y - process.network_input(x, t), output, x, kept_as, t)
            if residual
            else output
        )

    def answer(kept, x, step):
        def output(y, x, process, correction, t):
            y = y + process.network_input(x, t) if residual else y
            if correction is None:
                return y
            slope, bias = (jnp.take(leaf, step.index, axis=0, mode="clip") for leaf in correction)
            return y - (slope * y + bias)

        return pair_of(kept_as, each(output, kept, x, kept_as, correction, step.t), x, step.t)

    def init(params, x, cond):
        return Outputs(inner.init(params, x, cond), forecasting.init(forecaster, x), no_history())

    def apply(params, carry, x, step, cond):
        at = coordinate(along, step, inner.process)
        now = due(refresh, step, carry.history)

        def compute(carry):
            found, within = inner.apply(params, carry.inner, x, step, cond)
            table = forecasting.update(forecaster, carry.table, kept(found, x, step.t), at)
            return (found.x0, found.eps, cost_like(found.cost)), (within, table)

        def skip(carry):
            found = answer(forecasting.predict(forecaster, carry.table, at), x, step)
            return (found.x0, found.eps, NO_COST), (carry.inner, carry.table)

        (x0, eps, cost), (within, table) = jax.lax.cond(now, compute, skip, carry)
        return Prediction(x0, eps, {}, cost), Outputs(within, table, after(carry.history, now))

    def axes(carry):
        return Outputs._make((batch_axes(inner, carry.inner), forecasting.table_axes(), None))

    return Denoiser(init, apply, inner.process, axes)


def parameterized(process: Any, prediction: str | None) -> Any:
    """The process with another parameterisation (its own when None); a dict of processes for a joint one."""
    parts = {
        name: part if prediction is None else dataclasses.replace(part, prediction=prediction)
        for name, part in members(process).items()
    }
    return parts if is_joint(process) else parts[""]


def output_of(processes: Any, prediction: Prediction, t: Any) -> Any:
    """The network output that means `prediction`, of the process or dict that `parameterized` returned."""
    return each(
        lambda x0, eps, process, t: process.output(Prediction(x0, eps), t), prediction.x0, prediction.eps, processes, t
    )


def pair_of(processes: Any, output: Any, x: Any, t: Any) -> Prediction:
    """The pair (x0, eps) that an output means at (x, t): the inverse of `output_of`."""

    def pair(output, process, x, t):
        found = process.predict(output, x, t)
        return found.x0, found.eps

    return with_pair(Prediction(None), each(pair, output, processes, x, t))


def check_along(along: str, process: Any) -> None:
    """Raises InvalidInput for an unknown coordinate, and for log-SNRs of joint data, which has several."""
    if along not in COORDINATES:
        raise unknown("along", along, COORDINATES)
    if is_joint(process) and along == "log_snr":
        raise InvalidInput("along='log_snr' needs one noise level, but joint data has one a modality; use 't'.")


def _checked(correction):
    parts = correction if isinstance(correction, dict) else {"": correction}
    found = {}
    for name, part in parts.items():
        if part is not None:
            part = Correction(*(jnp.asarray(leaf, jnp.result_type(float)) for leaf in part))
            for field, leaf in part._asdict().items():
                if leaf.ndim < 1:
                    raise invalid(f"correction.{field}.shape", leaf.shape, "a value a step, [S, ...], was expected")
        found[name] = part
    return found if isinstance(correction, dict) else found[""]
