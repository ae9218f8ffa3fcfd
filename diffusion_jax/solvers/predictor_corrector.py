"""Predictor-corrector methods without extra evaluations: UniPC (ODE) and SA-Solver (SDE).

The output at the predicted point serves twice: to correct the step that led there, and to predict the next one. Both
are the exponential step in lam on x0 of `multistep`, with the new output as one more node of the polynomial.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from diffusion_jax.errors import invalid, unknown
from diffusion_jax.randomness import normal_like
from diffusion_jax.solvers.base import difference, per_modality
from diffusion_jax.solvers.history import History, empty_history, init_per_modality, push
from diffusion_jax.solvers.multistep import (
    Ending,
    Node,
    check_order,
    correction,
    exponential_frame,
    final_order,
    noisy_hub_step,
    past_nodes,
    usable_order,
)
from diffusion_jax.time_axes import batch_first, expand, where
from diffusion_jax.typing import Solver

UNIPC_VARIANTS = ("b1", "b2")
PREDICTIONS = ("x0", "eps")


class Predicted(NamedTuple):
    """What the corrector needs of the last step that an entry made.

    history: outputs before it, the one it started from first. added: what its predictor added to the first-order step;
    the corrector takes that back and adds its own, so that noise, and whatever was done to x in between, stays.
    order: of its corrector. tau: its noise. order and tau are prefix-shaped.
    """

    history: History
    added: Any
    order: Any
    tau: Any


def unipc(
    order: int = 2,
    variant: str = "b2",
    lower_order_final: bool | int = True,
    prediction: str = "x0",
    disable_corrector: tuple[int, ...] = (),
) -> Solver:
    """UniPC-p (Zhao et al. 2023): predictor UniP-p and corrector UniC-p on x0 or eps; one evaluation a step.

    order: p = 1, 2 or 3; with the corrector the method converges at order p + 1 once its start is accurate.
    variant: B(h) of the paper, which matters where p nodes leave a choice: 'b1' is h, 'b2' is `exp(h) - 1` (here
        `1 - exp(-h)`, as x0 is interpolated). The last step is not corrected: nothing is evaluated at its end.
    lower_order_final: lowers the order over the last steps; an integer: in runs of fewer steps than that.
    prediction: what is interpolated, 'x0' or 'eps'. disable_corrector: indices of steps that are not corrected.
    Raises InvalidInput for values outside of these.
    """
    check_order(order, (1, 2, 3))
    if variant not in UNIPC_VARIANTS:
        raise unknown("variant", variant, UNIPC_VARIANTS)
    if prediction not in PREDICTIONS:
        raise unknown("prediction", prediction, PREDICTIONS)
    return _predictor_corrector(
        "unipc", order, order, variant, Ending(lower_order_final),
        noise_at=lambda t: jnp.zeros_like(t), stochastic=False,
        prediction=prediction, disable_corrector=tuple(disable_corrector),
    )  # fmt: skip


def sa_solver(
    order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    interval: tuple[float, float] = (0.2, 0.8),
    lower_order_final: bool | int = True,
    variant: str | None = None,
) -> Solver:
    """SA-Solver (Xue et al. 2023): stochastic Adams predictor and corrector with noise tau inside an interval of t.

        dx0-exponential step of the SDE whose noise is tau times that of the reverse SDE, constant within a step

    order: outputs in the predictor, 1 to 3. corrector_order: outputs in the corrector, the new one included, 2 to 4;
    0 for none. tau = 0 is an ODE method, 1 the reverse SDE. One evaluation a step, one noise for both halves.
    lower_order_final: as for `unipc`. variant: B(h) of two-term sums, 'b1' (the authors' code and diffusers) or 'b2' as
        in `unipc`; None is the exact integral.
    Raises InvalidInput for values outside of these.
    """
    check_order(order, (1, 2, 3))
    if corrector_order not in (0, 2, 3, 4):
        raise invalid("corrector_order", corrector_order, "it must be 0 (no corrector), 2, 3 or 4")
    if tau < 0:
        raise invalid("tau", tau, "it must not be negative; 0 is deterministic")
    if variant is not None and variant not in UNIPC_VARIANTS:
        raise unknown("variant", variant, UNIPC_VARIANTS)
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise invalid("interval", interval, "it must be two times (low, high) in [0, 1]")

    def noise_at(t):
        return jnp.where((t >= low) & (t <= high), tau, 0.0).astype(t.dtype)

    length = max(order - 1, corrector_order - 1, 1)
    solver = _predictor_corrector(
        "sa_solver", order, length, variant, Ending(lower_order_final),
        noise_at=noise_at, stochastic=tau > 0, corrector_order=corrector_order,
    )  # fmt: skip
    return solver._replace(order=order if tau == 0 else 1)


def _predictor_corrector(
    name, order, length, variant, ending, *, noise_at, stochastic, corrector_order=None, prediction="x0",
    disable_corrector=(),
):  # fmt: skip
    """corrector_order: outputs in the corrector; None is one more than the predictor's (UniC-p), 0 is no corrector."""

    def empty(x, t):
        history = empty_history(x, t, length)
        return Predicted(history, jnp.zeros_like(x), jnp.ones(jnp.shape(t), jnp.int32), jnp.zeros_like(t))

    def corrected(process, x, last, value, t):
        """x after correcting the last step with the output at its end, and where there was something to correct."""
        start = last.history.times[0]
        count = length if corrector_order is None else corrector_order - 1
        frame = exponential_frame(process, start, t, count, prediction, tau=last.tau, bh=variant)
        base = frame.coordinate(start)
        offset, distinct = difference(frame.coordinate(t), base)
        usable = frame.usable & distinct & (last.history.count > 0)
        nodes = [Node(value, offset, usable), *past_nodes(last.history, frame.coordinate, base, skip=1)][:count]
        attained = usable_order(frame, nodes, last.order)
        terms = correction(last.history.values[0], nodes, frame.moments, attained, frame.simple)
        return where(usable, x - last.added + expand(frame.scale, x) * terms, x), usable

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)
        noise = normal_like(key, x) if stochastic else x

        def update(process, x, last, answer, noise, step):
            (x0, eps), t, t_next = answer[:2], step.t, step.t_next
            value = x0 if prediction == "x0" else eps
            if corrector_order != 0:
                moved, changed = corrected(process, x, last, value, t)
                if disable_corrector:
                    changed = changed & ~jnp.isin(step.index - 1, jnp.asarray(disable_corrector))
                x = where(changed, moved, x)
                # The half of the pair that is not interpolated follows from the corrected x.
                if prediction == "x0":
                    eps = where(changed & (process.sigma(t) != 0), process.from_x0(x0, x, t).eps, eps)
                else:
                    x0 = where(changed & (process.alpha(t) != 0), process.from_eps(eps, x, t).x0, x0)
            tau = noise_at(t)
            frame = exponential_frame(process, t, t_next, order - 1, prediction, tau=tau, bh=variant)
            nodes = past_nodes(last.history, frame.coordinate, frame.coordinate(t))[: order - 1]
            this = usable_order(frame, nodes, final_order(step, order, ending))
            corrects = this + 1 if corrector_order is None else final_order(step, corrector_order, ending, further=1)
            first = noisy_hub_step(process, x0, eps, noise if stochastic else jnp.zeros_like(x), t, t_next, tau)
            added = expand(frame.scale, x) * correction(value, nodes, frame.moments, this, frame.simple)
            moves = t != t_next
            state = Predicted(
                push(last.history, value, t, moves),
                where(moves, added, last.added),
                jnp.where(moves, corrects, last.order),
                jnp.where(moves, tau, last.tau),
            )
            return first + added, state

        x, state = per_modality(update, process, x, state, answer, noise, step)
        return x, state, carry

    return Solver(init_per_modality(name, empty), step, order + 1, batch_first)
