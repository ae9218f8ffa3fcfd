"""What a pipeline reads from: random access to examples, and the source that holds its arrays in memory.

An example is `{"x0": ..., "cond": {...}}` without a batch axis; `cond` is absent when there is no condition. The worlds
and file formats that make sources have modules of their own; batching and shuffling live in `pipeline`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffusion_jax.errors import InvalidInput, invalid, nearest, unknown

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
    cond: arrays `[N, ...]`, e.g. `{"label": int32 [N]}`, the numbers of classes from 0; empty where there is none.
    num_classes, vocab_size, tokenizer, class_names, density: what is known about the data; None when it does not apply.
    beside: arrays `[N, ...]` of what else an objective reads of a batch, such as `noise`, `states` or `weight`.
    """

    x0: Any
    cond: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = "arrays"
    num_classes: int | None = None
    vocab_size: int | None = None
    tokenizer: Any = None
    class_names: tuple[str, ...] | None = None
    density: Any = None
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        leaves = list(self.x0.values()) if isinstance(self.x0, Mapping) else [self.x0]
        lengths = {len(leaf) for leaf in [*leaves, *self.cond.values(), *self.beside.values()]}
        if len(lengths) != 1:
            raise invalid(f"{self.name} lengths", sorted(lengths), "every array must have one entry per example")
        if not len(self):
            raise InvalidInput(f"{self.name} holds no example: at least one is needed.")
        if "label" in self.cond and self.num_classes is not None:
            as_labels(self.cond["label"], f"label of {self.name}", self.num_classes)

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
        beside = {name: values[indices] for name, values in self.beside.items()}
        if not self.cond:
            return {"x0": x0, **beside}
        return {"x0": x0, "cond": {name: values[indices] for name, values in self.cond.items()}, **beside}


class _Unconditional:
    """A source without its conditions; everything else that is known about it stays."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return {name: value for name, value in self._source[index].items() if name != "cond"}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "take":
            raise AttributeError(name)
        value = getattr(self._source, name)
        return unconditional(value) if name == "held_out" and value is not None else value


def unconditional(source: Source) -> Source:
    """`source` without its conditions, for a network that takes none."""
    return _Unconditional(source)


def rows_of_each_size(source: Source) -> dict[tuple[int, int], np.ndarray]:
    """The examples of each size, of a source that has several (`source.sizes`, `source.bucket`); {} of any other."""
    bucket = getattr(source, "bucket", None)
    if bucket is None or len(np.unique(bucket)) < 2:
        return {}
    return {source.sizes[number]: np.flatnonzero(bucket == number) for number in np.unique(bucket)}  # pyright: ignore


def held_out(source: Source) -> Source:
    """What `source` keeps from training: `call("data.held_out")` in a config follows all that `config.data` says.

    Raises InvalidInput for a source that keeps nothing.
    """
    kept = getattr(source, "held_out", None)
    if kept is None:
        name = getattr(source, "name", type(source).__name__)
        raise InvalidInput(
            f"{name!r} holds nothing out: give it a share (--config.data.held_out=0.1 of a folder of pictures), or "
            "another source in config.held_out."
        )
    return kept


def check_split(split: str) -> None:
    """Raises InvalidInput unless `split` is "train" or "test"."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)


def as_labels(values: Any, name: str, num_classes: int | None = None) -> np.ndarray:
    """Numbers of classes as int32, of the same shape `[N]` or `[]`.

    Raises InvalidInput, with what to do, for anything else: one-hot rows, floats, bools, names, a negative number, and
    one that is not below `num_classes`.
    """
    values = np.asarray(values)
    given = f"{values.dtype}{list(values.shape)}"
    if values.ndim > 1:
        raise invalid(name, given, "one number of a class per example is needed: x.argmax(-1) of one-hot rows")
    if not np.issubdtype(values.dtype, np.integer):
        hints = {"f": "x.astype(int)", "b": "x.astype(int)", "U": "np.unique(x, return_inverse=True)[1]"}
        hint = f": {hints[values.dtype.kind]}" if values.dtype.kind in hints else ""
        raise invalid(name, given, f"integers, the numbers of classes from 0, are needed{hint}")
    limit = np.iinfo(np.int32).max if num_classes is None else num_classes
    outside = values[(values < 0) | (values >= limit)]
    if outside.size:
        classes = "classes are counted from 0" if num_classes is None else f"the {limit} classes are 0 to {limit - 1}"
        raise invalid(name, int(outside[0]), classes)
    return values.astype(np.int32)


def as_numbers(values: np.ndarray, name: str) -> np.ndarray:
    """Integers, such as tokens, as int32; one that int32 does not hold is refused."""
    bounds = np.iinfo(np.int32)
    if values.size and not (values.min() >= bounds.min and values.max() <= bounds.max):
        raise invalid(f"the range of {name}", f"{values.min()} .. {values.max()}", "int32 holds less")
    return values.astype(np.int32)


def numbered(names: Sequence[str], class_names: Sequence[str], where: str) -> list[int]:
    """The number of each name among `class_names`. Raises InvalidInput for a name that is not one of them."""
    numbers = {name: number for number, name in enumerate(class_names)}
    if len(numbers) != len(class_names):
        raise invalid("class_names", tuple(class_names), "each name must occur once")
    for name in names:
        if name not in numbers:
            match = nearest(name, numbers)
            hint = f"; did you mean {match!r}?" if match else ""
            raise InvalidInput(f"{where} has the class {name!r}, which is not one of class_names{hint}")
    return [numbers[name] for name in names]


def not_finite(batch: Mapping[str, Any]) -> tuple[str, int] | None:
    """The entry of a batch, such as "x0" or "cond['audio']", and its first row that holds a NaN or an infinity."""
    for entry, value in batch.items():
        leaves = {f"{entry}[{key!r}]": value[key] for key in value} if isinstance(value, Mapping) else {entry: value}
        for name, leaf in leaves.items():
            leaf = np.asarray(leaf)
            if not np.issubdtype(leaf.dtype, np.floating) or np.isfinite(leaf.sum(dtype=np.float64)):
                continue
            bad = ~np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1)
            if bad.any():
                return name, int(np.flatnonzero(bad)[0])
    return None


def check_finite(source: Source, *, max_examples: int | None = None) -> None:
    """Raises InvalidInput, naming the example, when x0 or a condition of a source holds a NaN or an infinity.

    Examples are read as in training, so that a file that cannot be decoded, say, is named too.
    max_examples: looks at no more than so many, spread evenly; all of them when None.
    """
    size = len(source)
    count = size if max_examples is None else min(size, max_examples)
    for index in np.unique(np.linspace(0, size - 1, count).astype(np.int64)):
        example = source[int(index)]
        if found := not_finite(_batched(example)):
            name = getattr(source, "name", type(source).__name__)
            raise InvalidInput(
                f"Example {index} of {name} is not finite (NaN or infinity) in {found[0]}: mend or remove it."
            )


def _batched(example):
    """An example as a batch of one."""
    if isinstance(example, Mapping):
        return {key: _batched(value) for key, value in example.items()}
    return np.asarray(example)[None]
