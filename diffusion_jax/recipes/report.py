"""What a run of a study reports: what ran, when and on what, and the verdict on every claim, with values by seed."""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config import to_json
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.recipes.study import Results, Study
from diffusion_jax.recipes.systems import BY_SLUG
from diffusion_jax.recipes.verdicts import Verdict, judge
from diffusion_jax.stages import spent
from diffusion_jax.summary import on_what

PACKAGES = ("diffusion_jax", "jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one study.

    seeds: that the verdicts are of. tuned_on: on which choices were made. varied: what differs between seeds.
    seconds: from an empty cache; cached_seconds: with every stage in the cache (`stages.spent`). stages: seconds by
    name and key.
    commit: of the working tree, with a "+" where files differed from it. smoke: its figures mean nothing.
    """

    system: str
    command: str
    commit: str
    date: str
    device: str
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    seeds: Sequence[int]
    tuned_on: Sequence[int]
    varied: str
    seconds: float
    cached_seconds: float
    stages: Mapping[str, float]
    verdicts: Sequence[Verdict]
    pictures: Mapping[str, str]
    smoke: bool = False

    def __post_init__(self):
        if self.system not in BY_SLUG:
            raise unknown("system", self.system, BY_SLUG)

    def write(self, folder: Path) -> Path:
        """Writes `report.json` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "report.json"
        fields = {**vars(self), "verdicts": [verdict._asdict() for verdict in self.verdicts]}
        path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        return path

    def count(self, verdict: str) -> int:
        """How many claims have this verdict."""
        return sum(one.verdict == verdict for one in self.verdicts)


def read_report(path: Path) -> Report:
    """Reads a `report.json`."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    verdicts = []
    for one in fields["verdicts"]:
        values = {name: tuple(one[name]) for name in ("ours", "against", "interval")}
        verdicts.append(Verdict(**{**one, **values}))
    return Report(
        **{
            **fields,
            "verdicts": tuple(verdicts),
            "seeds": tuple(fields["seeds"]),
            "tuned_on": tuple(fields["tuned_on"]),
        }
    )


def reported(study: Any, slug: str, config: ConfigDict, workdir: Path, command: str, smoke: bool = False) -> Report:
    """Runs `study`, a function of a `Study`, judges its rows, and writes the report into `workdir`."""
    for name in ("seed_numbers", "tuned_on"):
        if name not in config:
            raise InvalidInput(f"The config of {slug} has no entry {name!r}: a tuple of seeds.")
    workdir.mkdir(parents=True, exist_ok=True)
    s = Study(config, tuple(config.seed_numbers), workdir, smoke, {})
    # As it is now: hours later the tree may be another.
    at, begun = commit(), spent()
    results: Results = study(s)
    elapsed = spent() - begun
    verdicts = tuple(judge(row) for row in results.rows)
    titles = [one.title for one in verdicts]
    if len(set(titles)) < len(titles):
        raise InvalidInput(
            f"Two claims of {slug} have one title: {sorted({t for t in titles if titles.count(t) > 1})}."
        )
    kept = s.ledger.values()
    report = Report(
        system=slug,
        command=command,
        commit=at,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        device=on_what(),
        versions={name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        config=json.loads(to_json(config)),
        seeds=s.seeds,
        tuned_on=tuple(config.tuned_on),
        varied=results.varied,
        seconds=round(elapsed + sum(stage.seconds for stage in kept if stage.loaded), 1),
        cached_seconds=round(elapsed - sum(stage.seconds for stage in kept if not stage.loaded), 1),
        stages={f"{stage.name} {stage.key}": round(stage.seconds, 1) for stage in kept},
        verdicts=verdicts,
        pictures={path.name: caption for path, caption in results.pictures.items()},
        smoke=smoke,
    )
    report.write(workdir)
    return report


def check_publishable(report: Report) -> None:
    """Raises InvalidInput for a smoke run, and where choices were made on the seeds that are reported."""
    if report.smoke:
        raise invalid("the report", "one of a smoke run", "only whole runs are published")
    both = sorted(set(report.seeds) & set(report.tuned_on))
    if both:
        raise invalid(
            "config.seed_numbers", report.seeds, f"seeds {both} are in config.tuned_on: choices were made on them"
        )


def commit() -> str:
    """The commit of the checkout, with a "+" where package or configs differ from it; "" for an installed package, also
    where that lies within a repository of the user's.

    Reports and pages under `docs/` may differ: publishing changes them.
    """
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/diffusion_jax", ":/configs")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
