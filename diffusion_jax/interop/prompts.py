"""From what a user asks for to the condition of a denoising network: labels, or prompts through the text encoders of a
pipeline, and what each family takes for "nothing asked"."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.interop.pretrained import Pretrained

PromptCondition = dict[str, Any]


class Prompter(NamedTuple):
    """What is asked, as conditions of the network.

    main: (prompts, size) -> cond, one row a prompt; size is height and width in pixels.
    null: (prompts, size) -> cond, from one negative prompt a row or None, for the other side of guidance.
    """

    main: Callable[[Sequence[Any], tuple[int, int]], PromptCondition]
    null: Callable[[Sequence[Any], tuple[int, int]], PromptCondition]


class PromptEncoder(NamedTuple):
    """A text encoder with its tokenizer: `encode(prompts) -> (Encoded, mask [B, M])`."""

    pretrained: Pretrained
    encode: Callable[[Sequence[str]], tuple[Any, Any]]


def text_encoder(pretrained: Pretrained, tokenizer: Any, max_length: int, masked: bool) -> PromptEncoder:
    """masked: whether the encoder is told which tokens are padding (T5 is, CLIP in Stable Diffusion is not)."""
    apply = jax.jit(pretrained.network.apply)

    def encode(prompts):
        tokens, mask = tokenizer(list(prompts), max_length=max_length)
        tokens, mask = jnp.asarray(tokens), jnp.asarray(mask, bool)
        return apply(pretrained.params, tokens, mask if masked else None), mask

    return PromptEncoder(pretrained, encode)


def class_labels(num_classes: int, names: Mapping[str, str] | None = None) -> Prompter:
    """Numbers of classes, or their names. names: number to names with commas between, as in DiT's model_index.json."""
    known = {}
    for number, text in (names or {}).items():
        known.update({name.strip(): int(number) for name in text.split(",")})

    def label(prompt):
        if isinstance(prompt, int | np.integer) or (isinstance(prompt, str) and prompt.strip().isdigit()):
            if not 0 <= int(prompt) < num_classes:
                raise invalid("label", int(prompt), f"the network knows the classes 0 to {num_classes - 1}")
            return int(prompt)
        if prompt not in known:
            raise unknown("class", prompt, known or ["0"])
        return known[prompt]

    def main(prompts, size):
        return {"label": jnp.asarray([label(prompt) for prompt in prompts], jnp.int32)}

    def null(prompts, size):
        if any(prompts):
            raise InvalidInput("A class-conditional network takes no negative prompts: leave negative= out.")
        return {"label": jnp.full((len(prompts),), num_classes, jnp.int32)}

    return Prompter(main, null)


def clip_prompts(encoder: PromptEncoder, clip_skip: int = 0) -> Prompter:
    """Stable Diffusion 1 and 2: the last hidden states of CLIP, unmasked. clip_skip: layers left out at the end."""

    def main(prompts, size):
        encoded, _ = encoder.encode(_texts(prompts))
        if not clip_skip:
            return {"context": encoded.hidden}
        return {
            "context": encoder.pretrained.network.final_norm(
                encoder.pretrained.params, encoded.hidden_states[-1 - clip_skip]
            )
        }

    return Prompter(main, lambda prompts, size: main(_texts(prompts), size))


def double_clip_prompts(
    encoders: Sequence[PromptEncoder], zero_empty: bool, aesthetic_scores: tuple[float, float] | None = None
) -> Prompter:
    """SDXL: the penultimate hidden states of its encoders side by side, the last one's pooled text, and sizes.

    zero_empty: whether no negative prompt means zeros instead of the empty prompt.
    aesthetic_scores: of the main and the null condition; the refiner sees one in place of the size that is aimed at.
    """

    def encode(prompts, size, score):
        results = [encoder.encode(_texts(prompts))[0] for encoder in encoders]
        numbers = [*size, 0.0, 0.0, *(size if aesthetic_scores is None else (score,))]
        return {
            "context": jnp.concatenate([result.hidden_states[-2] for result in results], axis=-1),
            "pooled": results[-1].pooled,
            "time_ids": jnp.broadcast_to(jnp.asarray(numbers, jnp.float32), (len(prompts), len(numbers))),
        }

    scores = aesthetic_scores or (0.0, 0.0)

    def null(prompts, size):
        cond = encode(prompts, size, scores[1])
        if zero_empty:
            empty = jnp.asarray([prompt is None for prompt in prompts])
            cond["context"] = jnp.where(empty[:, None, None], 0.0, cond["context"])
            cond["pooled"] = jnp.where(empty[:, None], 0.0, cond["pooled"])
        return cond

    return Prompter(lambda prompts, size: encode(prompts, size, scores[0]), null)


def t5_prompts(encoder: PromptEncoder, sized: bool) -> Prompter:
    """PixArt: masked hidden states of T5 of the prompt in lower case. sized: whether sizes are conditions too."""

    def main(prompts, size):
        encoded, mask = encoder.encode([text.lower().strip() for text in _texts(prompts)])
        cond = {"context": encoded.hidden, "context_mask": mask}
        if sized:
            count = len(prompts)
            cond["size"] = jnp.broadcast_to(jnp.asarray(size, jnp.float32), (count, 2))
            cond["aspect"] = jnp.full((count,), size[0] / size[1], jnp.float32)
        return cond

    return Prompter(main, main)


def _texts(prompts):
    for prompt in prompts:
        if not isinstance(prompt, str | None):
            raise invalid("prompt", prompt, "a text is needed")
    return [prompt or "" for prompt in prompts]
