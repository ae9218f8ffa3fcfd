"""What a trained network is asked: classes by number or name, captions by the tokenizer of its data."""

from collections.abc import Sequence

import numpy as np

from diffusion_jax.commands.sample_flags import Request
from diffusion_jax.data import Source
from diffusion_jax.data.captions import tokenized
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.experiment import Experiment, Sampling
from diffusion_jax.models import ConditionStream
from diffusion_jax.models.conditions import Label
from diffusion_jax.models.layers.conditioning import find_stream


def conditioned_on(experiment: Experiment, sampling: Sampling, request: Request, by_class: bool) -> Sampling:
    """`sampling` under the classes or texts of the request; what else the network is told stays as it was.

    Raises InvalidInput where the network or its data know no classes, or no texts.
    """
    read = class_labels if by_class else caption_tokens
    values = read(experiment.conditions, experiment.source, request.asked)
    before = sampling.conditions

    def conditions(index: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.asarray(index) % len(request.asked)
        return {**(before(index) if before else {}), **{name: value[rows] for name, value in values.items()}}

    return sampling._replace(conditions=conditions)


def class_labels(streams: Sequence[ConditionStream], source: Source, asked: Sequence[str]) -> dict[str, np.ndarray]:
    """The numbers of classes that are written by number or by name."""
    stream = find_stream(streams, Label)
    if stream is None:
        raise InvalidInput("--class was given, but the network of this run was not trained on classes.")
    names = list(getattr(source, "class_names", None) or [])

    def label(text: str) -> int:
        text = text.strip()
        if text in names:
            return names.index(text)
        if text.isdecimal():
            if int(text) >= stream.num_classes:
                raise invalid("--class", int(text), f"the network knows the classes 0 to {stream.num_classes - 1}")
            return int(text)
        if names:
            raise unknown("--class", text, names)
        raise invalid("--class", text, f"the data name no classes: give numbers, 0 to {stream.num_classes - 1}")

    return {"label": np.asarray([label(text) for text in asked], np.int32)}


def caption_tokens(streams: Sequence[ConditionStream], source: Source, asked: Sequence[str]) -> dict[str, np.ndarray]:
    """Texts as the network reads them: the tokens of the tokenizer of its data."""
    keys = {key.name for stream in streams for key in stream.keys}
    tokenizer = getattr(source, "tokenizer", None)
    if "tokens" not in keys or tokenizer is None:
        raise InvalidInput(
            "--prompt was given, but the network of this run does not read tokens of captions"
            + (": use --class." if "label" in keys else ".")
        )
    example = source[0]["cond"]
    made = tokenized(asked, tokenizer, len(example["tokens"]), "--prompt")
    return {name: value for name, value in made.items() if name in example}
