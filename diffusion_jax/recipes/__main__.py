"""`python -m diffusion_jax.recipes`: lists, runs and tabulates the recipes."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion_jax.command import run_command
from diffusion_jax.config import load
from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.recipes.report import read_all, table
from diffusion_jax.recipes.systems import BY_SLUG, SYSTEMS

REPORTS = Path("docs/reports")


def built(slug: str) -> bool:
    """Whether the recipe of this system exists."""
    return importlib.util.find_spec(f"diffusion_jax.recipes.{slug}") is not None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m diffusion_jax.recipes", description=__doc__)
    parser.add_argument("system", nargs="?", help="the slug of a system; see --list")
    parser.add_argument("--list", action="store_true", help="print all systems with their state")
    parser.add_argument("--workdir", type=Path, help="where report.json and the pictures go (default out/<slug>)")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the run (default 0)")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that it runs")
    parser.add_argument("--write-table", type=Path, metavar="FILE", help=f"write the table of {REPORTS} to FILE")
    arguments = parser.parse_args(argv)

    if arguments.write_table:
        arguments.write_table.write_text(table(read_all(REPORTS)), encoding="utf-8")
        return
    if arguments.list:
        for system in SYSTEMS:
            print(f"{system.slug:24} {'built' if built(system.slug) else '-':6} {system.title}")
        return
    if arguments.system is None:
        raise InvalidInput("No system was named; `--list` prints all of them.")
    if arguments.system not in BY_SLUG:
        raise unknown("system", arguments.system, BY_SLUG)
    if not built(arguments.system):
        raise InvalidInput(f"The recipe {arguments.system!r} is not built yet; `--list` shows which are.")
    recipe = importlib.import_module(f"diffusion_jax.recipes.{arguments.system}")
    config = load(f"configs/recipes/{arguments.system}.py{':smoke' if arguments.smoke else ''}")
    config.seed = arguments.seed
    workdir = arguments.workdir or Path("out") / arguments.system
    report = recipe.run(config, workdir)
    print(f"Wrote {report.write(workdir)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
