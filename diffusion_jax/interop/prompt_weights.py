"""Weights of words within a prompt, in the syntax of the AUTOMATIC1111 web UI, and what they do to an encoding.

    (word)        1.1 times as much               [word]        1 / 1.1 times as much
    (word:1.3)    1.3 times as much               \\( \\) \\[ \\] \\\\  the characters themselves

Brackets nest, and their factors multiply: `((word))` weighs 1.21. One that is never closed reaches to the end; a
closing one that nothing opens is a character.
"""

import re
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.errors import invalid

OPEN = {"(": 1.1, "[": 1 / 1.1}
"""Opening brackets, and what a pair of them multiplies by."""

MOST = 1000
"""The largest weight, to either side."""

PIECES = re.compile(r"\\[()\[\]\\]|\\|[(\[]|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[)\]]|[^\\()\[\]:]+|:")
"""An escaped character, an opening bracket, a weight with its closing bracket, a closing bracket, or text."""


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """The prompt in parts of one weight each, without the brackets: `"a (red:1.3) cube"` is
    `[("a ", 1.0), ("red", 1.3), (" cube", 1.0)]`.

    Raises InvalidInput for a weight beyond `MOST`.
    """
    # A group is a list of texts and of (factor, group).
    outer: list = []
    stack = [("", outer)]
    opened = {"(": 0, "[": 0}

    def close(bracket, factor):
        """Closes the last `bracket`, and what was opened within it and never closed."""
        while True:
            last, group = stack.pop()
            opened[last] -= 1
            stack[-1][1].append((factor if last == bracket else OPEN[last], group))
            if last == bracket:
                return

    for match in PIECES.finditer(prompt):
        piece, weight = match.group(), match["weight"]
        if piece in OPEN:
            opened[piece] += 1
            stack.append((piece, []))
        elif (weight is not None or piece == ")") and opened["("]:
            close("(", OPEN["("] if weight is None else float(weight))
        elif piece == "]" and opened["["]:
            close("[", OPEN["["])
        else:
            stack[-1][1].append(piece[1:] if piece[0] == "\\" and len(piece) == 2 else piece)
    while len(stack) > 1:
        close(stack[-1][0], OPEN[stack[-1][0]])
    return _flattened(outer)


def _flattened(outer):
    parts: list[list] = []
    todo = [(1.0, outer, 0)]
    while todo:
        weight, group, at = todo.pop()
        if at < len(group):
            todo.append((weight, group, at + 1))
            entry = group[at]
            if isinstance(entry, tuple):
                todo.append((weight * entry[0], entry[1], 0))
            elif parts and parts[-1][1] == weight:
                parts[-1][0].append(entry)
            elif not abs(weight) <= MOST:
                raise invalid("the weight of a word", weight, f"it must lie in -{MOST} .. {MOST}")
            else:
                parts.append([[entry], weight])
    return [("".join(texts), weight) for texts, weight in parts] or [("", 1.0)]


Encoding = Float[Array, "B N D"]


def _mean_restored(z: Encoding, weights: Float[Array, "B N"], empty: Float[Array, "N D"]) -> Encoding:
    """The web UI's own: `z` times the weights, then scaled so that the mean over all of it is what it was."""
    scaled = weights[..., None] * z
    mean = jnp.mean(scaled, axis=(1, 2), keepdims=True)
    return scaled * jnp.mean(z, axis=(1, 2), keepdims=True) / jnp.where(mean == 0, 1.0, mean)


def _from_empty(z: Encoding, weights: Float[Array, "B N"], empty: Float[Array, "N D"]) -> Encoding:
    """ComfyUI's (and compel's for weights above 1): away from the encoding of an empty prompt, `e + w (z - e)`."""
    return empty + weights[..., None] * (z - empty)


WEIGHTINGS: dict[str, Callable[..., Encoding]] = {"a1111": _mean_restored, "comfyui": _from_empty}
"""What a weight does to a token's encoding, by the programs that do so: `(z, weights, empty) -> z`. Each chunk of each
sample is by itself."""


def weighted(rule: str, z: Encoding, weights: Float[Array, "B N"], empty: Float[Array, "N D"]) -> Encoding:
    """`z` by `WEIGHTINGS[rule]`; rows whose weights are all 1 stay bit for bit what they are."""
    plain = jnp.all(weights == 1, axis=1)[:, None, None]
    return jnp.where(plain, z, WEIGHTINGS[rule](z, weights, empty))
