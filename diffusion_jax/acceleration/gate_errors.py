"""What a gate measured during a run, and how good its forecasts were: for choosing a threshold.

A gate uses the forecast of the last block if the forecast of the first one was good. Whether one error predicts the
other is measured here: the true features of a recorded run are computed at every step, while the tables are updated
only at the steps where the run updated them,

    e_i = mean |y_i - forecast of y_i| / mean |y_i|        for the head's and for the last block's y          (1)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from diffusion_jax.acceleration import forecasting
from diffusion_jax.acceleration.forecasting import Forecaster
from diffusion_jax.acceleration.gated import relative_error
from diffusion_jax.clock import as_grid, network_inputs, num_steps
from diffusion_jax.denoisers import recorded
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models import Staged, staged
from diffusion_jax.sampling import Samples, sample
from diffusion_jax.typing import Condition, Denoiser, Keys, Network, Params, Solver, Times


class GateTrace(NamedTuple):
    """A gated run by step. x: the inputs. full: whether everything was computed. error: what the gate measured.

    samples: the run itself, with its cost.
    """

    x: Float[Array, "S B ..."]
    full: Bool[Array, " S"]
    error: Float[Array, " S"]
    samples: Samples


def record_gate(key: Keys, denoiser: Denoiser, params: Params, solver: Solver, grid: Times, **start: Any) -> GateTrace:
    """Runs a gated denoiser, or one around it (guidance), and keeps what its gate saw and decided.

    The arguments are those of `sampling.sample`. Pure: jit it with the threshold as an argument, and one program serves
    all. Decided by the sample, `full` and `error` are `[S, B]`. Raises InvalidInput for a denoiser without a gate.
    """

    def read(prediction, x, step):
        if "gate_full" not in prediction.extras:
            raise InvalidInput("record_gate needs a gate: the denoiser reports no extras['gate_full'].")
        return x, prediction.extras["gate_full"], prediction.extras["gate_error"]

    found = sample(key, recorded(denoiser, num_steps(as_grid(grid)), read), params, solver, grid, **start)
    x, full, error = found.run.carry.values
    return GateTrace(x, full, error, found)


def forecast_errors(
    network: Network | Staged,
    process: Any,
    params: Params,
    trace: GateTrace,
    grid: Times,
    cond: Condition = None,
    *,
    probe: Forecaster,
    last: Forecaster,
    head: int = 1,
) -> tuple[Float[Array, " S"], Float[Array, " S"]]:
    """Equation (1) at every step of a recorded run, of the head and of the last block: infinite before the first value.

    network, process, probe, last, head: as they were given to `gated`; the run must be the gate's own, not one of
    guidance around it, whose questions are others. Costs S evaluations. Raises InvalidInput for a run that was decided
    by the sample.
    """
    if jnp.ndim(trace.full) != 1:
        raise invalid("trace.full.shape", jnp.shape(trace.full), "one decision a step, [S], was expected")
    stages = network if isinstance(network, Staged) else staged(network, head)
    forecasters = probe, last

    def features(x, t):
        inputs = (*network_inputs(process, x, t), cond)
        h = stages.head(params, *inputs)
        return h, stages.body(params, h, *inputs)

    def body(tables, entry):
        index, x, t, now = entry
        errors, new = [], []
        for forecaster, table, value in zip(forecasters, tables, features(x, t)):
            error = relative_error(forecasting.predict(forecaster, table, index), value, value)
            errors.append(jnp.where(table.count == 0, jnp.inf, error))
            fresh = forecasting.update(forecaster, table, value, index)
            new.append(jax.tree.map(lambda a, b: jnp.where(now, a, b), fresh, table))
        return tuple(new), tuple(errors)

    shapes = jax.eval_shape(features, trace.x[0], jnp.float32(0))
    tables = tuple(forecasting.init(forecaster, one) for forecaster, one in zip(forecasters, shapes))
    entries = jnp.arange(len(trace.x)), trace.x, jnp.asarray(grid)[:-1], trace.full
    return jax.lax.scan(body, tables, entries)[1]


def gate_agreement(errors: tuple[Any, Any], full: Any) -> float:
    """Spearman's rank correlation of both errors over the steps that were skipped: 1 where the gate ranks them right.

    errors: of `forecast_errors`. 0 where fewer than three steps were skipped, or one of the errors does not vary.
    """
    from scipy.stats import spearmanr

    probe, last = (np.asarray(one)[~np.asarray(full)] for one in errors)
    if len(probe) < 3 or np.ptp(probe) == 0 or np.ptp(last) == 0:
        return 0.0
    return float(np.asarray(spearmanr(probe, last))[0])
