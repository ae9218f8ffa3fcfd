"""Values as a command line writes them: Python literals, and calls of constructors nested to any depth.

    50    1e3    (1, 2)    None    {"label": 10}    S/2    solvers.ddim(eta=0.5)    my_package.parts:my_solver(order=2)

The text is parsed (`ast`) and never evaluated: names have no meaning but as the name of a call, and there is no
arithmetic. What is no literal and no call is a string, so that strings need no quotes of their own.
"""

import ast
import io
import re
import tokenize
from typing import Any, NamedTuple

from diffusion_jax.errors import InvalidInput

NAMED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+|([^\W\d]\w*\.)*[^\W\d]\w*:[^\W\d]\w*")
"""The name of a constructor: "solvers.ddim", or "my_package.parts:my_solver"."""

WORDS = {"true": True, "false": False, "none": None}
LARGEST_EXACT = 2**53


class WrittenCall(NamedTuple):
    """`name(*positional, **named)` as it was written; arguments may hold calls in turn."""

    name: str
    positional: tuple[Any, ...]
    named: dict[str, Any]


def read_value(text: str) -> Any:
    """The value that `text` writes: a plain one, a `WrittenCall`, or lists, tuples and dicts with calls in them.

    `1e3` is the whole number 1000. Raises InvalidInput for what looks like a call and is none.
    """
    stripped = text.strip()
    if stripped.lower() in WORDS:
        return WORDS[stripped.lower()]
    try:
        readable = _with_plain_names(stripped)
        return _value(ast.parse(readable, mode="eval").body, readable)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError, tokenize.TokenError) as error:
        if "(" in stripped and is_call_text(stripped):
            expected = "a call reads name(argument=value, ...), such as solvers.ddim(eta=0.5)"
            raise InvalidInput(f"{text!r} cannot be read ({type(error).__name__}): {expected}.") from None
        return text


def is_call_name(text: str) -> bool:
    """Whether a text is the name of a constructor, and nothing else."""
    return NAMED.fullmatch(text.strip()) is not None


def is_call_text(text: str) -> bool:
    """Whether a text is the name of a constructor, alone or with an opening bracket after it."""
    found = NAMED.match(text.strip())
    return found is not None and text.strip()[found.end() :].lstrip()[:1] in ("", "(")


def outside_names(text: str) -> list[str]:
    """The names "package.module:name" that `text`, read as a value of a config, calls or might call."""

    def within(value: Any) -> list[str]:
        match value:
            case WrittenCall(name=name, positional=positional, named=named):
                return [*within(name), *within(positional), *within(named)]
            case dict():
                return within(list(value.values()))
            case list() | tuple():
                return [name for each in value for name in within(each)]
        return [value.strip()] if isinstance(value, str) and ":" in value and is_call_name(value) else []

    return [*within(text), *within(read_value(text))]


_COLON = "_colon_of_a_name_"
"""Stands for the colon of "package.module:thing", which Python's grammar does not have; it is no one's attribute."""


def _with_plain_names(text: str) -> str:
    """`text` with the colon in names of calls replaced, where Python's tokens say that it is one."""
    if ":" not in text or "(" not in text:
        return text
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string]
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    pieces, done = [], 0
    for before, token, after, bracket in zip(tokens, tokens[1:], tokens[2:], tokens[3:]):
        touches = before.end == token.start and token.end == after.start
        names = before.type == after.type == tokenize.NAME
        if token.string == ":" and names and touches and bracket.string == "(":
            at = offsets[token.start[0] - 1] + token.start[1]
            pieces += [text[done:at], f".{_COLON}."]
            done = at + 1
    return "".join([*pieces, text[done:]])


def _value(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Call(func=function, args=positional, keywords=named):
            name = _name(function)
            if not is_call_name(name):
                raise ValueError("a word and a bracket: some text")
            if any(isinstance(each, ast.Starred) for each in positional) or any(each.arg is None for each in named):
                raise ValueError("stars")
            return WrittenCall(
                name,
                tuple(_value(each, text) for each in positional),
                {str(each.arg): _value(each.value, text) for each in named},
            )
        case ast.Tuple(elts=entries):
            return tuple(_value(each, text) for each in entries)
        case ast.List(elts=entries):
            return [_value(each, text) for each in entries]
        case ast.Dict(keys=keys, values=values):
            if None in keys:
                raise ValueError("stars")
            return {ast.literal_eval(key): _value(each, text) for key, each in zip(keys, values) if key is not None}
    value = ast.literal_eval(node)
    if not isinstance(value, bool | int | float | str | None):
        raise ValueError("bytes, sets and complex numbers are no values of a config")
    written = ast.get_source_segment(text, node) if isinstance(value, float) else None
    return _whole(value, written)


def _whole(value: Any, written: str | None) -> Any:
    """A float that was written with an exponent, `1e3`, as the whole number that it is."""
    exponent = written is not None and "e" in written.lower() and value == value and abs(value) < LARGEST_EXACT
    return int(value) if exponent and value == int(value) else value


def _name(node: ast.expr) -> str:
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise ValueError("a name is needed")
    return ".".join([node.id, *reversed(names)]).replace(f".{_COLON}.", ":")
