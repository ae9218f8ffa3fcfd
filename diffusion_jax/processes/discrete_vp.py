"""Variance-preserving schedules given by a table of betas, and the tables of the literature.

Index k of a model with T steps is time `t = (k + 1) / T`. The tables are computed in float64 with NumPy and are exact
at every node, with alpha^2 + sigma^2 = 1 everywhere; what is linear in between is an option (`INTERPOLATIONS`).
"""

import dataclasses
import math
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.processes.schedules import as_time, at_least, at_most, safe_log, safe_sqrt
from diffusion_jax.typing import Number


def _check_steps(num_steps):
    if num_steps < 1:
        raise invalid("num_steps", num_steps, "a process needs at least 1 step")


def _check_ends(beta_start, beta_end):
    if not 0 < beta_start <= beta_end < 1:
        raise InvalidInput(
            f"beta_start and beta_end are {beta_start!r} and {beta_end!r}, but they must satisfy "
            "0 < beta_start <= beta_end < 1."
        )


def linear_betas(num_steps: int = 1000, beta_start: Number = 1e-4, beta_end: Number = 0.02) -> tuple[float, ...]:
    """`beta_k` linear in k (Ho et al. 2020)."""
    _check_steps(num_steps)
    _check_ends(beta_start, beta_end)
    return tuple(np.linspace(beta_start, beta_end, num_steps).tolist())


def scaled_linear_betas(
    num_steps: int = 1000, beta_start: Number = 0.00085, beta_end: Number = 0.012
) -> tuple[float, ...]:
    """`sqrt(beta_k)` linear in k (Rombach et al. 2022: latent diffusion, Stable Diffusion)."""
    _check_steps(num_steps)
    _check_ends(beta_start, beta_end)
    return tuple((np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps) ** 2).tolist())


def cosine_betas(num_steps: int = 1000, offset: Number = 0.008, max_beta: Number = 0.999) -> tuple[float, ...]:
    """`alpha_bar(t) = cos^2((t + offset) / (1 + offset) pi / 2)` (Nichol & Dhariwal 2021).

    Each beta is at most `max_beta`.
    """
    _check_steps(num_steps)
    if not 0 < max_beta <= 1:
        raise invalid("max_beta", max_beta, "it must lie in (0, 1]")
    if offset < 0:
        raise invalid("offset", offset, "it must not be negative")
    angles = (np.arange(num_steps + 1) / num_steps + offset) / (1 + offset) * np.pi / 2
    alpha_bar = np.cos(angles) ** 2
    return tuple(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta).tolist())


def sigmoid_betas(num_steps: int = 1000, beta_start: Number = 1e-4, beta_end: Number = 0.02) -> tuple[float, ...]:
    """`beta_start + (beta_end - beta_start) sigmoid(s)`, s from -6 to 6 in equal steps (Xu et al. 2022, GeoDiff)."""
    _check_steps(num_steps)
    _check_ends(beta_start, beta_end)
    gate = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_steps)))
    return tuple((gate * (beta_end - beta_start) + beta_start).tolist())


def zero_terminal_snr_betas(betas: tuple[float, ...], terminal: Number = 0.0) -> tuple[float, ...]:
    """Rescales `betas` so that the last step is pure noise and the first is unchanged (Lin et al. 2024, algorithm 1).

    `sqrt(alpha_bar)` is moved and stretched linearly; the last beta becomes exactly 1.
    terminal: `alpha_bar` of the last step instead of 0, where a method needs a finite sigma / alpha: those of diffusers
        that work with it use 2^-24.
    """
    if len(betas) < 2:
        raise invalid("betas", betas, "rescaling to zero terminal SNR needs at least 2 steps")
    if not 0 <= terminal < 1:
        raise invalid("terminal", terminal, "it must lie in [0, 1)")
    root = np.sqrt(np.exp(np.cumsum(np.log1p(-np.asarray(betas, np.float64)))))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    alpha_bar[-1] = terminal
    ratios = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return tuple((1 - ratios).tolist())


BETAS = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
}
"""Tables of betas by name: functions of `num_steps` and the table's own parameters."""


def betas(kind: str = "linear", num_steps: int = 1000, **kwargs) -> tuple[float, ...]:
    """The table called `kind`, a key of `BETAS`."""
    if kind not in BETAS:
        raise unknown("betas", kind, BETAS)
    return BETAS[kind](num_steps, **kwargs)


INTERPOLATIONS = ("variance", "sigma", "log_sigma")
"""What is linear in t between two nodes of a table: alpha^2 and sigma^2, sigma / alpha, or its logarithm.

`sigma` is how diffusers reads a fractional index, `log_sigma` how it finds the index of a given noise level. The
segment below the first node, down to t = 0, is linear in sigma / alpha for both.
"""


@dataclasses.dataclass(frozen=True)
class DiscreteVP:
    """`alpha^2(t_k) = prod_{j <= k} (1 - beta_j)` at `t_k = (k + 1) / T`, interpolated in between, 1 at t = 0.

    betas: T numbers in (0, 1), the last may be 1 (zero terminal SNR), with interpolation 'variance' only.
    interpolation: one of `INTERPOLATIONS`; the nodes are the same for all.
    """

    betas: tuple[float, ...]
    interpolation: str = "variance"
    family = "vp"

    def __post_init__(self):
        table = np.asarray(self.betas, np.float64)
        if table.ndim != 1 or table.size == 0:
            raise invalid("betas.shape", table.shape, "a schedule needs a sequence of at least one beta")
        wrong = np.flatnonzero(
            ~((table > 0) & ((table < 1) | ((table == 1) & (np.arange(table.size) == table.size - 1))))
        )
        if wrong.size:
            raise invalid(f"betas[{wrong[0]}]", float(table[wrong[0]]), "it must lie in (0, 1); only the last may be 1")
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", self.interpolation, INTERPOLATIONS)
        if self.interpolation != "variance" and table[-1] == 1:
            raise invalid("interpolation", self.interpolation, "a table that ends at alpha = 0 needs 'variance'")

    @property
    def num_steps(self) -> int:
        return len(self.betas)

    @cached_property
    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """alpha^2 and sigma^2 at t = 0, 1/T, ..., 1 in float64, `[T + 1]` each."""
        with np.errstate(divide="ignore"):
            log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-np.asarray(self.betas, np.float64)))])
        return np.exp(log_alpha_bar), -np.expm1(log_alpha_bar)

    @cached_property
    def noise_ratios(self) -> np.ndarray:
        """sigma / alpha at t = 0, 1/T, ..., 1 in float64, `[T + 1]`; the last may be infinite."""
        with np.errstate(divide="ignore"):
            return np.sqrt(self.tables[1] / self.tables[0])

    @cached_property
    def _lines(self):
        """The tables that are linear in t, and their slopes after each node."""
        tables = self.tables
        if self.interpolation == "sigma":
            tables = (self.noise_ratios,)
        elif self.interpolation == "log_sigma":
            # The first segment is replaced by `_noise_ratio`.
            tables = (np.log(np.concatenate([self.noise_ratios[1:2], self.noise_ratios[1:]])),)
        # Differences are taken in float64: those of rounded tables would lose the derivative near t = 0. The last entry
        # is the left slope at t = 1.
        return tables, tuple(np.concatenate([np.diff(table), np.diff(table)[-1:]]) for table in tables)

    def position(self, t):
        """`T t`, rounded to the integer it was meant to be where t is a node up to round-off; index k is at k + 1."""
        t = as_time(t)
        position = self.num_steps * t
        node = jnp.round(position)
        is_node = jnp.abs(position - node) <= 2 * jnp.finfo(t.dtype).eps * node
        return position + jax.lax.stop_gradient(jnp.where(is_node, node - position, 0.0))

    def _interpolate(self, which, t):
        position = self.position(t)
        node = jnp.clip(jnp.floor(position), 0, self.num_steps).astype(jnp.int32)
        fraction = position - node
        table, slope = (jnp.asarray(values[which], position.dtype)[node] for values in self._lines)
        return table + fraction * slope

    def _noise_ratio(self, t):
        if self.interpolation == "sigma":
            return self._interpolate(0, t)
        position = self.position(t)
        first = jnp.asarray(self.noise_ratios[1], position.dtype)
        return jnp.where(position < 1, position * first, jnp.exp(self._interpolate(0, t)))

    def alpha(self, t: ArrayLike) -> Array:
        if self.interpolation == "variance":
            return safe_sqrt(self._interpolate(0, t))
        return jax.lax.rsqrt(1.0 + jnp.square(self._noise_ratio(t)))

    def sigma(self, t: ArrayLike) -> Array:
        if self.interpolation == "variance":
            return safe_sqrt(self._interpolate(1, t))
        ratio = self._noise_ratio(t)
        return ratio * jax.lax.rsqrt(1.0 + jnp.square(ratio))

    def log_snr(self, t: ArrayLike) -> Array:
        if self.interpolation == "variance":
            return safe_log(self._interpolate(0, t)) - safe_log(self._interpolate(1, t))
        return -2.0 * safe_log(self._noise_ratio(t))

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        """Exact inverse of the interpolation; values below `log_snr(1)` give 1."""
        log_snr = as_time(log_snr)
        with np.errstate(divide="ignore"):
            nodes = np.log(self.tables[1]) - np.log(self.tables[0])
        node = jnp.searchsorted(jnp.asarray(nodes, log_snr.dtype), -log_snr, side="right") - 1
        node = jnp.clip(node, 0, self.num_steps - 1)
        if self.interpolation == "variance":
            fraction = self._variance_fraction(node, log_snr)
        else:
            # Ratios below the last one would overflow.
            fraction = self._ratio_fraction(node, at_least(log_snr, -float(nodes[-1])))
        return (node + at_most(at_least(fraction, 0.0), 1.0)) / self.num_steps

    def _variance_fraction(self, node, log_snr):
        (alpha2, sigma2), (alpha2_slope, sigma2_slope) = (
            tuple(jnp.asarray(table, log_snr.dtype)[node] for table in pair) for pair in self._lines
        )
        # alpha^2 sigmoid(-l) = sigma^2 sigmoid(l) on the segment, both sides accurate at both ends.
        towards_noise, towards_data = jax.nn.sigmoid(-log_snr), jax.nn.sigmoid(log_snr)
        return (alpha2 * towards_noise - sigma2 * towards_data) / (
            sigma2_slope * towards_data - alpha2_slope * towards_noise
        )

    def _ratio_fraction(self, node, log_snr):
        ratio = jnp.exp(-0.5 * log_snr)
        table, slope = (lines[0] for lines in self._lines)
        if self.interpolation == "sigma":
            return (ratio - jnp.asarray(table, log_snr.dtype)[node]) / jnp.asarray(slope, log_snr.dtype)[node]
        # The slope of the first segment is 0, and not used.
        rise = jnp.where(node == 0, 1.0, jnp.asarray(slope, log_snr.dtype)[node])
        logarithmic = (-0.5 * log_snr - jnp.asarray(table, log_snr.dtype)[node]) / rise
        return jnp.where(node == 0, ratio / self.noise_ratios[1], logarithmic)
