"""Textual inversion (Gal et al. 2022): words with embeddings of their own, in and out.

A file holds the vectors of a word for each text encoder. `with_embeddings` gives a pipeline the word: its tokenizers a
token for each vector, its encoders a row for each token. Nothing is changed in place; the pipeline is another value.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import AddedToken

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.interop.files import PICKLES, TensorFiles, local_folder
from diffusion_jax.interop.pipelines import Pipeline
from diffusion_jax.interop.pretrained import Pretrained
from diffusion_jax.interop.prompts import PromptEncoder
from diffusion_jax.interop.tokenizers import Tokenizer
from diffusion_jax.models.encoders import encoder as encoder_of
from diffusion_jax.models.text_encoders import HIGHEST_ID

ENCODERS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
"""Names of the tensors of a file for the two encoders of SDXL, in their order."""

UNNAMED = ("emb_params", "*")
"""What the AUTOMATIC1111 web UI calls the vectors of a word whose name is that of the file."""

FILE = "learned_embeds.safetensors"

MOST_VECTORS = 1000


class WordEmbedding(NamedTuple):
    """A word of prompts and its vectors, `[n, D]` for each text encoder."""

    word: str
    vectors: tuple[np.ndarray, ...]


def load_embeddings(path: str | os.PathLike, word: str | None = None) -> tuple[WordEmbedding, ...]:
    """The words of a file: of diffusers (words by name), of the web UI (one, called like the file), or for SDXL.

    word: the name of the word, in place of the file's. Words `w`, `w_1`, `w_2`, ... of one file are the vectors of `w`.
    Raises InvalidInput for a pickle, and for tensors that are no such vectors.
    """
    location = local_folder(path)
    if location.is_dir():
        pickles = sorted(file for file in location.glob("learned_embeds.*") if file.suffix in PICKLES)
        if not (location / FILE).is_file() and pickles:
            location = pickles[0]
        elif (location / FILE).is_file():
            location = location / FILE
    files = TensorFiles(location)
    names = files.names
    told = files.metadata().get("word", location.stem)
    for both in ENCODERS:
        if set(names) & set(both):
            if extra := sorted(set(names) - set(both)):
                raise InvalidInput(f"{location} holds {extra[0]} beside {both[0]}: no such encoder is known.")
            found = [WordEmbedding(told, tuple(_vectors(files, name, location) for name in both if name in names))]
            if len({len(one) for one in found[0].vectors}) > 1:
                counts = [len(one) for one in found[0].vectors]
                raise InvalidInput(
                    f"{location} holds {counts} vectors for its encoders, but they must be equally many."
                )
            break
    else:
        if len(names) == 1 and names[0] in UNNAMED:
            found = [WordEmbedding(told, (_vectors(files, names[0], location),))]
        else:
            found = _joined({name: _vectors(files, name, location) for name in names})
    if word is not None:
        if len(found) > 1:
            raise invalid("word", word, f"{location} holds several: {', '.join(one.word for one in found)}")
        found = [found[0]._replace(word=word)]
    for one in found:
        _check_word(one.word)
    return tuple(found)


def _vectors(files: TensorFiles, name: str, location: Path) -> np.ndarray:
    shape = files.shape(name)
    if len(shape) not in (1, 2) or not all(shape) or (len(shape) == 2 and shape[0] > MOST_VECTORS):
        raise InvalidInput(f"{location}: {name} is {list(shape)}, but vectors of a word are [n, D] or [D].")
    value = files.read(name).astype(np.float32)
    if not np.isfinite(value).all():
        raise InvalidInput(f"{location}: {name} holds numbers that are not finite.")
    return value.reshape(-1, shape[-1])


def _joined(vectors: dict[str, np.ndarray]) -> list[WordEmbedding]:
    """Words, with those that are another's further vectors behind it."""
    taken, found = set(), []
    for word, first in vectors.items():
        parts = [first]
        while (more := f"{word}_{len(parts)}") in vectors and len(first) == 1:
            parts.append(vectors[more])
            taken.add(more)
        found.append((word, parts))
    return [WordEmbedding(word, (np.concatenate(parts),)) for word, parts in found if word not in taken]


def _check_word(word: Any) -> None:
    if not isinstance(word, str) or not word.strip() or word != word.strip():
        raise invalid("word", word, "a word, without spaces around it, is needed")


def with_embeddings(
    pipeline: Pipeline, embeddings: str | os.PathLike | Sequence[WordEmbedding], word: str | None = None
) -> Pipeline:
    """The pipeline that knows the words of a file (see `load_embeddings`), or these.

        pipeline = with_embeddings(pipeline, "cat-toy.safetensors", word="<cat-toy>")
        generate(pipeline, key, ["a <cat-toy> on a table"])

    Raises InvalidInput for a word that is there already, for vectors of other encoders, and for a pipeline without
    CLIP.
    """
    if isinstance(embeddings, str | os.PathLike):
        embeddings = load_embeddings(embeddings, word)
    elif word is not None:
        raise invalid("word", word, "words that are given have their names")
    encoders = list(pipeline.prompter.encoders)
    if not encoders or pipeline.prompter.with_encoders is None:
        raise InvalidInput("Words with embeddings are of CLIP, but this pipeline has no encoder of it.")
    for one in embeddings:
        _check_word(one.word)
        for number, vectors in enumerate(_by_encoder(one, encoders)):
            encoders[number] = _extended(encoders[number], one.word, vectors)
    return pipeline._replace(prompter=pipeline.prompter.with_encoders(encoders))


def _by_encoder(embedding: WordEmbedding, encoders: Sequence[PromptEncoder]) -> list[np.ndarray]:
    """The vectors for each encoder: in their order, or for one encoder those of its width."""
    widths = [encoder.pretrained.network.module.width for encoder in encoders]
    there = [np.shape(vectors) for vectors in embedding.vectors]
    if [shape[-1] for shape in there] == widths and all(len(shape) == 2 for shape in there):
        return list(embedding.vectors)
    fitting = [vectors for vectors in embedding.vectors if np.ndim(vectors) == 2 and vectors.shape[-1] == widths[0]]
    if len(widths) == 1 and len(fitting) == 1:
        return fitting
    told, here = ", ".join(str(list(shape)) for shape in there), " and ".join(map(str, widths))
    raise InvalidInput(
        f"The word {embedding.word!r} has vectors {told}, but the text encoders of this pipeline have a width of "
        f"{here}: it is for another."
    )


def _extended(encoder: PromptEncoder, word: str, vectors: np.ndarray) -> PromptEncoder:
    tokenizer, ids = _with_tokens(encoder.tokenizer, word, len(vectors))
    return encoder.with_parts(_with_rows(encoder.pretrained, tokenizer, ids, vectors), tokenizer)


def _with_tokens(tokenizer: Tokenizer, word: str, count: int) -> tuple[Tokenizer, list[int]]:
    words = [word, *(f"{word}_{i}" for i in range(1, count))]
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    for one in words:
        if backend.token_to_id(one) is not None:
            raise invalid("word", one, "the tokenizer has it already: give word= another name")
    backend.add_tokens([AddedToken(one, normalized=True) for one in words])
    vocabulary = backend.get_vocab()
    ids = [vocabulary[one] for one in words]
    expansions = {**tokenizer.expansions, **({ids[0]: tuple(ids)} if count > 1 else {})}
    return replace(tokenizer, backend=backend, expansions=expansions), ids


def _with_rows(pretrained: Pretrained, tokenizer: Tokenizer, ids: list[int], vectors: np.ndarray) -> Pretrained:
    module, params = pretrained.network.module, pretrained.params
    rows = params["embed"]["embedding"]
    lacking = max(*ids, len(rows) - 1) + 1 - len(rows)
    rows = jnp.concatenate([rows, jnp.zeros((lacking, rows.shape[1]), rows.dtype)]) if lacking else rows
    rows = rows.at[jnp.asarray(ids)].set(jnp.asarray(vectors, rows.dtype))
    # The end of a prompt was its highest id, which a new word's now is.
    eos = tokenizer.end if module.eos == HIGHEST_ID and tokenizer.end is not None else module.eos
    network = encoder_of(module.clone(vocab_size=len(rows), eos=eos))
    return pretrained._replace(network=network, params={**params, "embed": {"embedding": rows}})


def embedding_of(pipeline: Pipeline, word: str) -> WordEmbedding:
    """The vectors that a pipeline of `with_embeddings` has for a word, as they are now."""
    vectors = []
    for encoder in pipeline.prompter.encoders:
        token = encoder.tokenizer.backend.token_to_id(word)
        if token is None:
            raise invalid("word", word, "the pipeline has no such word: give it by with_embeddings")
        ids = encoder.tokenizer.expansions.get(token, (token,))
        vectors.append(np.asarray(encoder.pretrained.params["embed"]["embedding"], np.float32)[list(ids)])
    return WordEmbedding(word, tuple(vectors))


def save_embeddings(path: str | os.PathLike, *embeddings: WordEmbedding) -> Path:
    """Writes words as diffusers reads them; one word for two encoders as programs for SDXL do. Returns the file."""
    file = Path(path)
    if file.suffix != ".safetensors":
        raise invalid("path", str(path), "the name of a .safetensors file is needed")
    counts = {len(one.vectors) for one in embeddings}
    if counts == {1}:
        tensors = {one.word: one.vectors[0] for one in embeddings}
        if len(tensors) < len(embeddings):
            raise invalid("embeddings", [one.word for one in embeddings], "each word may be there once")
        metadata = {"format": "pt"}
    elif counts == {2} and len(embeddings) == 1:
        tensors = dict(zip(ENCODERS[0], embeddings[0].vectors, strict=True))
        metadata = {"format": "pt", "word": embeddings[0].word}
    else:
        raise InvalidInput("A file holds words for one text encoder, or one word for two.")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.array(value, np.float32, order="C") for name, value in tensors.items()}, file, metadata)
    return file
