"""The vocabulary that every package shares: shapes, `Step`, `Prediction`, `Denoiser`, `Solver`, `Network`, `Objective`.

Only types live here. A `NamedTuple` of pure functions is how this library spells an interface: anything that has
the right functions fits, nothing has to be subclassed or registered.

Shapes: `B` batch, `*prefix` the shape of a time, which is always a prefix of the shape of the data it belongs to
(`[]`, `[B]`, `[B, F]` frames, `[B, N]` tokens, `[B, H, W]`). Multi-modal data is a dict of arrays, and its time is
then a dict with the same keys.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

Number = int | float
"""A plain number, on which a program is specialised; what may be traced is an array."""

Data = Array | Mapping[str, Array]
"""Images `[B, H, W, C]`, video `[B, F, H, W, C]`, vectors `[B, D]`, tokens `int32 [B, N]`, or a dict of those."""

HostData = Data | np.ndarray | Mapping[str, Array | np.ndarray]
"""Data on the device, or of NumPy on the host."""

Time = Float[Array, "*prefix"] | Mapping[str, Float[Array, "..."]] | float
"""Diffusion time in [0, 1]: 0 is clean data, 1 is the prior."""

Keys = Key[Array, ""] | Key[Array, " B"]
"""One typed key, or one per sample: with one per sample, sample i does not depend on its neighbours."""

Params = PyTree
Condition = Mapping[str, Any] | None
"""What the network is told besides x and t: `label [B]`, `pooled [B, D]`, `context [B, M, D]`, `tokens [B, M]`, ..."""

Grid = Float[Array | np.ndarray, "..."]
"""Falling times of a run, `[S + 1]`, or the levels of a vector time, `[S + 1, B or 1, N]`."""

Times = Grid | Sequence[Number]
"""A grid where it is given: lists and tuples of numbers too."""

Plan = Grid | Mapping[str, Grid]
"""A grid, or one for each modality of joint data."""

Numbers = Array | np.ndarray | Sequence[Any]
"""What NumPy makes an array of."""

Shape = tuple[int, ...] | Mapping[str, tuple[int, ...]]
"""The shape of data, a dict of shapes for joint data."""

Batch = Mapping[str, Any]
"""What an objective is given: `x0`, optionally `cond`, `index [B]`, `missing`, `t`."""

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

    evaluations: Float[Array, ""] | np.floating | float = 0.0
    compute: Float[Array, ""] | np.floating | float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.evaluations + other.evaluations, self.compute + other.compute)


# NumPy scalars: importing must not ask for a device.
NO_COST = Cost(np.float32(0), np.float32(0))
ONE_EVALUATION = Cost(np.float32(1), np.float32(1))


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


@runtime_checkable
class Process(Protocol):
    """How data becomes noise, and what the network predicts about it. See `processes/`.

    Its attribute `kind`, a key of `processes.KINDS`, says what else a process of that kind has. It is asked for by
    `processes.kind_of`, which tells what is missing in one sentence, and so is no part of what is checked here.
    """

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


class Causal(NamedTuple):
    """How a causal network of clips attends over time: what keys and values can be kept of a block of frames.

    attend: path of the product attention. block, window: frames of a block, and blocks of the past that are seen.
    positions: in time, "rotary" or "none"; what is added to the tokens ("sincos") tells no distances.
    axes: of the rotary positions of its keys, time first. reference_at: where the first reference frame is in time.
    patch: side of a patch where all tokens of a frame attend together; 0 where attention is over time alone.
    """

    attend: str
    block: int
    window: int = 0
    positions: str = "none"
    axes: int = 1
    reference_at: float = -1.0
    patch: int = 0


class Anatomy(NamedTuple):
    """What methods must know of the module within a network, as plain data; each field has a value for "none".

    Paths are those of submodules, as in the parameters: `"condition/time"`.
    width: of the vector that conditions the blocks.
    axes: of x, with those of batch and channels.
    entrance: the layer that x enters, a dense one or a convolution. patch: side of the patches it reads. concat:
        channels of `cond["concat"]` that it reads behind those of x.
    stack: the one `layers.branches.Stack` that the residual stream passes through. depth: its blocks.
    cuts, tail: of a network that is no stack, modules of the residual stream where it may be cut: behind each of
        `cuts`, and before `tail`.
    last: the layers behind the stack, the output layer last.
    condition: what reads the condition and no x. time: the `TimeEmbedding`, which reads t alone.
    frequency_shift: of its sinusoids.
    enters: for keys of `cond`, the path where each enters.
    scanned: names of modules that are scanned over depth: what lies within has an axis for it in front.
    causal: of clips, block by block; see `Causal`.
    """

    width: int = 0
    axes: int = 0
    entrance: str = ""
    patch: int = 1
    concat: int = 0
    stack: str = ""
    depth: int = 0
    cuts: tuple[str, ...] = ()
    tail: str = ""
    last: tuple[str, ...] = ()
    condition: tuple[str, ...] = ()
    time: str = ""
    frequency_shift: float = 0.0
    enters: Mapping[str, str] = {}
    scanned: tuple[str, ...] = ("block",)
    causal: Causal | None = None


class Inside(NamedTuple):
    """The way to the module within a network, through whatever stands around it; `models.wrapped` makes it.

    run: (call, params, x, t, cond, train, key) -> (output, extras): the network's `apply` with
         `call(variables, edits, x, t, cond, train, key)` in the place of the module
    weights: the keys under which the module's parameters lie in those of the network
    collections: names of those that the network's own edits use
    bare: whether the network is its module and nothing more
    """

    run: Callable[..., tuple[Any, dict]]
    weights: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()
    bare: bool = False


class Network(NamedTuple):
    """A network as two pure functions.

    init:  (key, x, t, cond) -> params
    apply: (params, x, t, cond, train=False, key=None) -> (output, extras); `t` has a prefix shape of x, at least [B];
           `extras` is a dict of whatever else the network reports (empty when nothing).
    module: the linen module within. anatomy: what methods must know of it. inside: the way to it. They are None where
            there is none, and the network then cannot be opened.
    """

    init: Callable[..., Params]
    apply: Callable[..., tuple[Any, dict]]
    module: Any = None
    anatomy: Anatomy | None = None
    inside: Inside | None = None


BatchAxes = Callable[[Any], Any]
"""Where the batch stands in a state or a carry: a prefix tree of it, an axis or None a leaf, as `in_axes` of `vmap`.

None is for what all samples share and has one shape for any batch, such as a count of calls. Behind the batch follow
the other axes of the data, entries (frames, actions) first; an axis of size 1, or one that a leaf does not have,
broadcasts, as in times. What is merged with the batch comes second there, as in `[B F, N, C]`. `time_axes.batch_first`
is for states that have the batch first everywhere.
"""


class Denoiser(NamedTuple):
    """A network on its process, and whatever transformations have been nested around it.

    init:  (params, x, cond) -> carry        a pytree, `()` when stateless
    apply: (params, carry, x, step, cond) -> (Prediction, carry)
    process: the process whose noise this denoiser removes
    axes: (carry) -> where the batch stands in it, see `BatchAxes`; a carry without leaves needs none
    """

    init: Callable[[Params, Any, Any], Carry]
    apply: Callable[[Params, Carry, Any, Step, Any], tuple[Prediction, Carry]]
    process: Any
    axes: BatchAxes | None = None


Denoise = Callable[[Carry, Any, Step], tuple[Prediction, Carry]]
"""A denoiser with its parameters and condition bound: what a solver calls, as often as its method needs."""


class Solver(NamedTuple):
    """One reverse step.

    init: (process, x, grid) -> state            the history of multi-step methods, `()` when there is none
    step: (process, denoise, carry, state, x, step, key) -> (x, state, carry)
          `key` holds one key per sample, `[B]`, already folded with the step's index
    order: order of convergence of the method, for reports and tests
    axes: (state) -> where the batch stands in it, see `BatchAxes`; a state without leaves needs none
    """

    init: Callable[[Any, Any, Any], Any]
    step: Callable[[Any, Denoise, Carry, Any, Any, Step, Any], tuple[Any, Any, Carry]]
    order: int = 1
    axes: BatchAxes | None = None


class Aux(NamedTuple):
    """What a loss reports besides itself: the next objective state, scalar metrics, values per example `[B]` (of each
    time where there are several: `t` and `loss_at_t`), and whatever the network reported besides its output."""

    state: Any
    metrics: Mapping[str, Any]
    per_example: Mapping[str, Any]
    extras: Mapping[str, Any] = {}


class Frozen(NamedTuple):
    """A tree in an objective's state that does not learn: a teacher, a frozen base, an autoencoder, a reward model.

    Training keeps it apart: it is laid out on the mesh once, handed to each step, and neither checkpointed nor passed
    through what a step selects. It must be known when the objective's `init` is called, not computed by it.
    """

    value: Any


class Objective(NamedTuple):
    """A training loss.

    init: (key, params, batch) -> state       a pytree; trees that do not learn are wrapped in `Frozen`
    loss: (params, state, batch, key) -> (loss [B], Aux)     unreduced; `key` is already folded with the step
    prepare: (state, batch, key) -> batch     draws whatever must see the whole batch (stratified times); the step calls
             it once, before the batch is cut for gradient accumulation, and `loss` calls it itself if nobody has
    gradient: (params, state, batch, key) -> (loss [], gradient, Aux)     of an objective whose update is not the
             derivative of its mean loss, such as that of several tasks; by default it is that
    """

    init: Callable[..., Any]
    loss: Callable[..., tuple[Float[Array, " B"], Aux]]
    prepare: Callable[..., Any] | None = None
    gradient: Callable[..., Any] | None = None


class Quantile(NamedTuple):
    """A distribution of times as `t = function(u)` of uniform numbers u, monotone; numbers: `(key, shape) -> u`."""

    function: Callable[[Any], Any]
    numbers: Callable[..., Any]


class TimestepDraw(NamedTuple):
    """Which times are trained.

    init:   () -> state
    draw:   (state, key, shape) -> (t, weight)            `shape` is a prefix of the data's, e.g. (B,) or (B, F)
    update: (state, t, per_example_loss [B]) -> state      learns from the recorded losses; identity for most
    quantile: of a draw that is one, by which it is restricted to a range of times
    """

    init: Callable[[], Any]
    draw: Callable[..., tuple[Any, Any]]
    update: Callable[..., Any]
    quantile: Quantile | None = None
