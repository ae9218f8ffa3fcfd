"""The pages of results, made from reports and from the text that stands beside each study as `recipes/<slug>.md`.

Such a text has an introduction with the equation, then "## On your own network" with code that the tests run, then,
where claims do not hold, `REASONS` with one item a claim: "- **title of the row**: what an experiment showed". What was
measured, the pictures and the commands are added from the report.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from diffusion_jax.errors import InvalidInput
from diffusion_jax.recipes.report import Report, read_report
from diffusion_jax.recipes.systems import SYSTEMS
from diffusion_jax.recipes.verdicts import DIRECTIONS, VERDICTS, Verdict

TEXTS = Path(__file__).parent
CODE, REASONS = "On your own network", "What does not hold, and why"
WIDTH = 200
"""Characters of a line at most."""


def sections_of(slug: str) -> dict[str, str]:
    """The text of a system by section, the introduction under "". Raises InvalidInput where `CODE` is missing."""
    path = TEXTS / f"{slug}.md"
    if not path.is_file():
        raise InvalidInput(f"{path} does not exist: every study has a text beside it, see CONTRIBUTING.md.")
    parts = re.split(r"^## (.+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = {"": parts[0].strip()} | {
        name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    if CODE not in sections or "```python" not in sections[CODE]:
        raise InvalidInput(f"{path} has no section {CODE!r} with Python code.")
    return sections


def code_of(slug: str) -> str:
    """The code of a text, as its reader would run it."""
    return "\n".join(re.findall(r"```python\n(.*?)```", sections_of(slug)[CODE], re.DOTALL))


def reasons_of(slug: str) -> dict[str, str]:
    """What was found out about claims that do not hold, by title."""
    items = re.split(r"^- \*\*(.+?)\*\*:", sections_of(slug).get(REASONS, ""), flags=re.MULTILINE)
    return {title: " ".join(body.split()) for title, body in zip(items[1::2], items[2::2], strict=True)}


def system_page(report: Report) -> str:
    """The page of one system in Markdown. Raises InvalidInput for a row over `WIDTH` and a reason without claim."""
    slug = report.system
    sections, reasons = sections_of(slug), reasons_of(slug)
    unmet = [one for one in report.verdicts if one.verdict != "holds"]
    stale = sorted(reasons.keys() - {one.title for one in unmet})
    if stale and not report.smoke:
        raise InvalidInput(
            f"{slug}.md gives reasons for claims that are not among those that fail: {', '.join(stale)}."
        )
    lines = [sections[""], "", f"## {CODE}", "", sections[CODE], "", "## What was measured", ""]
    lines += ["**A smoke run of a few steps: its figures mean nothing.**", ""] if report.smoke else []
    lines += _about(report)
    lines += ["", *verdict_table(report.verdicts)]
    for name, caption in report.pictures.items():
        lines += ["", f"![{caption}](../images/{slug}_{name})", "", *_wrapped(f"*{caption}*")]
    if unmet:
        lines += ["", f"## {REASONS}", ""]
        for one in unmet:
            lines += _wrapped(f"- **{one.title}** ({one.verdict}): {reasons.get(one.title) or _unexplained(one)}", "  ")
    lines += ["", "## How to run it", "", "```", report.command, "```", ""]
    lines += [
        f"The study is [`recipes/{slug}.py`](../../diffusion_jax/recipes/{slug}.py), its settings are",
        f"[`configs/recipes/{slug}.py`](../../configs/recipes/{slug}.py), and all values",
        f"[`docs/reports/{slug}.json`](../reports/{slug}.json).",
    ]
    text = "\n".join(lines) + "\n"
    _check_width(slug, [line for line in text.splitlines() if not line.startswith("![")])
    return text


def _unexplained(one: Verdict) -> str:
    """What is said of a claim that does not hold as long as no experiment gave a reason."""
    if one.verdict == "undecided":
        low, high = one.interval
        return f"these seeds do not decide it; the interval of the distance from the bound is {low:.2g} to {high:.2g}."
    return "the cause has not been examined yet."


def _about(report: Report) -> list[str]:
    versions = ", ".join(f"{name} {report.versions[name]}" for name in ("jax", "flax") if name in report.versions)
    of = "of one core" if "CPU" in report.device else ""
    tuned = f"choices were made on {_numbers(report.tuned_on)}" if report.tuned_on else "nothing was chosen"
    return _wrapped(
        f"{report.date}, commit {report.commit or 'unknown'}, {versions}, {report.device}: "
        f"{report.seconds / 60:.1f} minutes {of} in total, {report.cached_seconds / 60:.1f} with trained models in "
        f"the cache. Seeds {_numbers(report.seeds)}; {tuned}. What differs between seeds: {report.varied}. Values are "
        "means and standard deviations over seeds; verdicts follow from the 95 % interval of the paired differences "
        "([rule](../systems.md#verdicts))."
    )


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def verdict_table(verdicts: Sequence[Verdict]) -> list[str]:
    """The claims as the lines of a table, verdict first."""
    lines = ["| verdict | claim | figure | ours | | against | published |", "|---|---|---|---|---|---|---|"]
    for one in verdicts:
        cells = (
            one.verdict if one.verdict == "holds" else f"**{one.verdict}**",
            one.title,
            one.figure,
            _side(one.ours),
            _relation(one),
            _side(one.against),
            one.published,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _side(values: Sequence[float]) -> str:
    mean = _rounded(float(np.mean(values)), 3)
    return f"{mean} ± {_rounded(float(np.std(values, ddof=1)), 1)}" if len(values) > 1 and np.ptp(values) > 0 else mean


def _rounded(value: float, digits: int) -> str:
    """To so many digits: 10 and not 1e+01."""
    return f"{float(f'{value:.{digits}g}'):g}"


def _relation(one: Verdict) -> str:
    factor = "" if one.factor == 1 else f" {one.factor:.3g} x"
    if one.direction == "equal":
        return f"= ± {one.margin:.2g}" + factor if one.margin else "=" + factor
    margin = "" if one.margin == 0 else f" {one.margin:+.2g} +"
    return DIRECTIONS[one.direction] + margin + factor


def _numbers(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1 to 3, 7"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


def index_page(reports: Mapping[str, Report]) -> str:
    """`docs/systems.md`: a row for each system that is built, and the names of the others."""
    built = [system for system in SYSTEMS if system.slug in reports]
    others = [system.slug for system in SYSTEMS if system not in built]
    waiting = [slug for slug in others if (TEXTS / f"{slug}.md").is_file()]
    lines = [
        "# Systems",
        "",
        *_wrapped(
            f"{len(built) + len(waiting)} of {len(SYSTEMS)} published systems are built here. Each has a page that "
            "says what it does, shows ten lines of code for your own network, and reports what was measured and which "
            "claims did not hold. `diffusion-jax recipes SYSTEM` runs the study of one."
        ),
        "",
        "| system | what is a function of the timestep | " + " | ".join(VERDICTS) + " | headline |",
        "|---|---|---|---|---|---|",
    ]
    for system in built:
        report = reports[system.slug]
        first = report.verdicts[0]
        headline = f"{first.figure}: {_side(first.ours)} against {_side(first.against)} ({first.verdict})"
        counts = " | ".join(str(report.count(verdict)) for verdict in VERDICTS)
        link = f"[{system.title.partition(':')[0]}](systems/{system.slug}.md)"
        lines.append(f"| {link} | {system.question} | {counts} | {headline.replace('|', '')} |")
    _check_width("systems.md", lines)
    lines += ["", f"Built, with a report still to be made: {', '.join(waiting)}."] if waiting else []
    lines += ["", *_wrapped(f"Not built yet: {', '.join(slug for slug in others if slug not in waiting)}.")]
    lines += [
        "",
        "## Verdicts",
        "",
        *_wrapped(
            "A claim compares two figures, which are measured with the same seeds. It **holds** if the 95 % interval "
            "(Student's t) of the paired differences lies beyond the bound of the claim, **fails** if it lies on the "
            "other side, and is **undecided** if it contains the bound or if there are fewer than three seeds. Figures "
            "that do not depend on the seed are compared directly. Settings are chosen on other seeds than those that "
            "are reported. Reasons for failed claims come from an experiment; otherwise the page says that the cause "
            "has not been examined."
        ),
    ]
    return "\n".join(lines) + "\n"


def _check_width(where: str, lines: Sequence[str]) -> None:
    for line in lines:
        if len(line) > WIDTH:
            raise InvalidInput(f"A line of {where} has {len(line)} characters, {WIDTH} fit; shorten it: {line}")


def write_pages(docs: Path) -> None:
    """Writes `docs/systems.md` and a page for every report of `docs/reports/`."""
    reports = {path.stem: read_report(path) for path in sorted((docs / "reports").glob("*.json"))}
    (docs / "systems").mkdir(exist_ok=True)
    for slug, report in reports.items():
        (docs / "systems" / f"{slug}.md").write_text(system_page(report), encoding="utf-8")
    (docs / "systems.md").write_text(index_page(reports), encoding="utf-8")
