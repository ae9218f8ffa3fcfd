"""From what a user asks for to the condition of a denoising network: labels, or prompts through the text encoders of a
pipeline, and what each family takes for "nothing asked"."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from diffusion_jax.errors import InvalidInput, invalid, nearest, unknown
from diffusion_jax.interop.pretrained import Pretrained
from diffusion_jax.interop.prompt_weights import WEIGHTINGS, weighted, weighted_parts
from diffusion_jax.interop.tokenizers import Tokenizer
from diffusion_jax.models import Encoder
from diffusion_jax.models.encoders import Encoded

PromptCondition = dict[str, Any]

MOST_CHUNKS = 64
"""A prompt of more chunks than this is no prompt."""


class PromptReading(NamedTuple):
    """How prompts are read.

    chunks: the chunks that a text may fill, 75 tokens of CLIP each. Each has start and end tokens and is encoded by
        itself; the encodings follow each other, as in the AUTOMATIC1111 web UI, and the pooled one is the first's. What
        is beyond is left out, with a warning.
    weighting: a key of `WEIGHTINGS`, by which `(word:1.3)` weighs; None takes brackets as they are written.
    clip_skip: layers of CLIP left out at the end of what is asked for. As in diffusers (one less than the number that
        the web UI calls so), in SDXL beyond the one that is always left out, and not for negative prompts.
    """

    chunks: int = 1
    weighting: Any = None
    clip_skip: Any = 0


PLAIN = PromptReading()


class Prompter(NamedTuple):
    """What is asked, as conditions of the network.

    main: (prompts, size, reading=PLAIN) -> cond, one row a prompt; size is height and width in pixels.
    null: (prompts, size, reading=PLAIN) -> cond, from a negative prompt or None a row: the other side of guidance.
    chunks: (prompts, reading) -> how many chunks of an encoder the longest fills.
    encoders: the encoders of CLIP behind it. with_encoders: (encoders) -> the same with others in their places.
    framed: (original [N, 2], corner [N, 2], size) -> the entries of cond that say how pictures lie in their frame, one
        row a picture: those of training data, which were this high and wide in their files, and were cropped (after
        they were resized) at this top and left corner. Nothing where the network does not read it.
    """

    main: Callable[..., PromptCondition]
    null: Callable[..., PromptCondition]
    chunks: Callable[[Sequence[Any], PromptReading], int] = lambda prompts, reading: 1
    encoders: tuple[Any, ...] = ()
    with_encoders: Callable[..., Any] | None = None
    framed: Callable[..., PromptCondition] = lambda original, corner, size: {}


class EncodedText(NamedTuple):
    """hidden: what the chunks of a text were encoded to, one behind the other. mask: its tokens without the padding.
    pooled: of the first chunk."""

    hidden: Float[Array, "B M D"]
    mask: Bool[Array, "B M"]
    pooled: Float[Array, "B P"] | None


class PromptEncoder(NamedTuple):
    """A text encoder with its tokenizer.

    encode: (texts, reading, hidden) -> EncodedText; `hidden: Encoded -> [B, N, D]` says which states are wanted.
    chunks: (texts, reading) -> how many chunks the longest fills.
    with_parts: (pretrained, tokenizer) -> the same with others in their places.
    """

    pretrained: Pretrained
    tokenizer: Tokenizer
    encode: Callable[..., EncodedText]
    chunks: Callable[[Sequence[str], PromptReading], int]
    with_parts: Callable[[Pretrained, Tokenizer], Any]


def text_encoder(pretrained: Pretrained, tokenizer: Tokenizer, max_length: int, masked: bool) -> PromptEncoder:
    """masked: whether the encoder is told which tokens are padding (T5 is, CLIP in Stable Diffusion is not); then it
    reads one chunk, without weights."""
    apply = jax.jit(pretrained.network.apply)
    hint = "" if masked else "chunks='auto' (--chunks=auto) keeps it."

    def encode(texts, reading, hidden=lambda encoded: encoded.hidden):
        if masked and reading != PLAIN:
            raise InvalidInput(f"chunks, weighting and clip_skip are of CLIP; this encoder reads {max_length} tokens.")
        found = tokenizer.chunked(_parts(texts, reading), max_length, reading.chunks, hint)
        count, chunks, length = found.tokens.shape
        rows = count * chunks, length
        tokens, mask = jnp.asarray(found.tokens.reshape(rows)), jnp.asarray(found.mask.reshape(rows))
        encoded = apply(pretrained.params, tokens, mask if masked else None)
        z = hidden(encoded)
        if (found.weights != 1).any():
            empty = jnp.asarray(tokenizer.chunked([[("", 1.0)]], max_length).tokens[0])
            weights = jnp.asarray(found.weights.reshape(rows))
            z = weighted(reading.weighting, z, weights, hidden(apply(pretrained.params, empty, None))[0])
        pooled = encoded.pooled
        return EncodedText(
            z.reshape(count, chunks * length, -1),
            mask.reshape(count, chunks * length),
            None if pooled is None else pooled[::chunks],
        )

    def chunks(texts, reading):
        return 1 if masked else tokenizer.count_chunks(_parts(texts, reading), max_length)

    def with_parts(pretrained, tokenizer):
        return text_encoder(pretrained, tokenizer, max_length, masked)

    return PromptEncoder(pretrained, tokenizer, encode, chunks, with_parts)


def _parts(texts, reading):
    if reading.weighting is None:
        return [[(text, 1.0)] for text in texts]
    if reading.weighting not in WEIGHTINGS:
        raise unknown("weighting", reading.weighting, WEIGHTINGS)
    return [weighted_parts(text) for text in texts]


def class_prompts(num_classes: int, names: Any = None) -> Prompter:
    """Numbers of classes, or their names. names: number to names with commas between, as in DiT's model_index.json."""
    known: dict[str, list[int]] = {}
    if not isinstance(names, Mapping | None):
        raise invalid("model_index.json: id2label", names, "a number and names for each class are needed")
    for number, text in (names or {}).items():
        if not re.fullmatch(r"\d{1,9}", str(number)) or not isinstance(text, str):
            raise invalid(
                "model_index.json: id2label", {number: text}, "the number of a class and its names are needed"
            )
        for name in dict.fromkeys([text.strip(), *(name.strip() for name in text.split(","))]):
            known.setdefault(name, []).append(int(number))

    def label(prompt):
        if isinstance(prompt, str) and re.fullmatch(r"\s*[+-]?\d{1,9}\s*", prompt):
            prompt = int(prompt)
        if isinstance(prompt, int | np.integer) and not isinstance(prompt, bool):
            if not 0 <= prompt < num_classes:
                raise invalid("label", int(prompt), f"the network knows the classes 0 to {num_classes - 1}")
            return int(prompt)
        if not isinstance(prompt, str):
            raise invalid("label", prompt, "the number or the name of a class is needed")
        numbers = known.get(prompt.strip())
        if numbers is None:
            close = nearest(prompt, known)
            hint = f"did you mean {close!r}?" if close else f"give a number, 0 to {num_classes - 1}"
            raise invalid("class", prompt, f"no class of the network is called so: {hint}")
        if len(numbers) > 1:
            raise invalid("class", prompt, f"it names the classes {', '.join(map(str, numbers))}: give the number")
        return label(numbers[0])

    def check(reading):
        if reading != PLAIN:
            raise InvalidInput("chunks, weighting and clip_skip are of CLIP, but this network knows classes.")

    def main(prompts, size, reading=PLAIN):
        check(reading)
        return {"label": jnp.asarray([label(prompt) for prompt in prompts], jnp.int32)}

    def null(prompts, size, reading=PLAIN):
        check(reading)
        if any(prompt not in (None, "") for prompt in prompts):
            raise InvalidInput("A class-conditional network takes no negative prompts: leave negative= out.")
        return {"label": jnp.full((len(prompts),), num_classes, jnp.int32)}

    return Prompter(main, null)


def clip_prompts(encoder: PromptEncoder) -> Prompter:
    """Stable Diffusion 1 and 2: the last hidden states of CLIP, unmasked, normalised also where layers are left out."""
    network: Encoder = encoder.pretrained.network

    def hidden(skipped):
        def pick(encoded: Encoded):
            if not skipped:
                return encoded.hidden
            return network.final_norm(encoder.pretrained.params, encoded.hidden_states[-1 - skipped])

        return pick

    def context(texts, reading, skipped):
        return {"context": encoder.encode(texts, reading, hidden(skipped)).hidden}

    def main(prompts, size, reading=PLAIN):
        _check_skip(reading, [encoder], 1)
        return context(_texts(prompts), reading, reading.clip_skip)

    def null(prompts, size, reading=PLAIN):
        return context(_negatives(prompts), reading, 0)

    def chunks(prompts, reading):
        return encoder.chunks(_negatives(prompts), reading)

    return Prompter(main, null, chunks, (encoder,), lambda encoders: clip_prompts(*encoders))


def double_clip_prompts(
    encoders: Sequence[PromptEncoder], zero_empty: bool, aesthetic_scores: tuple[float, float] | None = None
) -> Prompter:
    """SDXL: the penultimate hidden states of its encoders side by side, the last one's pooled text, and sizes.

    zero_empty: whether no negative prompt means zeros instead of the empty prompt.
    aesthetic_scores: of the main and the null condition; the refiner sees one in place of the size that is aimed at.
    """

    def encode(texts, size, reading, skipped, score):
        results = [encoder.encode(texts, reading, lambda e: e.hidden_states[-2 - skipped]) for encoder in encoders]
        numbers = [*size, 0.0, 0.0, *(size if aesthetic_scores is None else (score,))]
        return {
            "context": jnp.concatenate([result.hidden for result in results], axis=-1),
            "pooled": results[-1].pooled,
            "time_ids": jnp.broadcast_to(jnp.asarray(numbers, jnp.float32), (len(texts), len(numbers))),
        }

    scores = aesthetic_scores or (0.0, 0.0)

    def framed(original, corner, size):
        last = np.asarray(size if aesthetic_scores is None else scores[:1], np.float32)
        rows = np.broadcast_to(last, (len(original), len(last)))
        return {"time_ids": np.concatenate([original, corner, rows], axis=1).astype(np.float32)}

    def main(prompts, size, reading=PLAIN):
        _check_skip(reading, encoders, 2)
        return encode(_texts(prompts), size, reading, reading.clip_skip, scores[0])

    def null(prompts, size, reading=PLAIN):
        cond = encode(_negatives(prompts), size, reading, 0, scores[1])
        if zero_empty:
            empty = jnp.asarray([prompt is None for prompt in prompts])
            cond["context"] = jnp.where(empty[:, None, None], 0.0, cond["context"])
            cond["pooled"] = jnp.where(empty[:, None], 0.0, cond["pooled"])
        return cond

    def chunks(prompts, reading):
        return max(encoder.chunks(_negatives(prompts), reading) for encoder in encoders)

    def with_encoders(encoders):
        return double_clip_prompts(encoders, zero_empty, aesthetic_scores)

    return Prompter(main, null, chunks, tuple(encoders), with_encoders, framed)


def t5_prompts(encoder: PromptEncoder, sized: bool) -> Prompter:
    """PixArt: masked hidden states of T5 of the prompt in lower case. sized: whether sizes are conditions too."""

    def encode(texts, size, reading):
        encoded = encoder.encode([text.lower().strip() for text in texts], reading)
        cond = {"context": encoded.hidden, "context_mask": encoded.mask}
        if sized:
            count = len(texts)
            cond["size"] = jnp.broadcast_to(jnp.asarray(size, jnp.float32), (count, 2))
            cond["aspect"] = jnp.full((count,), size[0] / size[1], jnp.float32)
        return cond

    def framed(original, corner, size):
        # As it was trained: at the size that its pictures have, whatever they had before.
        count = len(original)
        rows = np.broadcast_to(np.asarray(size, np.float32), (count, 2))
        return {"size": rows, "aspect": np.full(count, size[0] / size[1], np.float32)} if sized else {}

    return Prompter(
        lambda prompts, size, reading=PLAIN: encode(_texts(prompts), size, reading),
        lambda prompts, size, reading=PLAIN: encode(_negatives(prompts), size, reading),
        framed=framed,
    )


def _check_skip(reading, encoders, kept):
    """Raises InvalidInput unless `kept` layers of each encoder remain."""
    most = max(min(encoder.pretrained.network.module.depth for encoder in encoders) - kept, 0)
    skipped = reading.clip_skip
    if isinstance(skipped, bool) or not isinstance(skipped, int | np.integer) or not 0 <= skipped <= most:
        raise invalid("clip_skip", skipped, f"a number of layers in 0 .. {most} is needed")


def _texts(prompts):
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise invalid("prompt", prompt, "a text is needed")
    return list(prompts)


def _negatives(prompts):
    return _texts(["" if prompt is None else prompt for prompt in prompts])
