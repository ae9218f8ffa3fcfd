"""Whether data, network and process mean the same by their numbers: classes, tokens, and the names of classes."""

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np

from diffusion_jax.data.encoded import stacked_examples
from diffusion_jax.data.sources import Source
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models import ConditionStream, check_values
from diffusion_jax.models.conditions import Label
from diffusion_jax.models.layers.conditioning import find_stream
from diffusion_jax.processes import is_discrete, members


def check_known(batch: Mapping[str, Any], conditions: Iterable[ConditionStream], process: Any) -> None:
    """Raises InvalidInput where a batch of data has a label or a token that the network with these `conditions`, or
    `process` (None where there is none), does not know. The null class is no label of data."""
    check_values(conditions, batch.get("cond"), data=True)
    for name, member in members(process).items() if process is not None else ():
        if is_discrete(member):
            x0 = batch["x0"][name] if name else batch["x0"]
            check_tokens(f"x0[{name!r}]" if name else "x0", x0, member.vocab_size)


def check_tokens(name: str, values: Any, vocab_size: int) -> None:
    """Raises InvalidInput unless `values` are integers, as JAX has them, in 0 .. vocab_size - 1."""
    values = np.asarray(values)
    if values.dtype not in (np.int32, np.int64):
        expected = f"int32 tokens in 0 .. {vocab_size - 1} are needed (unsigned integers in files are read as pixels)"
        raise invalid(name, f"{values.dtype}{list(values.shape)}", expected)
    if (outside := values[(values < 0) | (values >= vocab_size)]).size:
        raise invalid(f"a token of {name}", int(outside[0]), f"the process knows {vocab_size}, 0 to {vocab_size - 1}")


def check_classes(source: Source, held_out: Source | None, conditions: Iterable[ConditionStream], process: Any) -> None:
    """Raises InvalidInput where data and network, or data to train on and held-out data, differ in their classes.

    Labels in memory are all looked at; others as their batches come (`check_known`), the first example now.
    """
    label = find_stream(conditions, Label)
    names = getattr(source, "class_names", None)
    for entry, examples in (("data", source), ("held_out", held_out)):
        classes, others = getattr(examples, "num_classes", None), getattr(examples, "class_names", None)
        if label is not None and classes is not None and classes > label.num_classes:
            known = f"the network knows {label.num_classes}, 0 to {label.num_classes - 1}"
            raise invalid(f"the number of classes of {entry}", classes, known)
        if names is not None and others is not None and tuple(others) != tuple(names):
            first = next(pair for pair in zip_longest(names, others) if pair[0] != pair[1])
            raise InvalidInput(
                f"data and held_out have different classes: {first[0]!r} and {first[1]!r} have one number; give both "
                "the same class_names."
            )
        check_values(conditions, getattr(examples, "cond", None), data=True)
        # Held-out data that stand in a config beside a source in another space are not what is validated on.
        if examples is not None and (examples is source or _shapes(examples) == _shapes(source)):
            check_known(stacked_examples(examples, [0]), conditions, process)


def _shapes(source):
    x0 = source[0]["x0"]
    return {name: np.shape(leaf) for name, leaf in x0.items()} if isinstance(x0, Mapping) else np.shape(x0)


def check_null_class(field: str, null: Any, source: Source, conditions: Iterable[ConditionStream]) -> None:
    """Raises InvalidInput where the label of a null condition is a class of the data, or beyond the network's."""
    label = find_stream(conditions, Label)
    value = null.get("label") if isinstance(null, Mapping) else None
    if label is None or not isinstance(value, int):
        return
    classes = getattr(source, "num_classes", None) or 0
    if not classes <= value <= label.num_classes:
        known = f"classes 0 to {classes - 1}" if classes else "classes"
        raise invalid(f"{field}['label']", value, f"the data have {known}, and the null class is {label.num_classes}")
