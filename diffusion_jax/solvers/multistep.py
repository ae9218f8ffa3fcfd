"""Multi-step methods: what is interpolated through the history of each entry of a vector of times (`history`).

A multi-step method integrates the polynomial P through the latest outputs m_0 (now), m_1, m_2, ... of the denoiser in
a coordinate c of time (lam, sigma/alpha, t, ...), in Newton's form with offsets `s_j = c(t_j) - c(t)`:

    P(s) = m_0 + sum_k [m_0 .. m_k] s (s - s_1) .. (s - s_(k-1)),                                              (1)
    x'   = alpha' x0 + sigma' eps + scale * sum_k [m_0 .. m_k] integral w(s) s (s - s_1) .. (s - s_(k-1)) ds   (2)

so that a lower order is (2) with fewer terms.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.processes.schedules import safe_sqrt
from diffusion_jax.solvers.base import difference, half_log_snr, hub_step, shrinkage
from diffusion_jax.solvers.history import History, with_history
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Solver, Step


class Node(NamedTuple):
    """An output to interpolate: `value` like x, its offset from the current coordinate, and whether it is usable."""

    value: Any
    offset: Any
    usable: Any


def past_nodes(history: History, coordinate: Any, base: Any, skip: int = 0) -> list[Node]:
    """The history as nodes relative to the coordinate `base`, leaving out the latest `skip`."""
    nodes = []
    for j, (value, t) in enumerate(zip(history.values, history.times)):
        if j < skip:
            continue
        real = history.count > j
        # An empty slot's time is 0, where a coordinate may be infinite: `difference` keeps it out of the arithmetic.
        offset, usable = difference(jnp.where(real, coordinate(t), jnp.inf), base)
        nodes.append(Node(value, offset, real & usable))
    return nodes


def attainable_order(nodes: Sequence[Node], order: Any) -> Any:
    """`order`, lowered where an entry has fewer usable nodes (nodes after an unusable one do not count)."""
    usable, available = True, 1
    for node in nodes:
        usable = usable & node.usable
        available = available + usable
    return jnp.minimum(order, available)


class Ending(NamedTuple):
    """How a multi-step method ends.

    lower_order_final: at most as many terms as an entry still has steps to make, this one included. An integer: only in
        runs of fewer steps than that (15 in diffusers, and none in longer runs).
    euler_at_final: the last step is of first order whatever the length of the run.
    idle_steps: how many steps at the end of the grid do not move; they count as steps that are left.
    """

    lower_order_final: bool | int = True
    euler_at_final: bool = False
    idle_steps: int = 0


def steps_left(step: Step) -> Any:
    """How many steps are left, this one included: of each entry where the loop counts them, else of the run."""
    return step.num_steps - step.index if step.remaining is None else step.remaining


def final_order(step: Step, order: int, ending: Ending, further: int = 0) -> Any:
    """`order`, lowered over the last steps as `ending` says, for an entry with `further` more steps to make."""
    remaining = steps_left(step) + further + ending.idle_steps
    short = ending.lower_order_final
    if not isinstance(short, bool):
        short = jnp.asarray(step.num_steps) < short
    wanted = jnp.where(short, jnp.minimum(order, remaining), order)
    if ending.euler_at_final:
        wanted = jnp.where(remaining <= 1, 1, wanted)
    return jnp.broadcast_to(wanted, jnp.shape(step.t)).astype(jnp.int32)


def phi(k: int, z: Any) -> Any:
    """phi_k(z) = sum_n z^n / (n + k)!, the functions of exponential integrators; phi_0 = exp."""
    small = jnp.abs(z) < 1.0
    near = jnp.where(small, z, 0.0)
    series = sum(near**n / float(math.factorial(n + k)) for n in range(17))
    far = jnp.where(small, 1.0, z)
    value = jnp.exp(far)
    for j in range(k):
        value = (value - 1.0 / math.factorial(j)) / far
    return jnp.where(small, series, value)


def exponential_moments(h: Any, count: int) -> list[Any]:
    """`integral_0^h exp(s - h) s^k ds` for k = 0 .. count."""
    return [h ** (k + 1) * math.factorial(k) * phi(k + 1, -h) for k in range(count + 1)]


def power_moments(h: Any, count: int) -> list[Any]:
    """`integral_0^h s^k ds` for k = 0 .. count."""
    return [h ** (k + 1) / (k + 1) for k in range(count + 1)]


def correction(value: Any, nodes: Sequence[Node], moments: Sequence[Any], order: Any, simple: Any = None) -> Any:
    """The sum of equation (2) up to `order`, entry by entry.

    value: m_0. moments: `integral w(s) s^k ds` for k = 0 .. len(nodes).
    simple: replaces the integral of the k = 1 term where the order is exactly 2 (published second-order forms).
    """
    total = jnp.zeros_like(value)
    # column[j] = [m_j .. m_k], the newest diagonal of the table of divided differences.
    points = [(0.0, value), *((node.offset, node.value) for node in nodes)]
    column = [value]
    polynomial = [1.0]
    for k, node in enumerate(nodes, start=1):
        active = order > k
        diagonal = [node.value]
        for j in range(k - 1, -1, -1):
            gap = points[k][0] - points[j][0]
            gap = jnp.where(active & (gap != 0), gap, 1.0)
            diagonal.insert(0, (diagonal[0] - column[j]) / expand(gap, value))
        column = diagonal
        # polynomial(s) * (s - s_(k-1)), coefficients of s^0, s^1, ...
        root = points[k - 1][0]
        shifted = [0.0, *polynomial]
        polynomial = [a - root * b for a, b in zip(shifted, [*polynomial, 0.0])]
        integral = sum(c * moment for c, moment in zip(polynomial, moments))
        if k == 1 and simple is not None:
            integral = jnp.where(order == 2, simple, integral)
        total = total + jnp.where(expand(active, value), expand(jnp.where(active, integral, 0.0), value) * column[0], 0)
    return total


class Frame(NamedTuple):
    """A step of one modality, ready for equation (2).

    coordinate: t -> c(t). scale, moments: those of the equation. simple: see `correction`. usable: whether c is finite
    at both ends of the step.
    """

    coordinate: Any
    scale: Any
    moments: list
    simple: Any
    usable: Any


THIRD_ORDERS = ("exact", "diffusers")


def exponential_frame(
    process: Any,
    t: Any,
    t_next: Any,
    count: int,
    prediction: str,
    *,
    tau: Any = 0.0,
    bh: str | None = "b2",
    third_order: str = "exact",
) -> Frame:
    """The exponential step in lam for `prediction` 'x0' or 'eps'; the two are mirror images (alpha, lam; sigma, -lam).

    With `tau` (x0 only) the weight is `(1 + tau^2) exp((1 + tau^2) (s - h))`, that of the SDE whose noise is tau times
    that of the reverse SDE. `bh` names B(h) in the second-order coefficient `h B(h) / 2`: 'b1' is h, 'b2' is
    `1 - exp(-h)`, None the exact integral. `third_order` is 'exact', or 'diffusers' for the weight that DPM-Solver's
    released code and diffusers give to the square of s in the parabola: half of the integral (of order h^3 off), and
    for the SDE half of it minus h^2.
    """
    coordinate = lam_coordinate(process, prediction)
    h, usable = difference(coordinate(t_next), coordinate(t))
    scale = process.alpha(t_next) if prediction == "x0" else process.sigma(t_next)
    stretch = 1.0 + tau**2
    moments = [m / stretch**k for k, m in enumerate(exponential_moments(stretch * h, count))]
    simple = {"b1": 0.5 * stretch * h**2, "b2": 0.5 * h * moments[0], None: None}[bh]
    if third_order == "diffusers" and count >= 2:
        moments[2] = 0.5 * moments[2] - (h**2 if tau else 0.0)
    return Frame(coordinate, scale, moments, simple, usable)


def lam_coordinate(process: Any, prediction: str) -> Callable[[Any], Any]:
    """lam for 'x0', -lam for 'eps': the coordinate in which the outputs are interpolated."""
    sign = 1.0 if prediction == "x0" else -1.0
    return lambda t: sign * half_log_snr(process, t)


def noisy_hub_step(process: Any, x0: Any, eps: Any, noise: Any, t: Any, t_next: Any, tau: Any) -> Any:
    """First-order step of the SDE with noise `tau`: `alpha' x0 + sigma' (d eps + sqrt(1 - d^2) noise)`.

    `d = exp(-tau^2 h)`. Exact for a frozen x0; `tau` is prefix-shaped or a number: 0 is the ODE, 1 the reverse SDE.
    """
    ratio, power = shrinkage(process, t, t_next), jnp.asarray(tau) ** 2
    # 0 to a power below 1 has an infinite derivative.
    kept = jnp.where((ratio == 0) & (power > 0), 0.0, jnp.where(ratio == 0, 1.0, ratio) ** power)
    sigma = process.sigma(t_next)
    fresh = sigma * safe_sqrt(jnp.clip(1.0 - kept**2, 0.0))
    mean = expand(process.alpha(t_next), x0) * x0 + expand(sigma * kept, x0) * eps
    return mean + expand(fresh, x0) * noise


def check_order(order: int, choices: Sequence[int]) -> None:
    """Raises `InvalidInput` unless `order` is one of `choices`."""
    if order not in choices:
        raise invalid("order", order, f"it must be one of {', '.join(map(str, choices))}")


def usable_order(frame: Frame, nodes: Sequence[Node], order: Any) -> Any:
    """The order that this step can have, entry by entry: 1 where the coordinate is infinite."""
    return jnp.where(frame.usable, attainable_order(nodes, order), 1)


def linear_multistep(
    name: str, order: int, frame: Any, prediction: str, ending: Ending, stochastic: bool = False
) -> Solver:
    """The solver of equation (2) with `order - 1` past outputs.

    frame: (process, t, t_next, count) -> Frame. prediction: what is interpolated, 'x0' or 'eps'.
    stochastic: takes the first-order part of the reverse SDE (tau = 1) instead of the ODE's.
    """

    def update(process, x, history, pair, step, noise):
        t, t_next = step.t, step.t_next
        value = pair.x0 if prediction == "x0" else pair.eps
        this = frame(process, t, t_next, order - 1)
        nodes = past_nodes(history, this.coordinate, this.coordinate(t))
        wanted = usable_order(this, nodes, final_order(step, order, ending))
        terms = correction(value, nodes, this.moments, wanted, this.simple)
        if stochastic:
            first = noisy_hub_step(process, pair.x0, pair.eps, noise, t, t_next, 1.0)
        else:
            first = hub_step(process, pair.x0, pair.eps, t_next)
        return first + expand(this.scale, x) * terms, value

    return with_history(update, order - 1, order=order, name=name, stochastic=stochastic)
