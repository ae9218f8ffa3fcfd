"""`diffusion-jax recipes SYSTEM[:paper|:smoke]`: runs the study of a published system."""

import argparse
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion_jax.command import cache_compilations, leave, run_command, split_overrides
from diffusion_jax.command_parser import CommandParser
from diffusion_jax.config import load
from diffusion_jax.config.overrides import apply_overrides
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.recipes.page import verdict_table, write_pages
from diffusion_jax.recipes.published import published_size
from diffusion_jax.recipes.report import Report, check_publishable, reported
from diffusion_jax.recipes.systems import BY_SLUG, SYSTEMS

DOCS = Path("docs")
VARIANTS = ("", "smoke", "paper")
ON_GARMENTS = ("ant", "difficulty_curriculum", "tbcm")
"""Studies of digits that have a variant on Fashion-MNIST too."""


def built(slug: str) -> bool:
    """Whether the study of this system exists."""
    return importlib.util.find_spec(f"diffusion_jax.recipes.{slug}") is not None


def run(slug: str, workdir: Path, overrides: Sequence[str] = (), variant: str = "") -> Report:
    """Runs a study with its config, `path.to.field=value` changed, and writes its report into `workdir`."""
    study = importlib.import_module(f"diffusion_jax.recipes.{slug}").study
    path = f"recipes/{slug}" + (f":{variant}" if variant else "")
    config = apply_overrides(load(path), overrides)
    named = f"{slug}:{variant}" if variant else slug
    command = " ".join(["python -m diffusion_jax.recipes", named, *(f"--config.{text}" for text in overrides)])
    return reported(study, slug, config, workdir, command, smoke=variant == "smoke")


def publish(report: Report, workdir: Path, docs: Path = DOCS) -> None:
    """Copies a report and its pictures to `docs`, and writes the pages anew."""
    check_publishable(report)
    for folder in ("reports", "images"):
        (docs / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(workdir / "report.json", docs / "reports" / f"{report.system}.json")
    for name in report.pictures:
        shutil.copy(workdir / name, docs / "images" / f"{report.system}_{name}")
    write_pages(docs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "recipes",
        description=__doc__,
        epilog="Variants: smoke, a few steps to see that it runs; paper, the published setting, whose parameters, "
        "operations and memory are counted without making them; fashion, where there is one, Fashion-MNIST in place "
        "of digits.",
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("system", nargs="?", metavar="SYSTEM[:VARIANT]", help="one of --list")
    parser.add_argument("--list", action="store_true", help="print all systems with their state")
    parser.add_argument("--workdir", type=Path, help="where report.json and the pictures go (default out/SYSTEM)")
    parser.add_argument("--publish", action="store_true", help=f"copy report and pictures to {DOCS}/, write the pages")
    parser.add_argument("--write-pages", action="store_true", help=f"write the pages anew from {DOCS}/reports")
    parser.add_argument(
        "--config.FIELD",
        metavar="VALUE",
        dest="_overrides_help",
        help="overrides a field: --config.seed_numbers=(7,8)",
    )
    overrides, rest = split_overrides(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(rest)

    if (arguments.publish or arguments.write_pages) and not (DOCS / "systems").is_dir():
        raise InvalidInput(f"Pages are written in a checkout of the library: {DOCS}/systems is not in this folder.")
    if arguments.write_pages:
        write_pages(DOCS)
        return
    if arguments.list:
        for system in SYSTEMS:
            print(f"{system.slug:24} {'built' if built(system.slug) else '-':6} {system.title}")
        return
    if arguments.system is None:
        raise InvalidInput("No system was named; `--list` prints all of them.")
    slug, _, variant = arguments.system.partition(":")
    if slug not in BY_SLUG:
        raise unknown("system", slug, BY_SLUG)
    variants = (*VARIANTS, "fashion") if slug in ON_GARMENTS else VARIANTS
    if variant not in variants:
        raise unknown("the variant", variant, variants[1:])
    if arguments.publish and variant:
        raise invalid("the variant", variant, "only a study as it is can be published")
    if not built(slug):
        raise InvalidInput(f"The study of {slug!r} is not built yet; `--list` shows which are.")
    cache_compilations()
    if variant == "paper":
        print(published_size(apply_overrides(load(f"recipes/{slug}:paper"), overrides)))
        return
    workdir = arguments.workdir or Path("out") / slug
    report = run(slug, workdir, overrides, variant)
    if arguments.publish:
        publish(report, workdir)
    print("\n".join(verdict_table(report.verdicts)))
    print(f"{report.count('holds')} of {len(report.verdicts)} claims hold; {workdir}/report.json has every value.")
    if report.smoke:
        print("A smoke run: its figures mean nothing.")


if __name__ == "__main__":
    leave(run_command(main))
