"""What a recipe reports, and the page of results that is made from the reports, failures included."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.recipes.systems import BY_SLUG, SYSTEMS

DIRECTIONS = {"higher": "↑", "lower": "↓", "equal": "="}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One comparison of ours with the natural baseline, made in the same run.

    direction: which way ours should differ from the baseline: `higher`, `lower` or `equal`.
    published: the paper's figure or size of the effect, in words.
    seeds, spread: number of seeds and the standard deviation over them of ours (0 for exact claims).
    holds: whether the claim holds here; when it does not, `reason` is the best explanation.
    """

    name: str
    metric: str
    baseline: float
    ours: float
    direction: str
    published: str
    holds: bool
    seeds: int = 1
    spread: float = 0.0
    reason: str = ""

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise unknown("direction", self.direction, DIRECTIONS)
        if not self.holds and not self.reason:
            raise InvalidInput(f"claim {self.name!r} does not hold and gives no reason: say why.")


def claim(
    name: str,
    metric: str,
    baseline: Sequence[float] | float,
    ours: Sequence[float] | float,
    direction: str,
    published: str,
    *,
    factor: float = 1.0,
    margin: float = 0.0,
    reason: str = "it held when this recipe was written; look at what changed",
) -> Claim:
    """A claim about means over seeds; `baseline` and `ours` have one value a seed.

    It holds where ours > factor * baseline + margin ("higher"), ours < factor * baseline + margin ("lower") or
    |ours - baseline| <= margin ("equal"): `direction="higher", margin=-0.03` is "at most 3 points below".
    reason: the best explanation in case that it does not hold; dropped when it does.
    """
    a, b = (np.atleast_1d(np.asarray(values, float)) for values in (baseline, ours))
    bound = factor * a.mean() + margin
    holds = {"higher": b.mean() > bound, "lower": b.mean() < bound, "equal": abs(b.mean() - a.mean()) <= margin}
    if direction not in holds:
        raise unknown("direction", direction, DIRECTIONS)
    held = bool(holds[direction])
    spread = float(b.std(ddof=1)) if b.size > 1 else 0.0
    means = float(a.mean()), float(b.mean())
    return Claim(name, metric, *means, direction, published, held, b.size, spread, "" if held else reason)


class Results(NamedTuple):
    """What a recipe's `run` returns. pictures: paths of the files that it wrote into its workdir.

    notes: what a reader must know to weigh the claims, e.g. what was chosen after looking at reported seeds.
    """

    claims: Sequence[Claim]
    pictures: Sequence[Path] = ()
    notes: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one recipe. seconds: of the whole run, without what the cache held (see `frame.trained`)."""

    system: str
    seconds: float
    device: str
    claims: Sequence[Claim]
    command: str
    pictures: Sequence[str] = ()
    notes: str = ""

    def __post_init__(self):
        if self.system not in BY_SLUG:
            raise unknown("system", self.system, BY_SLUG)

    def write(self, folder: Path) -> Path:
        """Writes `report.json` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "report.json"
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        return path


def read_report(path: Path) -> Report:
    """Reads a `report.json`."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    claims = tuple(Claim(**claim) for claim in fields["claims"])
    return Report(**{**fields, "claims": claims, "pictures": tuple(fields["pictures"])})


def read_all(folder: Path) -> dict[str, Report]:
    """The committed reports `<folder>/<slug>.json`."""
    return {path.stem: read_report(path) for path in sorted(folder.glob("*.json"))}


def summary(report: Report) -> str:
    """The claims of a report as a table in Markdown."""
    lines = ["| claim | measured | baseline | ours | published | holds |", "|---|---|---|---|---|---|"]
    for one in report.claims:
        seeds = f" ± {one.spread:.2g} ({one.seeds} seeds)" if one.seeds > 1 else ""
        holds = "yes" if one.holds else f"**no**: {one.reason}"
        figures = f"{one.metric} {DIRECTIONS[one.direction]}", f"{one.baseline:.4g}", f"{one.ours:.4g}{seeds}"
        cells = [cell.replace("|", "\\|") for cell in (one.name, *figures, one.published, holds)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(reports: Mapping[str, Report], images: str = "images") -> str:
    """The page of results in Markdown: a row for each system, empty where nothing is built, then what each measured.

    images: the folder, seen from the page, that holds the pictures as `<slug>_<file>`.
    """
    built = [system for system in SYSTEMS if system.slug in reports]
    lines = [
        "# Systems",
        "",
        f"{len(built)} of {len(SYSTEMS)} systems are built. `make report` writes this page from `docs/reports/`.",
        "Claims that do not hold are shown as not holding, with the most likely reason. `↑`, `↓` and `=`: ours should",
        "be higher, lower, equal. Spreads are standard deviations over seeds. Times leave out models that were cached.",
        "",
        "| system | the timestep decides | claims that hold |",
        "|---|---|---|",
    ]
    for system in SYSTEMS:
        report = reports.get(system.slug)
        held = f"{sum(one.holds for one in report.claims)} of {len(report.claims)}" if report else ""
        name = f"[`{system.slug}`](#{system.slug})" if report else f"`{system.slug}`"
        lines.append(f"| {name} {system.title} | {system.question} | {held} |")
    for system in built:
        report = reports[system.slug]
        lines += ["", f"## {system.slug}", "", f"{system.title}.", ""]
        lines += [f"`{report.command}`, {report.seconds / 60:.0f} minutes on {report.device}.", ""]
        lines += [summary(report).rstrip()]
        lines += ["", f"To be read with it: {report.notes}"] if report.notes else []
        lines += [line for name in report.pictures for line in ("", f"![{name}]({images}/{system.slug}_{name})")]
    return "\n".join(lines) + "\n"
