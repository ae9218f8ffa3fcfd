"""Text to token ids and back: bytes, byte-pair encoding trained here, and a fixed list of words."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import InvalidInput, invalid, unknown


class Tokenizer(NamedTuple):
    """A reversible map between text and ids in `0 .. vocab_size - 1`.

    encode: str -> int32 `[n]`; decode: ids `[n]` -> str; pad: the id that fills up a row, None when there is none.
    """

    encode: Callable[[str], np.ndarray]
    decode: Callable[[Any], str]
    vocab_size: int
    pad: int | None = None


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes, 256 ids: any text round-trips. Ids that are not valid UTF-8 decode to the replacement character."""
    return Tokenizer(
        lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32),
        lambda ids: np.asarray(ids, np.uint8).tobytes().decode(errors="replace"),
        256,
    )


def bpe_tokenizer(texts: Sequence[str], vocab_size: int = 1024) -> Tokenizer:
    """Byte-level byte-pair encoding trained on `texts` (Sennrich et al. 2016): any text round-trips."""
    if vocab_size < 257:
        raise invalid("vocab_size", vocab_size, "byte-pair encoding needs at least 257: the 256 bytes and one merge")
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    return Tokenizer(
        lambda text: np.asarray(trained.encode(text).ids, np.int32),
        lambda ids: trained.decode([int(i) for i in ids]),
        trained.get_vocab_size(),
    )


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """One id per word of a fixed list; id 0 is padding, dropped when decoding. Other words raise InvalidInput."""
    ids = {word: i + 1 for i, word in enumerate(words)}
    if len(ids) != len(words):
        raise InvalidInput("The words of a tokenizer must be distinct.")

    def encode(text):
        parts = text.split()
        for word in parts:
            if word not in ids:
                raise unknown("word", word, words)
        return np.asarray([ids[word] for word in parts], np.int32)

    def decode(tokens):
        return " ".join(words[int(i) - 1] for i in tokens if int(i) != 0)

    return Tokenizer(encode, decode, len(words) + 1, pad=0)
