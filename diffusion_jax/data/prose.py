"""English prose: the topics of Python's own documentation, about 460 thousand characters in the standard library."""

import functools

import numpy as np

from diffusion_jax.data.sources import ArraySource, check_split
from diffusion_jax.data.tokenizers import Tokenizer, bpe_tokenizer, byte_tokenizer
from diffusion_jax.errors import invalid, unknown

TOKENIZERS = ("bytes", "bpe")


def documents(split: str = "train") -> tuple[str, ...]:
    """The texts of a split in the order of their titles; every eighth topic is held out ("test")."""
    check_split(split)
    from pydoc_data.topics import topics

    # Some topics quote others word for word; a text is kept once, so that nothing held out was trained on.
    texts = list(dict.fromkeys(topics[title] for title in sorted(topics)))
    return tuple(text for i, text in enumerate(texts) if (i % 8 == 7) == (split == "test"))


def prose(
    split: str = "train",
    length: int = 128,
    tokenizer: str = "bytes",
    vocab_size: int = 1024,
    stride: int | None = None,
) -> ArraySource:
    """Windows of prose: tokens `int32 [N, length]`, cut from each text every `stride` tokens (`length` when None).

    tokenizer: "bytes" (256 ids) or "bpe" (byte-pair encoding trained on the train split, `vocab_size` ids). The source
        carries it as `source.tokenizer`; a mask token, where a process needs one, is the id `source.vocab_size`.
    """
    check_split(split)
    if tokenizer not in TOKENIZERS:
        raise unknown("tokenizer", tokenizer, TOKENIZERS)
    stride = length if stride is None else stride
    if length < 1 or stride < 1:
        raise invalid("length, stride", (length, stride), "both must be at least 1")
    codec = byte_tokenizer() if tokenizer == "bytes" else _trained(vocab_size)
    windows = []
    for text in documents(split):
        ids = codec.encode(text)
        windows.extend(ids[i : i + length] for i in range(0, len(ids) - length + 1, stride))
    if not windows:
        raise invalid("length", length, f"no text of the {split} split is that long")
    return ArraySource(np.stack(windows), {}, f"prose/{split}", vocab_size=codec.vocab_size, tokenizer=codec)


@functools.lru_cache(maxsize=4)
def _trained(vocab_size: int) -> Tokenizer:
    return bpe_tokenizer(documents("train"), vocab_size)
