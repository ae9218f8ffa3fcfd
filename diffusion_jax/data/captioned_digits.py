"""Pairs of a handwritten digit and its spelled-out name: joint data of an image and a text, both continuous.

A text is a fixed number of characters, each a fixed vector, so that a Gaussian process can corrupt it and the nearest
vector decodes it. The verifier compares what a text says with what a classifier sees in the image; classifiers live in
`metrics` (`feature_network("digits").logits`), which is why one is an argument here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from diffusion_jax.data.digits import digits
from diffusion_jax.data.sources import ArraySource
from diffusion_jax.data.tokenizers import Tokenizer
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.typing import Numbers

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHARACTERS = "_" + "".join(sorted(set("".join(NAMES))))
"""The alphabet of names, in the order of token ids; "_" fills a text up and has id 0."""


def named_digits(
    split: str = "train", text_length: int = 5, embedding_dim: int = 8, condition: bool = False
) -> ArraySource:
    """Pairs `x0 = {"image": [8, 8, 1], "text": [text_length, embedding_dim]}` of the digits, all within [-1, 1].

    text_length: characters of a text, 5 .. 16; shorter names are filled up.
    embedding_dim: of a character: 8, 16 or 32; with 0 a text is the ids of its characters, int32 [text_length].
    condition: adds `cond` with `label` 0 .. 9 and `tokens` int32 [text_length], for networks that are told.
    """
    images = digits(split)
    label = images.cond["label"]
    tokens = np.stack([encode(name, text_length) for name in NAMES])[label]
    return ArraySource(
        {"image": images.x0, "text": embed(tokens, embedding_dim) if embedding_dim else tokens},
        {"label": label, "tokens": tokens} if condition else {},
        f"named_digits/{split}",
        num_classes=10,
        vocab_size=len(CHARACTERS),
        tokenizer=tokenizer(text_length),
        class_names=NAMES,
    )


def tokenizer(text_length: int = 5) -> Tokenizer:
    """Text to character ids and back; `decode` drops what fills a text up at its end."""
    return Tokenizer(lambda text: encode(text, text_length), _text, len(CHARACTERS), pad=0)


def _text(ids):
    return "".join(CHARACTERS[int(i)] for i in ids).rstrip("_")


def encode(text: str, text_length: int = 5) -> Int[np.ndarray, " text_length"]:
    """Character ids of a text, filled up. Raises InvalidInput for other characters or a longer text."""
    if not 5 <= text_length <= 16:
        raise invalid("text_length", text_length, "it must lie in 5 .. 16")
    if len(text) > text_length:
        raise InvalidInput(f"The text {text!r} has {len(text)} characters, but there is room for {text_length}.")
    if set(text) - set(CHARACTERS):
        raise invalid("text", text, f"its characters must be among {CHARACTERS!r}")
    return np.array([CHARACTERS.index(c) for c in text.ljust(text_length, "_")], np.int32)


def embedding_table(embedding_dim: int = 8) -> Float[np.ndarray, "characters embedding_dim"]:
    """The vector of each character, entries -1 and 1: rows of a Hadamard matrix and their negatives.

    In 8 dimensions the 16 vectors have zero mean and unit covariance, and any two differ in at least 4 entries.
    """
    if embedding_dim not in (8, 16, 32):
        raise invalid("embedding_dim", embedding_dim, "it must be 8, 16 or 32")
    from scipy.linalg import hadamard

    rows = hadamard(embedding_dim)[:8]
    return np.concatenate([rows, -rows])[: len(CHARACTERS)].astype(np.float32)


def embed(tokens: Any, embedding_dim: int = 8) -> Float[np.ndarray, "*B text_length embedding_dim"]:
    """Character ids `[*B, text_length]` as vectors."""
    return embedding_table(embedding_dim)[np.asarray(tokens)]


def nearest_characters(embeddings: Numbers) -> Int[np.ndarray, "*B text_length"]:
    """The ids of the characters whose vectors lie nearest to `[*B, text_length, embedding_dim]`."""
    embeddings = np.asarray(embeddings, np.float32)
    # All vectors have one length, so the nearest is the one of largest inner product.
    return (embeddings @ embedding_table(embeddings.shape[-1]).T).argmax(-1).astype(np.int32)


def decode(embeddings: Numbers) -> list[str]:
    """The texts `[B]` of embeddings `[B, text_length, embedding_dim]`, without what fills them up at the end.

    A filling character inside a text stays visible as "_": such a text is no name.
    """
    return [_text(row) for row in nearest_characters(embeddings)]


def values(texts: Sequence[str]) -> Int[np.ndarray, " B"]:
    """The digit that each text names, -1 where it names none."""
    numbers = {name: i for i, name in enumerate(NAMES)}
    return np.array([numbers.get(text, -1) for text in texts], np.int64)


def verify(
    images: Numbers, embeddings: Numbers, logits: Callable[[Any], Any] | Any, label: Any = None
) -> dict[str, float]:
    """What pairs of images `[B, 8, 8, 1]` and text embeddings `[B, text_length, embedding_dim]` keep, each in [0, 1].

    logits: a classifier of digits, or its logits `[B, 10]` of the images.
    spelled: the text is a name. agreement: it names the digit that the classifier sees. With `label [B]`, what was
    asked for, also image and text, the share of either that shows it.
    """
    seen = np.asarray(logits(images) if callable(logits) else logits).argmax(axis=1)
    named = values(decode(embeddings))
    if seen.shape != named.shape:
        raise invalid("embeddings.shape[0]", len(named), f"there are {len(seen)} images")
    result = {"spelled": float((named >= 0).mean()), "agreement": float((seen == named).mean())}
    if label is not None:
        label = np.asarray(label)
        result |= {"image": float((seen == label).mean()), "text": float((named == label).mean())}
    return result
