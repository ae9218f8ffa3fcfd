"""Claims as data, and the rule that judges all of them from paired differences over seeds.

Both sides of a claim are measured for the same seeds, with the same noise or the same training data, so what is judged
is their difference seed by seed,

    d_i = ours_i - (factor against_i + margin),                 its 95 % interval   mean(d) +- t s(d) / sqrt(n)      (1)

with Student's t for n - 1 degrees of freedom. "higher" holds where the interval lies above 0 and fails where it does
not reach above 0; "lower" the other way round; "equal" compares ours_i - factor against_i with +- margin. Where the
interval contains the bound the seeds do not tell, and the claim is undecided.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax.errors import InvalidInput, invalid, unknown

DIRECTIONS = {"higher": ">", "lower": "<", "equal": "="}
VERDICTS = ("holds", "fails", "undecided")
MIN_SEEDS = 3
"""Below that many seeds no interval is worth its name."""


class Row(NamedTuple):
    """One claim: that `ours` is higher, lower or equal to `factor * against + margin`.

    figure: what is compared, with its unit. ours, against: one value a seed; a plain number where no seed changes it
    (a bound, a count, an exact law). published: the figure or the size of the effect in the paper, in words.
    direction "equal": within `margin` of `factor * against`.
    """

    title: str
    figure: str
    ours: Sequence[float] | float
    against: Sequence[float] | float
    direction: str
    published: str = ""
    factor: float = 1.0
    margin: float = 0.0


class Verdict(NamedTuple):
    """A row that was judged. ours, against: the values, one a seed. interval: of the difference, equation (1)."""

    title: str
    figure: str
    ours: tuple[float, ...]
    against: tuple[float, ...]
    direction: str
    published: str
    factor: float
    margin: float
    interval: tuple[float, float]
    verdict: str


def judge(row: Row) -> Verdict:
    """The verdict on a row by equation (1). A figure that is not finite makes it fail.

    Raises InvalidInput for an unknown direction, and for sides with values of different seeds.
    """
    if row.direction not in DIRECTIONS:
        raise unknown(f"the direction of {row.title!r}", row.direction, DIRECTIONS)
    if row.direction == "equal" and row.margin < 0:
        raise invalid(f"the margin of {row.title!r}", row.margin, "a distance was expected, not below 0")
    exact = np.ndim(row.ours) == 0 and np.ndim(row.against) == 0
    ours, against = (np.atleast_1d(np.asarray(values, float)) for values in (row.ours, row.against))
    if ours.ndim != 1 or against.ndim != 1 or (1 not in (ours.size, against.size) and ours.size != against.size):
        raise InvalidInput(f"{row.title!r} has {ours.size} values of ours and {against.size} to compare them with.")
    difference = ours - row.factor * against - (0.0 if row.direction == "equal" else row.margin)
    interval = interval_of(difference, exact)
    verdict = _verdict(row, interval) if np.isfinite(difference).all() else "fails"
    values = {"ours": tuple(ours.tolist()), "against": tuple(against.tolist())}
    return Verdict(**{**row._asdict(), **values}, interval=interval, verdict=verdict)


def interval_of(difference: np.ndarray, exact: bool) -> tuple[float, float]:
    """The 95 % interval of the mean of `difference [n]`: a point where no seed changes it, all numbers of too few."""
    mean = float(difference.mean())
    if exact:
        return mean, mean
    if difference.size < MIN_SEEDS:
        return -np.inf, np.inf
    from scipy import stats  # slow to import

    half = float(stats.t.ppf(0.975, difference.size - 1) * difference.std(ddof=1) / np.sqrt(difference.size))
    return mean - half, mean + half


def _verdict(row: Row, interval: tuple[float, float]) -> str:
    low, high = interval
    if row.direction == "equal":
        if -row.margin <= low and high <= row.margin:
            return "holds"
        return "fails" if low > row.margin or high < -row.margin else "undecided"
    if row.direction == "lower":
        low, high = -high, -low
    if low > 0:
        return "holds"
    return "fails" if high <= 0 else "undecided"
