"""A config as a person reads it: every field with its value, its type and what it means, as overrides to be copied.

    --config.optimizer.learning_rate.peak=0.002                 # an int or a float: ...

Applied to a config one after the other, the lines make the config that they show.
"""

import inspect
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config import as_plain, parts, takes_any_name
from diffusion_jax.config.calls import OF_FLAX
from diffusion_jax.config.literals import read_value
from diffusion_jax.places import ABOUT, ENTRIES, GROUPS, PARTS, entries_of

COLUMN, WIDTH, MOST_OPTIONS = 64, 100, 3
"""Where comments begin, how long they may be, and how many types they name."""

FOLLOWS = {
    ("optimizer", "total_steps"): "as many as train.steps",
    ("sampling.condition", "num_classes"): "as many as the data have",
}
"""What an argument within a place is where it is None, since a run hands it over."""


def config_text(config: ConfigDict) -> str:
    """All fields of `config`, one a line: `--config.field=value  # type: meaning`."""
    blocks = []
    for name in sorted(config.keys(), key=lambda name: ([*ORDER, name].index(name), name)):
        entry = config[name]
        lines = list(_lines(entry, (name,), _taken_at(name), ABOUT.get(name, "")))
        if name == "sampling" and config.sampling.get("ema") and not entries_of("ema", config):
            lines.append(
                ("", "sampling.ema has no effect: no averages are kept, the parameters themselves are sampled")
            )
        blocks.append("\n".join(_aligned(assignment, comment) for assignment, comment in lines))
    return "\n\n".join(blocks)


def argument_meanings(function: Any) -> dict[str, str]:
    """The first sentence that the docstring of a constructor says about each of its arguments: "name: ..."."""
    found = {}
    for paragraph in re.split(r"\n(?=\s*`?\w+`?(?:, `?\w+`?)*: )|\n\s*\n", inspect.getdoc(function) or ""):
        match = re.match(r"\s*(`?\w+`?(?:, `?\w+`?)*): (.*)", paragraph, re.DOTALL)
        if match:
            for name in re.findall(r"\w+", match[1]):
                found.setdefault(name, _first_sentence(match[2]))
        for name, meaning in re.findall(r"`(\w+)`: ([^.]*)", paragraph):
            found.setdefault(name, " ".join(meaning.split()))
    return found


def written(value: Any) -> str:
    """A value as a command line reads it: a literal, or a call with its arguments."""
    if isinstance(value, Mapping | ConfigDict):
        if isinstance(value.get("call"), str):
            arguments = ", ".join(f"{key}={written(each)}" for key, each in value.items() if key != "call")
            return f"{value['call']}({arguments})"
        return "{" + ", ".join(f"{written(key)}: {written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, str):
        # In double quotes, which stand within a shell's single ones.
        return json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, tuple):
        return (
            "(" + "".join(f"{written(each)}, " for each in value).removesuffix(" " if len(value) == 1 else ", ") + ")"
        )
    return f"[{', '.join(map(written, value))}]" if isinstance(value, list) else repr(value)


ORDER = (*ENTRIES, "metrics")

Line = tuple[str, str]
"""An override, and what is said of it."""


def _lines(entry: Any, at: tuple[str, ...], takes: Any, about: str) -> Iterator[Line]:
    path = ".".join(at)
    if isinstance(entry, ConfigDict) and "call" in entry:
        yield from _call_lines(entry, at, takes, about)
    elif isinstance(entry, ConfigDict) and entry and (_calls_within(entry) or path in ABOUT):
        if about:
            yield "", f"{path}: {about}"
        for name, value in entry.items():
            inside = f"{path}.{name}"
            within = GROUPS.get(path, _taken_at(inside)) if takes is Any else parts.within(takes, name)
            yield from _lines(value, (*at, name), within, ABOUT.get(inside, ""))
    else:
        yield _assignment(path, entry), _described(entry, takes, about)
        for number, value in enumerate(entry) if isinstance(entry, list | tuple) else ():
            if isinstance(value, Mapping) and "call" in value:
                lines = _lines(ConfigDict(value), (*at, str(number)), parts.within(takes), "")
                yield from (
                    (line, comment) for line, comment in lines if not line.startswith(f"--config.{path}.{number}.call=")
                )


def _call_lines(entry: ConfigDict, at: tuple[str, ...], takes: Any, about: str) -> Iterator[Line]:
    path, function = ".".join(at), parts.constructor(entry["call"])
    parameters, meanings = inspect.signature(function).parameters, argument_meanings(function)
    if about:
        yield "", f"{path}: {about}"
    made = takes if parts.made_by(function) is Any else parts.made_by(function)
    kind = "" if made is Any else _kind(made)
    yield _assignment(f"{path}.call", entry["call"]), ": ".join(filter(None, (kind, _summary(function))))
    for name in sorted((key for key in entry if key != "call"), key=lambda key: [*parameters, key].index(key)):
        follows = [text for (place, key), text in FOLLOWS.items() if key == name and f"{path}.".startswith(f"{place}.")]
        meaning = f"None is {follows[0]}" if follows and entry[name] is None else meanings.get(name, "")
        yield from _lines(entry[name], (*at, name), parts.taken_by(function, parameters.get(name)), meaning)
    more = _more_fields(function, entry)
    if more:
        yield "", f"{path} also takes: {', '.join(more)}"


def _more_fields(function: Any, entry: ConfigDict) -> list[str]:
    """What a constructor with `**fields` takes beside what an entry gives, where its docstring says whose fields they
    are: those of a class, or the settings of a preset, which are shown with their values."""
    doc, known = inspect.getdoc(function) or "", getattr(inspect.unwrap(function), "__globals__", {})
    if not takes_any_name(inspect.signature(function).parameters):
        return []
    named, preset = re.search(r"fields of `(\w+)`", doc), re.search(r"`(\w+)\[preset\]\.settings`", doc)
    fields = getattr(known.get(named[1]), "__dataclass_fields__", {}) if named else {}
    chosen = known.get(preset[1], {}).get(entry.get("preset")) if preset else None
    settings = {} if chosen is None else chosen.settings
    texts = {**{name: name for name in fields if name not in OF_FLAX}, **{k: f"{k}={v}" for k, v in settings.items()}}
    return [text for name, text in texts.items() if name not in entry]


def _assignment(path: str, value: Any) -> str:
    value = as_plain(value)
    # A word needs no quotes of its own, unless it reads as something else.
    text = value if isinstance(value, str) and _reads_as(value) else written(value)
    return f"--config.{path}={'{}' if text == '{}' else shlex.quote(str(text))}"


def _reads_as(text: str) -> bool:
    value = read_value(text) if "(" not in text else None
    return isinstance(value, str) and value == text and text.isprintable()


def _described(value: Any, takes: Any, about: str) -> str:
    kind = type(as_plain(value)).__name__ if takes is Any and value is not None else _kind(takes)
    return ": ".join(filter(None, (kind, about)))


def _kind(takes: Any) -> str:
    """A type in few words: "int | None"."""
    if takes is Any:
        return ""
    options = [re.sub("^an? ", "", option) for option in parts.described_as(takes).split(" or ")]
    options = [*options, *(["None"] if parts.takes_none(takes) else [])]
    return " | ".join(options if len(options) <= MOST_OPTIONS else [*options[:MOST_OPTIONS], "..."])


def _taken_at(place: str) -> Any:
    return PARTS.get(place, Any)


def _calls_within(entry: Any) -> bool:
    if isinstance(entry, Mapping | ConfigDict):
        return "call" in entry or any(map(_calls_within, entry.values()))
    return isinstance(entry, list | tuple) and any(map(_calls_within, entry))


def _summary(function: Any) -> str:
    return _first_sentence((inspect.getdoc(function) or "").split("\n\n")[0])


def _first_sentence(text: str) -> str:
    return re.split(r"(?<!e\.g)(?<!i\.e)[.;]\s(?=[A-Z`]|\w+: )", " ".join(text.split()), maxsplit=1)[0].rstrip(".;")


def _aligned(assignment: str, comment: str) -> str:
    comment = comment if len(comment) <= WIDTH or not assignment else f"{comment[: WIDTH - 3].rstrip()}..."
    return f"{assignment:{COLUMN}}  # {comment}" if assignment and comment else assignment or f"# {comment}"
