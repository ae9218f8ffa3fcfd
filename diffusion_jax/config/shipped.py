"""Where named configs are found: `digits_dit`, `recipes/sdp`. They are `configs/` of a checkout, and travel inside of a
wheel as `diffusion_jax/configs`.

    diffusion-jax configs                        lists them
    diffusion-jax configs digits_dit > mine.py   a copy to change, for --config=mine.py
"""

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

from diffusion_jax import reading
from diffusion_jax.command_parser import CommandParser
from diffusion_jax.errors import InvalidInput, invalid, nearest, unknown

_PACKAGE = Path(__file__).parent.parent


def shipped_folder() -> Path:
    """The folder of the shipped configs.

    Raises InvalidInput where the library was installed without them.
    """
    inside, checkout = _PACKAGE / "configs", _PACKAGE.parent / "configs"
    if inside.is_dir():
        return inside
    if checkout.is_dir() and (_PACKAGE.parent / "setup.py").is_file():
        return checkout
    raise InvalidInput(f"The shipped configs are missing: {inside} does not exist; install diffusion_jax again.")


def shipped_names() -> list[str]:
    """The names of the shipped configs; those of the studies begin with `recipes/`."""
    folder = shipped_folder()
    found = [path.relative_to(folder) for path in folder.rglob("*.py") if path.name != "__init__.py"]
    return sorted(path.with_suffix("").as_posix() for path in found)


def config_file(name: str) -> Path:
    """The file of a config: a path to a `.py` or `.json` file, or the name of a shipped config.

    A file that exists is taken as it is, so a name never hides a user's own file.
    Raises InvalidInput for what is neither, with the nearest name or path.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.exists() and not path.is_dir():
        reading.regular_file(path)
    if path.suffix in (".py", ".json") or path.is_absolute() or name.startswith("."):
        near = [str(file) for file in sorted(path.parent.glob(f"*{path.suffix}"))] if path.parent.is_dir() else []
        if near:
            raise unknown("config", name, near)
        shipped = nearest(path.stem, shipped_names())
        hint = f" (the shipped config {shipped!r} is found by its name)" if shipped else ""
        raise invalid("config", name, f"expected an existing Python file with get_config(){hint}")
    names = shipped_names()
    if name in names:
        return shipped_folder() / f"{name}.py"
    own = [each for each in (f"{name}.py", f"{name}/config.json") if name and Path(each).is_file()]
    if own:
        raise InvalidInput(f"config is {name!r}, which is neither a file nor shipped; did you mean {own[0]!r}?")
    raise unknown("config", name, names)


def _headline(name: str) -> str:
    """The first line of what a shipped config says of itself."""
    text = (shipped_folder() / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "configs",
        description="Lists the configs that come with the library, for --config=NAME. With NAME, prints that file.",
        epilog="example: diffusion-jax configs digits_dit > mine.py gives a copy to change, for --config=mine.py. "
        "What follows the colon in --config=NAME:VARIANT is told at the top of each file.",
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the config to print")
    arguments = parser.parse_args(argv)
    names = shipped_names()
    if arguments.name is None:
        width = max(map(len, names))
        print("\n".join(f"{name:{width}}  {_headline(name)}" for name in names))
        return
    if arguments.name not in names:
        raise unknown("config", arguments.name, names)
    print((shipped_folder() / f"{arguments.name}.py").read_text(encoding="utf-8"), end="")
