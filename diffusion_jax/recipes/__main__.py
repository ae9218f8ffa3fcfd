"""`python -m diffusion_jax.recipes`: lists, runs and tabulates the recipes."""

import argparse
import importlib
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from diffusion_jax.command import cache_compilations, run_command
from diffusion_jax.config import load
from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.recipes.report import Report, page, read_all, summary
from diffusion_jax.recipes.systems import BY_SLUG, SYSTEMS

REPORTS, IMAGES = Path("docs/reports"), Path("docs/images")


def built(slug: str) -> bool:
    """Whether the recipe of this system exists."""
    return importlib.util.find_spec(f"diffusion_jax.recipes.{slug}") is not None


def run(slug: str, workdir: Path, seed: int = 0, smoke: bool = False) -> Report:
    """Runs a recipe with its config and writes its `report.json` into `workdir`."""
    recipe = importlib.import_module(f"diffusion_jax.recipes.{slug}")
    config = load(f"configs/recipes/{slug}.py{':smoke' if smoke else ''}")
    config.seed = seed
    workdir.mkdir(parents=True, exist_ok=True)
    options = (f" --seed {seed}" if seed else "") + (" --smoke" if smoke else "")
    begun = time.monotonic()
    results = recipe.run(config, workdir)
    report = Report(
        system=slug,
        seconds=round(time.monotonic() - begun, 1),
        device=on_what(),
        claims=tuple(results.claims),
        command=f"python -m diffusion_jax.recipes {slug}{options}",
        pictures=tuple(Path(path).name for path in results.pictures),
        notes=results.notes,
    )
    report.write(workdir)
    return report


def on_what() -> str:
    """What this process computes on, in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU core" + "s" * (cores != 1)


def publish(report: Report, workdir: Path) -> None:
    """Copies a report and its pictures to `docs/`, where `make report` finds them."""
    for folder in (REPORTS, IMAGES):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(workdir / "report.json", REPORTS / f"{report.system}.json")
    for name in report.pictures:
        shutil.copy(workdir / name, IMAGES / f"{report.system}_{name}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m diffusion_jax.recipes", description=__doc__)
    parser.add_argument("system", nargs="?", help="the slug of a system; see --list")
    parser.add_argument("--list", action="store_true", help="print all systems with their state")
    parser.add_argument("--workdir", type=Path, help="where report.json and the pictures go (default out/<slug>)")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the run (default 0)")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that it runs")
    parser.add_argument("--publish", action="store_true", help=f"copy report and pictures to {REPORTS.parent}")
    parser.add_argument("--write-table", type=Path, metavar="FILE", help=f"write the table of {REPORTS} to FILE")
    arguments = parser.parse_args(argv)

    if arguments.write_table:
        arguments.write_table.write_text(page(read_all(REPORTS)), encoding="utf-8")
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
    cache_compilations()
    report = run(arguments.system, arguments.workdir or Path("out") / arguments.system, arguments.seed, arguments.smoke)
    print(summary(report))
    if arguments.publish:
        publish(report, arguments.workdir or Path("out") / arguments.system)


if __name__ == "__main__":
    sys.exit(run_command(main))
