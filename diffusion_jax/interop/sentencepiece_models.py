"""What a sentencepiece model file says, read without that package: pieces, scores, and how text is normalised."""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

NORMAL, UNKNOWN, USER_DEFINED, BYTE = 1, 2, 4, 6
"""Kinds of pieces in a sentencepiece model."""


class SentencePiece(NamedTuple):
    """What a sentencepiece model file says: `(piece, score, kind)` of each id, and how text is normalised."""

    pieces: list[tuple[str, float, int]]
    kind: int
    charsmap: bytes
    dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece(data: bytes) -> SentencePiece:
    """The fields of a sentencepiece `ModelProto` that decide how text is cut."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _messages(data):
        if number == 1:
            piece = dict(_messages(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_messages(value))
        elif number == 3:
            normalizer = dict(_messages(value))
    if UNKNOWN not in [kind for _, _, kind in pieces]:
        raise ValueError("it has no unknown piece")
    return SentencePiece(
        pieces, trainer.get(3, 1), normalizer.get(2, b""), bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
    )


def _messages(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: number and value, bytes for all but varints."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"byte {at} starts no field")
        if at > len(data):
            raise ValueError("it is cut short")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("it is cut short")
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
