"""What a pipeline reads from: random access to examples, and the source that holds its arrays in memory.

An example is `{"x0": ..., "cond": {...}}` without a batch axis; `cond` is absent when there is no condition. The worlds
and file formats that make sources have modules of their own; batching and shuffling live in `pipeline`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffusion_jax.errors import InvalidInput, invalid, unknown

SPLITS = ("train", "test")

Indices = Sequence[int] | np.ndarray
"""Which examples: a range, a list, or an array of whole numbers."""


@runtime_checkable
class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> dict:
        """Example `index`, the same at every call."""
        ...


@runtime_checkable
class BatchSource(Source, Protocol):
    """A source that also gives a whole batch at once, which only makes reading faster."""

    def take(self, indices: Indices) -> dict:
        """The examples at `indices`, stacked."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Examples that lie in memory (or in a memory map) along the first axis of arrays.

    x0: `[N, ...]` float32 (images in [-1, 1], channels-last) or int32 tokens, or a dict of those for joint data.
    cond: arrays `[N, ...]`, e.g. `{"label": int32 [N]}`; empty when there is no condition.
    num_classes, vocab_size, tokenizer, class_names, density: what is known about the data; None when it does not apply.
    """

    x0: Any
    cond: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = "arrays"
    num_classes: int | None = None
    vocab_size: int | None = None
    tokenizer: Any = None
    class_names: tuple[str, ...] | None = None
    density: Any = None

    def __post_init__(self):
        leaves = list(self.x0.values()) if isinstance(self.x0, Mapping) else [self.x0]
        lengths = {len(leaf) for leaf in [*leaves, *self.cond.values()]}
        if len(lengths) != 1:
            raise invalid(f"{self.name} lengths", sorted(lengths), "every array must have one entry per example")
        if not len(self):
            raise InvalidInput(f"{self.name} holds no example: at least one is needed.")

    @property
    def shape(self) -> Any:
        """Shape of one `x0` (a dict of shapes for joint data)."""
        if isinstance(self.x0, Mapping):
            return {key: tuple(value.shape[1:]) for key, value in self.x0.items()}
        return tuple(self.x0.shape[1:])

    def __len__(self) -> int:
        return len(next(iter(self.x0.values())) if isinstance(self.x0, Mapping) else self.x0)

    def __getitem__(self, index: int) -> dict:
        return self.take(index)

    def take(self, indices: Indices | int | np.integer) -> dict:
        """The examples at `indices`, stacked (one example without a batch axis when it is a single number)."""
        x0 = {k: v[indices] for k, v in self.x0.items()} if isinstance(self.x0, Mapping) else self.x0[indices]
        if not self.cond:
            return {"x0": x0}
        return {"x0": x0, "cond": {name: values[indices] for name, values in self.cond.items()}}


class _Unconditional:
    """A source without its conditions; everything else that is known about it stays."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return {"x0": self._source[index]["x0"]}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "take":
            raise AttributeError(name)
        return getattr(self._source, name)


def unconditional(source: Source) -> Source:
    """`source` without its conditions, for a network that takes none."""
    return _Unconditional(source)


def check_split(split: str) -> None:
    """Raises InvalidInput unless `split` is "train" or "test"."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)


def first_not_finite(x0: Any) -> int | None:
    """Row of the first NaN or infinity in a batch `[B, ...]` (or a dict of those); None when all is finite."""
    rows = []
    for leaf in x0.values() if isinstance(x0, Mapping) else [x0]:
        leaf = np.asarray(leaf)
        if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf.sum(dtype=np.float64)):
            bad = ~np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1)
            rows.extend(np.flatnonzero(bad)[:1].tolist())
    return min(rows, default=None)


def check_finite(source: Source, *, max_examples: int | None = None) -> None:
    """Raises InvalidInput, naming the example, when a source holds a NaN or an infinity.

    max_examples: looks at no more than so many, spread evenly; all of them when None.
    """
    size = len(source)
    count = size if max_examples is None else min(size, max_examples)
    for index in np.unique(np.linspace(0, size - 1, count).astype(np.int64)):
        x0 = source[int(index)]["x0"]
        batched = {k: np.asarray(v)[None] for k, v in x0.items()} if isinstance(x0, Mapping) else np.asarray(x0)[None]
        if first_not_finite(batched) is not None:
            name = getattr(source, "name", type(source).__name__)
            raise InvalidInput(f"Example {index} of {name} is not finite (NaN or infinity): mend or remove it.")
