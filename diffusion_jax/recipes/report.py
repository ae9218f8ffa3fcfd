"""What a recipe reports, and the table of results that is made from the reports, failures included."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.recipes.systems import BY_SLUG, SYSTEMS

DIRECTIONS = ("higher", "lower", "equal")


@dataclasses.dataclass(frozen=True)
class Claim:
    """One comparison of ours with the natural baseline, made in the same run.

    direction: which way ours should differ from the baseline: `higher`, `lower` or `equal`.
    published: the paper's figure or size of the effect, in words.
    seeds, spread: number of seeds and the standard deviation over them (0 for exact claims).
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


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one recipe."""

    system: str
    seconds: float
    device: str
    claims: Sequence[Claim]
    command: str
    pictures: Sequence[str] = ()

    def __post_init__(self):
        if self.system not in BY_SLUG:
            raise unknown("system", self.system, BY_SLUG)

    def write(self, folder: Path) -> Path:
        """Writes `report.json` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "report.json"
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        return path


def read(path: Path) -> Report:
    """Reads a `report.json`."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    claims = tuple(Claim(**claim) for claim in fields["claims"])
    return Report(**{**fields, "claims": claims, "pictures": tuple(fields["pictures"])})


def table(reports: Mapping[str, Report]) -> str:
    """The page of results in Markdown: a row for each of the systems, empty where nothing is built yet."""
    built = sum(system.slug in reports for system in SYSTEMS)
    lines = [
        "# Systems",
        "",
        f"{built} of {len(SYSTEMS)} systems are built. This page is written by `make report` from `docs/reports/`;",
        "claims that do not hold are shown as not holding, with the reason.",
        "",
        "| system | the timestep decides | claims that hold | what was measured |",
        "|---|---|---|---|",
    ]
    for system in SYSTEMS:
        report = reports.get(system.slug)
        name = f"`{system.slug}` {system.title}"
        if report is None:
            lines.append(f"| {name} | {system.question} | | |")
            continue
        held = sum(claim.holds for claim in report.claims)
        measured = "; ".join(
            f"{claim.name}: {claim.metric} {claim.baseline:.4g} → {claim.ours:.4g}"
            + (f" (±{claim.spread:.2g}, {claim.seeds} seeds)" if claim.seeds > 1 else "")
            + ("" if claim.holds else f" **does not hold**: {claim.reason}")
            for claim in report.claims
        )
        lines.append(f"| {name} | {system.question} | {held} of {len(report.claims)} | {measured} |")
    return "\n".join(lines) + "\n"


def read_all(folder: Path) -> dict[str, Report]:
    """The committed reports `<folder>/<slug>.json`."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
