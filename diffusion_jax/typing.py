"""The vocabulary that every room shares: shapes, `Step`, `Prediction`, `Denoiser`, `Solver`, `Network`, `Objective`.

Only types live here. A `NamedTuple` of pure functions is how this library spells an interface: anything that has
the right functions fits, nothing has to be subclassed or registered.

Shapes: `B` batch, `*prefix` the shape of a time, which is always a prefix of the shape of the data it belongs to
(`[]`, `[B]`, `[B, F]` frames, `[B, N]` tokens, `[B, H, W]`). Multi-modal data is a dict of arrays, and its time is
then a dict with the same keys.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, Int, Key, PyTree

Data = Array | Mapping[str, Array]
"""Images `[B, H, W, C]`, video `[B, F, H, W, C]`, vectors `[B, D]`, tokens `int32 [B, N]`, or a dict of those."""

Time = Float[Array, "*prefix"] | Mapping[str, Float[Array, "..."]] | float
"""Diffusion time in [0, 1]: 0 is clean data, 1 is the prior."""

Keys = Key[Array, ""] | Key[Array, " B"]
"""One typed key, or one per sample: with one per sample, sample i does not depend on its neighbours."""

Params = PyTree
Condition = Mapping[str, Any] | None
"""What the network is told besides x and t: `label [B]`, `pooled [B, D]`, `context [B, M, D]`, `tokens [B, M]`, ..."""

Carry = PyTree


class Step(NamedTuple):
    """One step of a run as arrays, so that a whole run is one `lax.scan`.

    remaining: how many steps of non-zero length each entry of t still makes, this one included; None outside of a run.
    key: one key per sample `[B]` for denoisers that draw, the same at every step of a run; None outside of a run.
    """

    index: Int[Array, ""] | int
    t: Any
    t_next: Any
    num_steps: Int[Array, ""] | int
    remaining: Any = None
    key: Any = None


class Cost(NamedTuple):
    """What a prediction cost, per sample.

    evaluations: how many times a network was run (NFE).
    compute: the work done in units of one full forward pass; less than `evaluations` when parts were skipped.
    """

    evaluations: Float[Array, ""] | float = 0.0
    compute: Float[Array, ""] | float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.evaluations + other.evaluations, self.compute + other.compute)


class Counted(NamedTuple):
    """What the loop hands to a solver as the denoiser's carry: the carry itself and the cost of the run so far."""

    carry: Any
    cost: Cost


class Prediction(NamedTuple):
    """A denoiser's answer at (x_t, t): the hub pair through which every other parameterisation is derived.

    Gaussian processes: `x_t = alpha x0 + sigma eps` holds for the pair. Score and velocity are derived by the
    process (`process.score`, `process.velocity`), which knows alpha and sigma.
    Discrete processes: `x0` holds log-probabilities of the clean token, `[B, N, V]`, and `eps` is None.
    """

    x0: Any
    eps: Any = None
    extras: Any = {}
    cost: Cost = Cost()


class Process(Protocol):
    """How data becomes noise, and what the network predicts about it. See `processes/`."""

    def corrupt(self, key: Keys, x0: Data, t: Time) -> tuple[Data, Data]:
        """Draws `x_t` and returns it with the noise that was used."""
        ...

    def prior(self, key: Keys, shape: Any) -> Data:
        """Draws from the distribution at t = 1; `shape` includes the batch (a dict of shapes for joint data)."""
        ...

    def network_input(self, x_t: Data, t: Time) -> Data:
        """What the network is fed for `x_t`."""
        ...

    def network_time(self, t: Time) -> Time:
        """What the network is fed for `t`."""
        ...

    def predict(self, network_output: Any, x_t: Data, t: Time) -> Prediction:
        """Turns the network's output into the hub pair."""
        ...

    def target(self, x0: Data, noise: Data, t: Time) -> Data:
        """What the network's output is regressed to."""
        ...


class Network(NamedTuple):
    """A network as two pure functions; `module` is the linen module behind them, for interception.

    init:  (key, x, t, cond) -> params
    apply: (params, x, t, cond, train=False, key=None) -> (output, extras); `t` has a prefix shape of x, at least [B];
           `extras` is a dict of whatever else the network reports (empty when nothing).
    """

    init: Callable[..., Params]
    apply: Callable[..., tuple[Any, dict]]
    module: Any = None


class Denoiser(NamedTuple):
    """A network on its process, and whatever transformations have been nested around it.

    init:  (params, x, cond) -> carry        a pytree, `()` when stateless
    apply: (params, carry, x, step, cond) -> (Prediction, carry)
    process: the process whose noise this denoiser removes
    """

    init: Callable[[Params, Any, Any], Carry]
    apply: Callable[[Params, Carry, Any, Step, Any], tuple[Prediction, Carry]]
    process: Any


Denoise = Callable[[Carry, Any, Step], tuple[Prediction, Carry]]
"""A denoiser with its parameters and condition bound: what a solver calls, as often as its method needs."""


class Solver(NamedTuple):
    """One reverse step.

    init: (process, x, grid) -> state            the history of multi-step methods, `()` when there is none
    step: (process, denoise, carry, state, x, step, key) -> (x, state, carry)
          `key` holds one key per sample, `[B]`, already folded with the step's index
    order: order of convergence of the method, for reports and tests
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Any, Carry]]
    order: int = 1


class Aux(NamedTuple):
    """What a loss reports besides itself: the next objective state, scalar metrics, values per example `[B]`, and
    whatever the network reported besides its output."""

    state: Any
    metrics: Mapping[str, Any]
    per_example: Mapping[str, Any]
    extras: Mapping[str, Any] = {}


class Objective(NamedTuple):
    """A training loss.

    init: (key, params, batch) -> state
    loss: (params, state, batch, key) -> (loss [B], Aux)     unreduced; `key` is already folded with the step
    prepare: (state, batch, key) -> batch     draws whatever must see the whole batch (stratified times); the step calls
             it once, before the batch is cut for gradient accumulation, and `loss` calls it itself if nobody has
    """

    init: Callable[..., Any]
    loss: Callable[..., tuple[Float[Array, " B"], Aux]]
    prepare: Callable[..., Any] | None = None


class TimestepDraw(NamedTuple):
    """Which times are trained.

    init:   () -> state
    draw:   (state, key, shape) -> (t, weight)            `shape` is a prefix of the data's, e.g. (B,) or (B, F)
    update: (state, t, per_example_loss [B]) -> state      learns from the recorded losses; identity for most
    """

    init: Callable[[], Any]
    draw: Callable[..., tuple[Any, Any]]
    update: Callable[..., Any]


def is_key(value: Any) -> bool:
    """Whether `value` is a typed key array (`jax.random.key`)."""
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
