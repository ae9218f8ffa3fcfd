"""From a source to batches: shuffled, sharded by host, restorable; reading ahead in threads is done by grain.

The stream of a run is epoch after epoch, each a permutation of the source; position p of the stream is example
`permutation(seed, p // N)[p mod N]`, and p is the batch's `index`. Nothing depends on the number of hosts or on the
batch size, except which rows a host reads: host h of H gets rows `h B / H .. (h + 1) B / H` of each global batch, the
block that a `data`-sharded global array expects from it. Sources and worlds live in the other modules of this package.

Examples of a source with several sizes (`source.bucket`, the number of each example's) are of one size in each batch:
which one is said by `buckets.BucketSchedule`, and each size has epochs of its own. An example may then come twice in a
batch that is larger than all examples of its size.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusion_jax.data.buckets import BucketSchedule
from diffusion_jax.data.sources import BatchSource, Source, as_labels, not_finite
from diffusion_jax.errors import InvalidInput, invalid

Transform = Callable[[dict, np.random.Generator], dict]
"""Maps an example to an example; the generator depends on the seed and the example's position in the stream alone."""


def pipeline(
    source: Source,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    transforms: Sequence[Transform] = (),
    epochs: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    num_threads: int = 2,
    prefetch: int = 4,
    check: Callable[[dict], None] | None = None,
) -> "Batches":
    """An iterator of batches `{"x0": [b, ...], "cond": {...}, "index": int32 [b]}` with b = batch_size / process_count.

    source: random access to examples (see `data.sources`).
    batch_size: examples in a *global* batch; must be divisible by the number of hosts.
    shuffle: a new permutation each epoch, from (seed, epoch); the source's own order when False.
    transforms: applied in turn to each example (see `data.transforms`).
    epochs: ends after so many; runs for ever when None. A last batch that would not be full is dropped; batches run
        across the border of two epochs.
    process_index, process_count: this host and the number of hosts; those of JAX when None.
    num_threads, prefetch: threads that read ahead, and how many batches; 0 threads reads in the calling thread.
    check: looks at every batch and raises InvalidInput for what a network cannot take (`Experiment.check_batch`).

    Raises InvalidInput when a batch is larger than the data or not divisible by the hosts, and, while iterating, when
    x0 or a condition holds a NaN or an infinity, or a label is none of the source's classes.
    """
    if process_index is None or process_count is None:
        import jax

        process_index = jax.process_index() if process_index is None else process_index
        process_count = jax.process_count() if process_count is None else process_count
    if batch_size < 1:
        raise invalid("batch_size", batch_size, "it must be at least 1")
    if batch_size > len(source):
        raise invalid("batch_size", batch_size, f"the source holds only {len(source)} examples")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise invalid(
            "process_index, process_count", (process_index, process_count), "the first must lie in 0 .. the second - 1"
        )
    if batch_size % process_count:
        raise invalid("batch_size", batch_size, f"it must be divisible by the number of hosts, {process_count}")
    if epochs is not None and epochs < 1:
        raise invalid("epochs", epochs, "it must be at least 1, or None to run for ever")
    if seed < 0:
        raise invalid("seed", seed, "it must not be negative")
    if num_threads < 0 or prefetch < 0:
        raise invalid("num_threads, prefetch", (num_threads, prefetch), "neither may be negative")
    stream = _Stream(source, batch_size // process_count, process_index, batch_size, seed, shuffle, tuple(transforms))
    return Batches(stream, epochs, num_threads, prefetch, check)


@dataclasses.dataclass(frozen=True, eq=False)
class _Stream:
    """Global batch b of the stream, as far as it belongs to this host."""

    source: Any
    rows: int
    process_index: int
    batch_size: int
    seed: int
    shuffle: bool
    transforms: tuple

    @property
    def name(self) -> str:
        return getattr(self.source, "name", type(self.source).__name__)

    @functools.cached_property
    def schedule(self) -> BucketSchedule | None:
        """Which size each batch has; None where all examples have one."""
        bucket = getattr(self.source, "bucket", None)
        return None if bucket is None or len(np.unique(bucket)) < 2 else BucketSchedule(np.asarray(bucket))

    def __call__(self, batch: int) -> dict:
        first = self.process_index * self.rows
        positions = int(batch) * self.batch_size + first + np.arange(self.rows, dtype=np.int64)
        if self.schedule is None:
            indices = self._at(positions, len(self.source))
        else:
            bucket, before = self.schedule(int(batch))
            examples = self.schedule.examples[bucket]
            within = before * self.batch_size + first + np.arange(self.rows, dtype=np.int64)
            indices = examples[self._at(within, len(examples), bucket)]
        out = self._examples(indices, positions)
        classes = getattr(self.source, "num_classes", None)
        if classes is not None and "label" in out.get("cond", {}):
            as_labels(out["cond"]["label"], f"label of {self.name}", classes)
        # Positions stay below 2^31 in any run that ends; beyond, they wrap rather than overflow.
        return {**out, "index": (positions & 0x7FFFFFFF).astype(np.int32)}

    def _at(self, positions: np.ndarray, length: int, *bucket: int) -> np.ndarray:
        """Which of `length` examples stands at each position of their stream, epoch after epoch."""
        epochs, offsets = np.divmod(positions, length)
        if not self.shuffle:
            return offsets
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(self.seed, int(epoch), length, *bucket)[offsets[here]]
        return indices

    def _examples(self, indices, positions) -> dict:
        if not self.transforms and isinstance(self.source, BatchSource):
            return self.source.take(indices)
        examples = []
        for index, position in zip(indices, positions, strict=True):
            example = self.source[int(index)]
            if self.transforms:
                rng = np.random.default_rng((self.seed, int(position)))
                for transform in self.transforms:
                    example = transform(example, rng)
            examples.append(example)
        return _stack(examples)


@functools.lru_cache(maxsize=8)
def _permutation(seed, epoch, length, *bucket):
    dtype = np.int32 if length < 2**31 else np.int64
    return np.random.default_rng((seed, epoch, length, *bucket)).permutation(length).astype(dtype)


def _stack(examples) -> Any:
    first = examples[0]
    if isinstance(first, dict):
        return {name: _stack([example[name] for example in examples]) for name in first}
    shapes = {np.shape(example) for example in examples}
    if len(shapes) > 1:
        raise InvalidInput(
            f"Examples of shapes {sorted(shapes)[:3]} cannot be batched: give them one shape, e.g. with data.resize, "
            "or a few (data.image_folder(buckets=...))."
        )
    return np.stack(examples)


class Batches:
    """Iterator over the batches of one host. Its state is how far the *global* stream has been read, and of what.

    The state is a dict of plain values, the same on every host, so that a run may be resumed with another number of
    hosts, or with another batch size that divides what has been read, and still sees every example in the same order.
    (With examples of several sizes the batch size must be the same: which size comes next is said batch by batch.)
    """

    def __init__(self, stream: _Stream, epochs: int | None, num_threads: int, prefetch: int, check: Any):
        import grain

        self._stream, self._check = stream, check
        # 2^40 batches stand for "for ever": range datasets have a length.
        self._length = 2**40 if epochs is None else len(stream.source) * epochs // stream.batch_size
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
        self._batches = iter(grain.MapDataset.range(self._length).map(stream).to_iter_dataset(options))
        self._done = 0

    @property
    def batch_size(self) -> int:
        """Examples in a global batch."""
        return self._stream.batch_size

    @property
    def epoch(self) -> float:
        """How often the source has been read so far."""
        return self._done * self.batch_size / len(self._stream.source)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict:
        batch = next(self._batches)
        if found := not_finite(batch):
            entry, row = found
            raise InvalidInput(
                f"{entry} at position {int(batch['index'][row])} of the data stream is not finite (NaN or infinity): "
                "data.check_finite(source) names the example."
            )
        if self._check is not None:
            self._check(batch)
        self._done += 1
        return batch

    def get_state(self) -> dict:
        """Where the stream stands: plain numbers, and the names of the classes where there are any; fit for JSON."""
        stream = self._stream
        names = getattr(stream.source, "class_names", None)
        return {
            "examples": self._done * stream.batch_size,
            "length": len(stream.source),
            "seed": stream.seed,
            "shuffle": stream.shuffle,
            **({} if names is None else {"class_names": list(names)}),
            **({} if stream.schedule is None else {"batch_size": stream.batch_size}),
        }

    def set_state(self, state: dict) -> None:
        """Goes on where `state` was taken. Raises InvalidInput when it belongs to another stream."""
        for name, value in self.get_state().items():
            if name not in state:
                raise InvalidInput(f"The state of the data has no {name!r}: it was not written by this pipeline.")
            if name != "examples" and state[name] != value:
                raise invalid(
                    f"{name} of the data", value, f"the state to resume from was written with {state[name]!r}"
                )
        done, rest = divmod(int(state["examples"]), self.batch_size)
        if rest:
            raise invalid(
                "batch_size", self.batch_size, f"it must divide the {state['examples']} examples already read"
            )
        if not 0 <= done <= self._length:
            raise invalid("examples already read", state["examples"], "this pipeline ends before")
        self._batches.set_state({"next_index": done})
        self._done = done
