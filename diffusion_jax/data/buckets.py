"""Buckets: a few sizes of about one area, so that pictures of any aspect are trained on with little cut off.

A network is compiled once for each size, so there are few of them; each picture goes to the size whose aspect is
nearest to its own. A batch has examples of one bucket. Bucket k, with n_k of the N examples, gets n_k / N of the
batches: each goes to the bucket with the largest n_k / (2 c_k + 1), c_k being how many it has had (Sainte-Laguë 1910).
That repeats itself after at most N batches, so any batch is known without those before it.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np

from diffusion_jax.errors import invalid

WIDEST = 2.0
"""Aspect of the widest bucket that is chosen, and of the tallest one upside down."""

MOST_BUCKETS = 16
"""Each is a program of its own."""


def bucket_sizes(
    shapes: Sequence[tuple[int, int]], size: tuple[int, int], buckets: int | tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    """Heights and widths of the buckets: those that are given, or so many, chosen by the shapes of the pictures.

    size: height and width whose area all chosen buckets have about. They are chosen one by one, each time the one that
    brings the aspects (their logarithms) of all pictures nearest to the chosen ones. Fewer are returned where further
    ones bring nothing. Their sides are multiples of 8, of 4 below 32 pixels.
    """
    if not isinstance(buckets, int):
        made = tuple((int(height), int(width)) for height, width in buckets)
        if not 1 <= len(made) <= MOST_BUCKETS or len(set(made)) < len(made) or min(map(min, made)) < 1:
            raise invalid("buckets", buckets, f"1 to {MOST_BUCKETS} different sizes (height, width) are needed")
        return made
    if isinstance(buckets, bool) or not 1 <= buckets <= MOST_BUCKETS:
        raise invalid("buckets", buckets, f"a number from 1 to {MOST_BUCKETS}, or sizes, is needed")
    side = max(1, round(math.sqrt(size[0] * size[1])))
    step = _step(side)
    heights = range(step, int(side * WIDEST**0.5) + step, step)
    choices = sorted({(h, max(step, round(side * side / h / step) * step)) for h in heights})
    choices = [(h, w) for h, w in choices if 1 / WIDEST <= h / w <= WIDEST]
    far = np.abs(_log_aspects(shapes)[:, None] - _log_aspects(choices))
    chosen, distance = [], np.full(len(shapes), np.inf)
    for _ in range(buckets):
        totals = np.minimum(far, distance[:, None]).sum(axis=0)
        best = int(totals.argmin())
        if chosen and totals[best] >= distance.sum() - 1e-9:
            break
        chosen.append(choices[best])
        distance = np.minimum(distance, far[:, best])
    # One that was chosen early may have lost its pictures to those chosen later.
    used = np.unique(nearest_bucket(shapes, chosen))
    return tuple(sorted(chosen[number] for number in used))


def _step(side: int) -> int:
    """What the sides of chosen buckets are multiples of: 8 and more, as patches and halvings want it, where there is
    room for that."""
    return 8 * max(1, side // 64) if side >= 32 else 4 if side >= 16 else 1


def nearest_bucket(shapes: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The number of the size whose aspect is nearest to that of each shape, int32 `[N]`."""
    return np.abs(_log_aspects(shapes)[:, None] - _log_aspects(sizes)).argmin(axis=1).astype(np.int32)


def _log_aspects(shapes):
    heights, widths = np.asarray(shapes, np.float64).T
    return np.log(heights / widths)


class BucketSchedule:
    """Which bucket each batch is of, and how many batches that bucket has had before; see the module."""

    def __init__(self, bucket: np.ndarray):
        """bucket: the number of each example's bucket."""
        numbers, counts = np.unique(bucket, return_counts=True)
        self.examples = [np.flatnonzero(bucket == number) for number in numbers]
        divisor = math.gcd(*map(int, counts))
        self._each = counts // divisor
        period = int(self._each.sum())
        self._order, self._rank = np.empty(period, np.int32), np.empty(period, np.int64)
        had = np.zeros(len(counts), np.int64)
        queue = [(-float(count), number) for number, count in enumerate(self._each)]
        heapq.heapify(queue)
        for batch in range(period):
            _, number = queue[0]
            self._order[batch], self._rank[batch] = number, had[number]
            had[number] += 1
            heapq.heapreplace(queue, (-float(self._each[number]) / (2 * int(had[number]) + 1), number))

    def __call__(self, batch: int) -> tuple[int, int]:
        """The place of batch `batch`'s bucket in `examples`, and how many batches it has had before."""
        periods, at = divmod(batch, len(self._order))
        number = int(self._order[at])
        return number, int(periods * self._each[number] + self._rank[at])
