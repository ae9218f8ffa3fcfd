"""Guidance whose second prediction is forecast: at a skipped step only the main one is computed.

The two predictions of guidance change during a run, but their difference changes much less (Lv et al. 2024,
FasterCache: the redundancy of classifier-free guidance). So the difference of the outputs is stored,

    d = output(guide) - output(main),        guide = output(main) + forecast(d) at skipped steps,              (1)

in some parameterisation. It is a transformation of `Branches`, hence every rule of guidance (linear, rescaled,
projected, CFG++), an interval, and a guide that is a second network work on it unchanged: `steered(reused_guide(...))`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.acceleration import forecasting
from diffusion_jax.acceleration.forecasting import Forecaster, Table, reuse
from diffusion_jax.acceleration.outputs import check_along, output_of, pair_of, parameterized
from diffusion_jax.acceleration.refresh import Refresh, RefreshHistory, after, coordinate, due, no_history
from diffusion_jax.denoisers import Branches, in_one_batch, linear_rule, steered
from diffusion_jax.denoisers.base import cost_like
from diffusion_jax.denoisers.conditions import check_null
from diffusion_jax.denoisers.scales import Scale
from diffusion_jax.processes import need_gaussian
from diffusion_jax.typing import Cost, Denoiser, Number, Prediction


class Guide(NamedTuple):
    """The carry. inner: the branches'. table: what is known of d. history: when the guide was evaluated.

    stale: whether the guide's part of `inner` missed the last call; `()` where the branches remember nothing.
    """

    inner: Any
    table: Table
    history: RefreshHistory
    stale: Any


def reused_guide(
    branches: Branches,
    refresh: Refresh,
    forecaster: Forecaster | None = None,
    *,
    prediction: str | None = None,
    along: str = "index",
) -> Branches:
    """`branches` whose guide is evaluated at the steps that `refresh` chooses, and forecast by (1) at the others.

    forecaster: what is made of the differences computed so far; `reuse()` when absent.
    prediction: the parameterisation of equation (1); the process's own when absent.
    along: what differences are a function of, one of `refresh.COORDINATES`.

    A skipped step costs what the main prediction costs. Where guidance itself leaves the guide out (an interval, a
    scale of 1), the differences are forgotten. A guide with a memory of its own that was left out starts afresh when it
    is asked again, as in every form of guidance. Raises InvalidInput for discrete processes.
    """
    process = branches.alone.process
    need_gaussian("reused_guide", process)
    check_along(along, process)
    forecaster = reuse() if forecaster is None else forecaster
    kept_as = parameterized(process, prediction)

    def init(params, x, cond):
        inner = branches.init(params, x, cond)
        stale = jnp.bool_(False) if jax.tree.leaves(inner) else ()
        return Guide(inner, forecasting.init(forecaster, x), no_history(), stale)

    def both(params, carry, x, step, cond):
        at = coordinate(along, step, process)
        now = due(refresh, step, carry.history)

        def ask(carry):
            inner, stale = carry.inner, carry.stale
            if not isinstance(stale, tuple):
                inner = jax.lax.cond(stale, lambda c: branches.renew(params, c, x, cond), lambda c: c, inner)
                stale = jnp.bool_(False)
            main, guide, inner = branches.both(params, inner, x, step, cond)
            first, second = (output_of(kept_as, answer, step.t) for answer in (main, guide))
            table = forecasting.update(forecaster, carry.table, jax.tree.map(jnp.subtract, second, first), at)
            return _plain(main), _plain(guide)._replace(extras={}), inner, table, stale

        def forecast(carry):
            main, inner = branches.main(params, carry.inner, x, step, cond)
            difference = forecasting.predict(forecaster, carry.table, at)
            output = jax.tree.map(jnp.add, output_of(kept_as, main, step.t), difference)
            guide = pair_of(kept_as, output, x, step.t)._replace(cost=Cost())
            stale = carry.stale if isinstance(carry.stale, tuple) else jnp.bool_(True)
            return _plain(main), _plain(guide), inner, carry.table, stale

        main, guide, inner, table, stale = jax.lax.cond(now, ask, forecast, carry)
        return main, guide, Guide(inner, table, after(carry.history, now), stale)

    def main(params, carry, x, step, cond):
        answer, inner = branches.main(params, carry.inner, x, step, cond)
        return answer, carry._replace(inner=inner)

    def renew(params, carry, x, cond):
        fresh = init(params, x, cond)
        return fresh._replace(inner=branches.renew(params, carry.inner, x, cond))

    def axes(carry):
        return Guide._make((branches.axes(carry.inner), forecasting.table_axes(), None, None))

    return Branches(branches.alone, init, both, main, renew, axes)


def guided_with_reuse(
    denoiser: Denoiser,
    scale: Scale = 3.0,
    null: Any = None,
    *,
    refresh: Refresh,
    forecaster: Forecaster | None = None,
    prediction: str | None = None,
    along: str = "index",
    interval: Sequence[Any] | None = None,
    interval_unit: str = "t",
    rescale: Number = 0.0,
) -> Denoiser:
    """`guided`, whose null branch is evaluated at the steps of `refresh`; with every step it is `guided` itself.

    With `every(2)` a run of S steps costs 3 S / 2 evaluations instead of 2 S. The first arguments and the last three
    are those of `guided`, the others those of `reused_guide`.
    """
    check_null(null)
    branches = reused_guide(in_one_batch(denoiser, null), refresh, forecaster, prediction=prediction, along=along)
    rule = linear_rule(denoiser.process, rescale)
    return steered(branches, rule, scale, interval=interval, interval_unit=interval_unit)


def _plain(prediction: Prediction) -> Prediction:
    return prediction._replace(cost=cost_like(prediction.cost))
