"""Captions of pictures: text files beside them, and tables of file names and texts; their tokens."""

import csv
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.reading import file_within, parse_json, read_text

TABLES = ("metadata.jsonl", "metadata.csv", "captions.csv")
"""Tables of captions, in the folder of the pictures or of some of them."""

MAX_TABLE_BYTES = 2**30

MOST_TOKENS = 256
"""The length of captions where none is given and the longest has more."""


def read_captions(
    pictures: Sequence[Path], others: Sequence[Path], captions: str = "auto", text_column: str = "text"
) -> tuple[dict[Path, str], set[Path]]:
    """The captions of those pictures that have one, and the files that they stand in.

    others: the files beside the pictures. captions, text_column: see `image_folders.captioned_folder`.
    """
    if captions not in ("auto", "txt", *TABLES):
        raise unknown("captions", captions, ("auto", "txt", *TABLES))
    there, texts, used = set(others), {}, {}
    known = set(pictures)
    if captions in ("auto", "txt"):
        for picture in pictures:
            if (beside := picture.with_suffix(".txt")) in there:
                texts[picture], used[picture] = read_text(beside).removeprefix("\ufeff").strip(), beside
    tables = [path for path in others if path.name in TABLES and captions in ("auto", path.name)]
    for table in tables:
        for name, text in _rows(table, text_column):
            picture = file_within(table.parent, name, table)
            if picture not in known:
                raise InvalidInput(f"{str(table)!r} has a caption of {name!r}, which is no picture of the folder.")
            if picture in texts and texts[picture] != text:
                first = used[picture].name
                where = f"in {first!r} and in {table.name!r}" if first != table.name else f"in {str(table)!r}"
                raise InvalidInput(f"{str(picture)!r} has two captions {where}: {texts[picture]!r} and {text!r}.")
            texts[picture], used[picture] = text, table
    return texts, {*used.values(), *tables}


def _rows(table: Path, text_column: str) -> Iterator[tuple[str, str]]:
    """File names and texts of a table."""
    content = read_text(table, MAX_TABLE_BYTES).removeprefix("\ufeff")
    if table.suffix == ".jsonl":
        lines = enumerate(content.split("\n"), 1)
        rows = ((number, parse_json(line, f"{table}, line {number},")) for number, line in lines if line.strip())
    else:
        rows = _csv_rows(table, content, text_column)
    for number, row in rows:
        for column in ("file_name", text_column):
            if not isinstance(row.get(column), str):
                raise _no_text(table, number, column, row)
        yield row["file_name"], row[text_column].strip()


def _no_text(table, number, column, row):
    has = ", ".join(str(key) for key in row if key is not None) or "nothing"
    return InvalidInput(
        f"{table}, line {number}, has no text in the column {column!r}; it has {has}. Tables need the columns "
        "file_name and text (text_column= names another)."
    )


def _csv_rows(table, content, text_column):
    try:
        reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        for column in ("file_name", text_column):
            if column not in (reader.fieldnames or ()):
                raise _no_text(table, 1, column, reader.fieldnames or ())
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InvalidInput(f"{str(table)!r} is no CSV: {error}.") from None


def tokenized(texts: Sequence[str], tokenizer: Any, length: int | None, name: str) -> dict[str, np.ndarray]:
    """`tokens int32 [N, length]`, padded on the right, and `tokens_mask`, true where a token is of the text.

    length: that of the longest when None, and `MOST_TOKENS` at most.
    tokenizer: has `encode(text) -> ids`, `vocab_size`, and, where there are such, the ids `pad` and `end`. A text that
        is too long is cut and keeps its end; how many were is told in a warning.
    """
    if length is not None and length < 1:
        raise invalid("length", length, "it must be at least 1")
    ids_of = [list(tokenizer.encode(text)) for text in texts]
    length = min(MOST_TOKENS, max([1, *map(len, ids_of)])) if length is None else length
    pad, end = getattr(tokenizer, "pad", None) or 0, getattr(tokenizer, "end", None)
    tokens, mask = np.full((len(texts), length), pad, np.int32), np.zeros((len(texts), length), bool)
    long, longest = [], 0
    for row, (text, ids) in enumerate(zip(texts, ids_of, strict=True)):
        if len(ids) > length:
            long.append(text)
            longest = max(longest, len(ids))
            ids = [*ids[: length - 1], ids[-1] if ids[-1] == end else ids[length - 1]]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    if long:
        warnings.warn(
            f"{len(long)} of {len(texts)} captions of {name!r} have more than {length} tokens and are cut, such as "
            f"{long[0][:60]!r}; the longest has {longest} (length=).",
            stacklevel=3,
        )
    return {"tokens": tokens, "tokens_mask": mask}
