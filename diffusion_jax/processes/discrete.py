"""Discrete processes: tokens are replaced at random, by a mask token (`Absorbing`) or by any token (`Uniform`).

A token is still what it was with probability alpha(t), independently of the others. Tokens are int32 `[B, N]` (or any
shape), t has a prefix of that shape, log-probabilities carry one more axis. A probability of zero is the logarithm
`LOG_ZERO`, finite so that `p log p` and gradients are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from diffusion_jax import randomness
from diffusion_jax.errors import invalid, unknown
from diffusion_jax.processes.keep import KEEP_SCHEDULES
from diffusion_jax.processes.schedules import as_time, check_time
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Keys, Prediction

LOG_ZERO = -1e6

TOKEN_NETWORK_TIMES = {
    "t": lambda process, t: t,
    "1000t": lambda process, t: 1000.0 * t,
    "log_snr": lambda process, t: jnp.clip(process.log_snr(t), -40.0, 40.0),
}
"""What a token network may be fed for t."""


def _log(probability):
    zero = probability <= 0
    return jnp.where(zero, LOG_ZERO, jnp.log(jnp.where(zero, 1.0, probability)))


def _log_one_hot(tokens, size):
    return jnp.where(tokens[..., None] == jnp.arange(size), 0.0, LOG_ZERO)


@dataclasses.dataclass(frozen=True)
class _Discrete:
    """What both kinds share: a vocabulary, a keep schedule, and what the network is fed for t.

    vocab_size: V, how many tokens the data has.
    schedule: keep probability alpha(t), a key of `KEEP_SCHEDULES` or an object of that kind.
    time: what the network is fed for t, a key of `TOKEN_NETWORK_TIMES`.
    """

    vocab_size: int
    schedule: Any = "linear"
    time: str = "1000t"
    kind = "discrete"

    def __post_init__(self):
        if self.vocab_size < 2:
            raise invalid("vocab_size", self.vocab_size, "a vocabulary needs at least 2 tokens")
        if self.time not in TOKEN_NETWORK_TIMES:
            raise unknown("time", self.time, TOKEN_NETWORK_TIMES)
        if isinstance(self.schedule, str):
            if self.schedule not in KEEP_SCHEDULES:
                raise unknown("schedule", self.schedule, KEEP_SCHEDULES)
            object.__setattr__(self, "schedule", KEEP_SCHEDULES[self.schedule]())

    def alpha(self, t: ArrayLike) -> Array:
        """The probability that a token has been kept until t; raises InvalidInput for a known t outside of [0, 1]."""
        check_time(t)
        return self.schedule.alpha(as_time(t))

    def sigma(self, t: ArrayLike) -> Array:
        """1 - alpha(t): the probability that it has been lost. Raises InvalidInput as `alpha` does."""
        check_time(t)
        return self.schedule.sigma(as_time(t))

    def log_snr(self, t: ArrayLike) -> Array:
        """log(alpha / (1 - alpha)). Raises InvalidInput as `alpha` does."""
        check_time(t)
        return self.schedule.log_snr(as_time(t))

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        """The t at which `log_snr(t)` is the given one; 1 where there is none, of more noise than t = 1 has."""
        return self.schedule.inverse_log_snr(as_time(log_snr))

    def _lost(self, key, x0, t):
        if not jnp.issubdtype(x0.dtype, jnp.integer):
            raise invalid("x0.dtype", str(x0.dtype), "a discrete process needs integer tokens")
        return randomness.uniform(key, x0.shape) < expand(self.sigma(t), x0)

    def network_input(self, x_t, t):
        """The tokens themselves."""
        return x_t

    def network_time(self, t):
        """What the network is fed for t; see `TOKEN_NETWORK_TIMES`. Raises InvalidInput as `alpha` does."""
        check_time(t)
        return TOKEN_NETWORK_TIMES[self.time](self, as_time(t))

    def target(self, x0, noise, t):
        """The clean tokens."""
        return x0

    def log_prob(self, prediction: Prediction, x0):
        """Log-probability of each clean token under the prediction, the shape of `x0`."""
        # What is no token, negative ones included, has the probability NaN and never that of another.
        tokens = jnp.where(x0 < 0, prediction.x0.shape[-1], x0)[..., None]
        return jnp.take_along_axis(prediction.x0, tokens, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]

    def _check_logits(self, logits, x_t, sizes):
        if logits.shape[:-1] != x_t.shape or logits.shape[-1] not in sizes:
            expected = " or ".join(str((*x_t.shape, size)) for size in sizes)
            raise invalid("network_output.shape", logits.shape, f"logits of the clean token must have shape {expected}")


@dataclasses.dataclass(frozen=True)
class Absorbing(_Discrete):
    """Tokens are lost to a mask token and stay there (Austin et al. 2021; Sahoo et al. 2024, MDLM; Shi et al. 2024).

    mask_id: the mask token; by default `vocab_size`, one past the data's tokens. An id inside the vocabulary (as LLaDA
        has it) is then never predicted. `num_states` counts the mask.
    """

    mask_id: int = None  # pyright: ignore[reportAssignmentType]  (an int from __post_init__ on)
    kind = "absorbing"

    def __post_init__(self):
        super().__post_init__()
        if self.mask_id is None:
            object.__setattr__(self, "mask_id", self.vocab_size)
        if not 0 <= self.mask_id <= self.vocab_size:
            raise invalid(
                "mask_id", self.mask_id, f"it must be a token, or vocab_size = {self.vocab_size} for a new one"
            )

    @property
    def num_states(self) -> int:
        """How many values a token of x_t may take: V + 1, or V when the mask is inside the vocabulary."""
        return max(self.vocab_size, self.mask_id + 1)

    def corrupt(self, key: Keys, x0, t):
        """`(x_t, lost)`: tokens, masked where the boolean `lost` is true. With one key, masks grow with t."""
        lost = self._lost(key, x0, t)
        return self.marginal(x0, lost, t), lost

    def marginal(self, x0, noise, t):
        """x0 masked where `noise` is true."""
        return jnp.where(noise, jnp.asarray(self.mask_id, x0.dtype), x0)

    def prior(self, key: Keys, shape):
        """All masks, int32."""
        return jnp.full(shape, self.mask_id, jnp.int32)

    def is_masked(self, x_t):
        """Where x_t is the mask."""
        return x_t == self.mask_id

    def predict(self, network_output, x_t, t) -> Prediction:
        """`x0`: float32 log-probabilities `[..., V]` from logits `[..., V]` (or `[..., num_states]`).

        The mask is never predicted, and tokens that are not masked are copied (Sahoo et al. 2024, section 3.2.3).
        """
        self._check_logits(network_output, x_t, sorted({self.vocab_size, self.num_states}))
        logits = network_output[..., : self.vocab_size].astype(jnp.float32)
        if self.mask_id < self.vocab_size:
            logits = jnp.where(jnp.arange(self.vocab_size) == self.mask_id, LOG_ZERO, logits)
        return self.from_x0(jax.nn.log_softmax(logits), x_t, t)

    def from_x0(self, x0, x_t, t) -> Prediction:
        """The prediction with clean log-probabilities `x0 [..., V]`, unmasked tokens copied over."""
        return Prediction(jnp.where(self.is_masked(x_t)[..., None], x0, _log_one_hot(x_t, self.vocab_size)))

    def posterior(self, x0, x_t, t, t_next):
        """log q(x_{t_next} | x_t, x0) averaged over `x0 [..., V]` log-probabilities: `[..., num_states]`, t_next <= t.

        A mask stays with probability `(1 - alpha_next) / (1 - alpha)`, else becomes a token drawn from x0.
        """
        lost, lost_next = self.sigma(t), self.sigma(t_next)
        stays = jnp.where(lost > 0, lost_next / jnp.where(lost > 0, lost, 1.0), 1.0)
        stays = jnp.broadcast_to(expand(stays, x_t), x_t.shape)[..., None]
        tokens = jnp.exp(x0) * (1.0 - stays)
        tokens = jnp.pad(tokens, [(0, 0)] * x_t.ndim + [(0, self.num_states - self.vocab_size)])
        unmasking = jnp.where(jnp.arange(self.num_states) == self.mask_id, stays, tokens)
        masked = self.is_masked(x_t)[..., None]
        return jnp.where(masked, _log(unmasking), _log_one_hot(x_t, self.num_states))

    def nelbo_weight(self, t: ArrayLike) -> Array:
        """`-alpha'(t) / (1 - alpha(t))`, any shape; 0 at t = 0.

        The negative ELBO of a sequence is the expectation over uniform t of this weight times the cross-entropy summed
        over the masked tokens (Shi et al. 2024, equation 5).
        """
        t = as_time(t)
        rate = jax.jvp(self.schedule.alpha, (t,), (jnp.ones_like(t),))[1]
        lost = self.sigma(t)
        return jnp.where(lost > 0, -rate / jnp.where(lost > 0, lost, 1.0), 0.0)


@dataclasses.dataclass(frozen=True)
class Uniform(_Discrete):
    """Tokens are lost to a token drawn uniformly (Austin et al. 2021, appendix A.2.1), perhaps the same one."""

    @property
    def num_states(self) -> int:
        """V."""
        return self.vocab_size

    def corrupt(self, key: Keys, x0, t):
        """`(x_t, noise)`; `noise` is the drawn token where one was lost and -1 where it was kept."""
        lost_key, token_key = randomness.split(key, 2)
        drawn = self.prior(token_key, x0.shape).astype(x0.dtype)
        noise = jnp.where(self._lost(lost_key, x0, t), drawn, -1)
        return self.marginal(x0, noise, t), noise

    def marginal(self, x0, noise, t):
        """x0 where `noise` is -1, else `noise`."""
        return jnp.where(noise >= 0, noise, x0)

    def prior(self, key: Keys, shape):
        """Uniform tokens, int32."""
        return randomness.draw_per_sample(jax.random.randint, key, shape, 0, self.vocab_size)

    def predict(self, network_output, x_t, t) -> Prediction:
        """`x0`: float32 log-probabilities `[..., V]` from logits `[..., V]`."""
        self._check_logits(network_output, x_t, [self.vocab_size])
        return self.from_x0(jax.nn.log_softmax(network_output.astype(jnp.float32)), x_t, t)

    def from_x0(self, x0, x_t, t) -> Prediction:
        """The prediction with clean log-probabilities `x0 [..., V]`."""
        return Prediction(x0)

    def posterior(self, x0, x_t, t, t_next):
        """log q(x_{t_next} | x_t, x0) averaged over `x0 [..., V]` log-probabilities: `[..., V]`, t_next <= t.

        Bayes: `q(x_t | x_next) q(x_next | x0) / q(x_t | x0)` for each clean token, then the mean over clean tokens.
        """
        keep, lost, keep_next, lost_next = (
            jnp.broadcast_to(expand(value, x_t), x_t.shape)[..., None]
            for value in (self.alpha(t), self.sigma(t), self.alpha(t_next), self.sigma(t_next))
        )
        size = self.vocab_size
        here = x_t[..., None] == jnp.arange(size)
        still = lost == lost_next
        # Where nothing moves any finite numbers do: at t = 0 those of the formula have an infinite derivative.
        keep, lost = jnp.where(still, 0.5, keep), jnp.where(still, 0.5, lost)
        tiny = jnp.finfo(keep.dtype).tiny
        weights = jnp.exp(x0) / jnp.maximum(keep * here + lost / size, tiny)
        # The step's own keep probability is keep / keep_next; the common factor 1 / keep_next cancels when normalised.
        likelihood = keep * here + (lost - lost_next) / size
        mass = likelihood * (keep_next * weights + lost_next / size * weights.sum(-1, keepdims=True))
        mass = mass / jnp.maximum(mass.sum(-1, keepdims=True), tiny)
        return jnp.where(still, _log_one_hot(x_t, size), _log(mass))


def absorbing(vocab_size: int, schedule: Any = "linear", mask_id: int | None = None, time: str = "1000t") -> Absorbing:
    """Masked diffusion over `vocab_size` tokens; see `Absorbing`.

    schedule: `linear`, `cosine`, `geometric` or an object such as `KeepPolynomial(eps=1e-3)`.
    """
    return Absorbing(vocab_size, schedule, time, vocab_size if mask_id is None else mask_id)


def uniform(vocab_size: int, schedule: Any = "linear", time: str = "1000t") -> Uniform:
    """Uniform-noise diffusion over `vocab_size` tokens; see `Uniform`."""
    return Uniform(vocab_size, schedule, time)
