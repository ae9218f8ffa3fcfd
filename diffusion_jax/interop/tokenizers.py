"""Prompts to tokens by the files of a checkpoint: tokenizer.json, CLIP's vocab.json and merges.txt, T5's spiece.model.

All three become a pipeline of the `tokenizers` package; nothing is downloaded. Tokenizers of the library's own data are
in `data.tokenizers`.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Float, Int
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.interop.fields import REQUIRED, Fields
from diffusion_jax.interop.files import local_folder
from diffusion_jax.interop.sentencepiece_models import BYTE, NORMAL, UNKNOWN, USER_DEFINED, read_sentencepiece
from diffusion_jax.reading import read_bytes, read_json, read_text, regular_file

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")

ADDED = ("lstrip", "rstrip", "single_word", "normalized")

CLIP_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
T5_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
"""What stands for the tokens that a checkpoint's config leaves unsaid."""

CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""CLIP's words: letters, single digits, runs of anything else, English clitics (Radford et al. 2021, their code)."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How sentencepiece writes a space."""

NO_LIMIT = 10**6
"""A `model_max_length` beyond this is how their configs say that there is none."""

SHOWN = 120
"""How many characters a warning shows of each end of what is left out."""


MOST_BYTES = 2**28
"""256 MiB: many times the largest vocabulary that is published."""


class TokenBatch(NamedTuple):
    """Prompts as arrays: tokens, padded on the right, and the mask, True where a token is not padding."""

    tokens: Int[np.ndarray, "B M"]
    mask: Bool[np.ndarray, "B M"]


class TokenChunks(NamedTuple):
    """Prompts in n chunks of an encoder's length each: tokens, mask, and the weight of each token."""

    tokens: Int[np.ndarray, "B n M"]
    mask: Bool[np.ndarray, "B n M"]
    weights: Float[np.ndarray, "B n M"]


class Content(NamedTuple):
    """A text without start and end tokens: ids, and where each of them begins in the text."""

    ids: list[int]
    begins: list[int]


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer; `tokenizer(["a cat", ""], max_length=77)` is `TokenBatch` of shape `[2, 77]`.

    backend: the pipeline, which adds the start and end tokens of the checkpoint. pad, end: ids; a prompt that is too
    long is cut and keeps its end token, where the checkpoint has one; a warning names what is left out.
    max_length: the checkpoint's, or None. name: of its folder, for warnings.
    expansions: tokens that stand for several: the ids of all by the first one's (`textual_inversion`).
    """

    backend: Any
    pad: int
    end: int | None
    max_length: int | None
    name: str = "tokenizer"
    expansions: Mapping[int, tuple[int, ...]] = field(default_factory=dict, hash=False)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, prompt: str) -> list[int]:
        """The ids of one prompt with its start and end tokens, neither cut nor padded."""
        return [one for token in self.backend.encode(_encodable(prompt)).ids for one in self._expanded(token)]

    def _expanded(self, token: int) -> tuple[int, ...]:
        return self.expansions.get(token, (token,))

    def __call__(self, prompts: Sequence[Any], max_length: int | None = None) -> TokenBatch:
        """The prompts as `int32 [B, M]` and their mask, M = `max_length` or the checkpoint's.

        Warns of each prompt that is longer, with the words that are left out. Raises InvalidInput unless prompts is a
        list of strings and there is a length with room for a token.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise invalid("prompts", prompts, "a list of strings is needed")
        found = self.chunked([[(prompt, 1.0)] for prompt in prompts], max_length)
        return TokenBatch(found.tokens[:, 0], found.mask[:, 0])

    def chunked(
        self,
        texts: Sequence[Sequence[tuple[str, float]]],
        max_length: int | None = None,
        count: int = 1,
        hint: str = "",
    ) -> TokenChunks:
        """Texts in `count` chunks, each with start and end tokens and padding of its own.

        texts: each in parts with their weights, which are tokenized one by one. hint: a sentence for the end of the
        warning that names what has no place in the chunks.
        """
        length, start, end = self._ends(max_length)
        room = length - len(start) - len(end)
        shape = (len(texts), count, length)
        tokens, mask, weights = np.full(shape, self.pad, np.int32), np.zeros(shape, bool), np.ones(shape, np.float32)
        left_out = []
        for row, parts in enumerate(texts):
            contents = [self._content(text) for text, _ in parts]
            ids = [token for content in contents for token in content.ids]
            own = [weight for content, (_, weight) in zip(contents, parts) for _ in content.ids]
            for number in range(count):
                place = slice(number * room, (number + 1) * room)
                chunk = [*start, *ids[place], *end]
                tokens[row, number, : len(chunk)] = chunk
                mask[row, number, : len(chunk)] = True
                weights[row, number, len(start) : len(chunk) - len(end)] = own[place]
            if len(ids) > room * count:
                left_out.append((len(ids), _behind(parts, contents, room * count)))
        for total, words in dict.fromkeys(left_out):
            warnings.warn(
                f"{self.name} has room for {room * count} tokens, but a prompt has {total}; its end is left out: "
                f"{words!r}. {hint}".rstrip(),
                stacklevel=2,
            )
        return TokenChunks(tokens, mask, weights)

    def count_chunks(self, texts: Sequence[Sequence[tuple[str, float]]], max_length: int | None = None) -> int:
        """How many chunks the longest text fills, 1 or more."""
        length, start, end = self._ends(max_length)
        room = max(length - len(start) - len(end), 1)
        return max([1, *(-(-sum(len(self._content(text).ids) for text, _ in parts) // room) for parts in texts)])

    def _ends(self, max_length: int | None) -> tuple[int, list[int], list[int]]:
        """The length of a chunk, the tokens that start it and those that end it."""
        length = self.max_length if max_length is None else max_length
        if length is None:
            raise invalid("max_length", None, "the checkpoint names no length, so one must be given")
        whole, inner = self.encode("a"), self.backend.encode("a", add_special_tokens=False).ids
        before = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
        least = max(len(whole) - len(inner), 1)
        if isinstance(length, bool) or not isinstance(length, int) or length < least:
            raise invalid("max_length", length, f"at least {least} is needed")
        return length, whole[:before], whole[before + len(inner) :]

    def _content(self, text: str) -> Content:
        found = self.backend.encode(_encodable(text), add_special_tokens=False)
        every = [(one, begin) for token, (begin, _) in zip(found.ids, found.offsets) for one in self._expanded(token)]
        return Content([one for one, _ in every], [begin for _, begin in every])


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid("prompt", text, "half of a surrogate pair is no character") from None
    return text


def _behind(parts: Sequence[tuple[str, float]], contents: Sequence[Content], kept: int) -> str:
    """The text behind the first `kept` tokens, from the beginning of a word; the middle of a long one is left out."""
    at = 0
    while kept >= len(contents[at].ids):
        kept -= len(contents[at].ids)
        at += 1
    text, begin = parts[at][0], contents[at].begins[kept]
    while begin and not (text[begin - 1].isspace() or text[begin].isspace()):
        begin -= 1
    words = " ".join((text[begin:] + "".join(text for text, _ in parts[at + 1 :])).split())
    return words if len(words) <= 2 * SHOWN else f"{words[:SHOWN]} ... {words[-SHOWN:]}"


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a folder in the Hugging Face layout: tokenizer.json, or else CLIP's or T5's own files.

    Special tokens and the length are those of tokenizer_config.json and special_tokens_map.json.
    Raises InvalidInput where the files are missing or damaged, or belong to a tokenizer that is not known here.
    """
    path = local_folder(folder)
    if not path.is_dir():
        raise invalid("tokenizer", str(path), "a folder with the tokenizer's files is needed")
    file = path / "tokenizer_config.json"
    config = Fields(read_json(file) if file.is_file() else {}, str(file))
    named = _named_tokens(path, config)
    if (path / "tokenizer.json").is_file():
        backend = _built(path / "tokenizer.json", lambda file: tokenizers.Tokenizer.from_file(str(file)))
        backend.no_truncation()
        padding = backend.padding
        backend.no_padding()
        if padding and "pad_token" not in named:
            named["pad_token"] = AddedToken(padding["pad_token"], special=True)
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        kind = config.text("tokenizer_class", None) or "CLIPTokenizer"
        if kind not in ("CLIPTokenizer", "CLIPTokenizerFast"):
            raise InvalidInput(f"{path} holds the vocab.json and merges.txt of a {kind}: its tokenizer.json is needed.")
        named = {**_special(CLIP_TOKENS), **named}
        backend = _built(path / "vocab.json", lambda file: _clip(file, path / "merges.txt", named))
    elif (path / "spiece.model").is_file():
        named = {**_special(T5_TOKENS), **named}
        extra_ids = config.whole("extra_ids", 100, least=0, most=10**4)
        backend = _built(path / "spiece.model", lambda file: _sentencepiece(file, named, extra_ids))
    else:
        raise InvalidInput(f"{path} has no tokenizer.json, no vocab.json with merges.txt, and no spiece.model.")
    # What tokenizer.json says of a token says more than its name in a config.
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([named[name] for name in SPECIAL if name in named and named[name].content not in there])
    ids = {name: backend.token_to_id(token.content) for name, token in named.items()}
    if ids.get("pad_token") is None:
        raise InvalidInput(f"{path} names no padding token: tokenizer_config.json must give pad_token.")
    length = config.number("model_max_length", None, least=1)
    known = None if length is None or length >= NO_LIMIT else int(length)
    return Tokenizer(backend, ids["pad_token"], ids.get("eos_token"), known, path.name)


def _built(file: Path, build: Any) -> Any:
    try:
        return build(regular_file(file, MOST_BYTES))
    except InvalidInput:
        raise
    except Exception as error:
        # The package raises bare Exceptions.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InvalidInput(f"{file} is damaged or no tokenizer's file: {reason}.") from None


def _special(names: dict[str, str]) -> dict[str, AddedToken]:
    return {name: AddedToken(token, special=True) for name, token in names.items()}


def _named_tokens(path: Path, config: Fields) -> dict[str, AddedToken]:
    """The tokens that the configs name. Older folders say in a file of their own what then counts."""
    said, older = dict.fromkeys(SPECIAL, config), path / "special_tokens_map.json"
    if "added_tokens_decoder" not in config.values and older.is_file():
        more = Fields(read_json(older), str(older))
        said |= {name: more for name in SPECIAL if name in more.values}
    named = {}
    for name, fields in said.items():
        if isinstance(fields.raw(name), dict):
            token = fields.section(name)
            kept = {key: token.flag(key, False) for key in ADDED if key in token.values}
            named[name] = AddedToken(token.text("content", REQUIRED), special=True, **kept)
        elif (content := fields.text(name, None)) is not None:
            named[name] = AddedToken(content, special=True)
    return named


def _clip(vocab_file: Path, merges_file: Path, named: dict[str, AddedToken]) -> tokenizers.Tokenizer:
    """Lower-cased byte-pair encoding whose words end in "</w>" (Sennrich et al. 2016), between start and end tokens."""
    vocab = read_json(vocab_file)
    merges = []
    for number, line in enumerate(read_text(merges_file).splitlines()):
        parts = line.split()
        if not parts or (number == 0 and line.startswith("#version")):
            continue
        if len(parts) != 2 or "".join(parts) not in vocab:
            raise InvalidInput(
                f"{merges_file} is damaged: line {number + 1} is {line!r}, but two parts of a token of "
                f"{vocab_file.name} are needed."
            )
        merges.append(tuple(parts))
    ends = {}
    for name in ("eos_token", "bos_token"):
        token = named[name].content
        if token not in vocab:
            raise InvalidInput(f"{vocab_file} lacks the {name} {token!r}.")
        ends[name] = token, vocab[token]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=named["unk_token"].content,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.post_processor = processors.RobertaProcessing(
        ends["eos_token"], ends["bos_token"], trim_offsets=False, add_prefix_space=False
    )
    return backend


def _sentencepiece(file: Path, named: dict[str, AddedToken], extra_ids: int) -> tokenizers.Tokenizer:
    """A unigram model (Kudo 2018) with its own normalisation, and the end token behind.

    extra_ids: how many sentinels <extra_id_0>, ... T5 appends to its vocabulary, the last one first.
    """
    model = read_sentencepiece(read_bytes(file, MOST_BYTES))
    if model.kind != 1:
        raise InvalidInput(
            f"{file} is a sentencepiece model of kind {model.kind}, but only unigram models can be read."
        )
    kinds = [kind for _, _, kind in model.pieces]
    best = max((score for _, score, kind in model.pieces if kind == NORMAL), default=0.0)
    # The score by which sentencepiece makes sure that these pieces win.
    vocab = [
        (piece, len(piece.encode()) * best - 0.1 if kind == USER_DEFINED else score)
        for piece, score, kind in model.pieces
    ]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, kinds.index(UNKNOWN), byte_fallback=BYTE in kinds))
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" +"), " ")]
    steps += [normalizers.Prepend(" ")] if model.dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    backend.add_special_tokens([AddedToken(f"<extra_id_{i}>", special=True) for i in reversed(range(extra_ids))])
    end = named["eos_token"].content
    if backend.token_to_id(end) is None:
        raise InvalidInput(f"{file} lacks the eos_token {end!r}.")
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, backend.token_to_id(end))]
    )
    return backend
