"""How docstrings of this project become Markdown: a list of the arguments, and the fields of a tuple or a dataclass.

In the sources an argument is a line `name: what it is`, with indented lines below it; see any function with options.
"""

import re

import griffe

ENTRY = re.compile(r"^(\w+(?:, \w+)*): (?=\S)")


class Plain(griffe.Extension):
    def on_function(self, *, func, **_):
        if func.docstring:
            func.docstring.value = listed(func.docstring.value, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls, **_):
        fields = {name: one for name, one in cls.members.items() if one.is_attribute and not one.docstring}
        shown = [f"{name}: {one.annotation}" for name, one in fields.items() if one.annotation is not None]
        if cls.docstring:
            cls.docstring.value = listed(cls.docstring.value, set(fields))
            if shown:
                cls.docstring.value += "\n\n```python\n" + "\n".join(shown) + "\n```"
            # They are described above: a heading for each would hide the functions of the page.
            for name in fields:
                cls.del_member(name)


def listed(text: str, names: set[str]) -> str:
    """The text with a list item for each line that begins with names of arguments."""
    lines: list[str] = []
    within = False
    for line in text.split("\n"):
        entry = ENTRY.match(line)
        if entry and set(entry[1].split(", ")) <= names:
            lines += [] if within else [""]
            within = True
            known = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            lines.append(f"- {known}: {line[entry.end() :]}")
        else:
            if within and line and not line.startswith(" "):
                if lines[-1] and not lines[-1].endswith((".", ":")):
                    line = f"    {line}"  # a sentence that goes on
                else:
                    lines.append("")
                    within = False
            if line.startswith("Raises ") and lines and lines[-1]:
                lines.append("")
            lines.append(line)
    return "\n".join(lines)
