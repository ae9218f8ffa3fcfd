"""The picture of the frontier, `docs/images/frontier.png`, from the rows of its table, without measuring anything anew:

python -m benchmarks.frontier_picture
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, Row, read
from diffusion_jax import pictures

PICTURE = Path("docs/images/frontier.png")
PLAIN, GUIDED = "plain solver", "guided, "
MEASURES = ("endpoint error", "Fréchet distance")
BEATS = "beats fewer steps"
SETTING = re.compile(r", (?=(?:\d+ steps|\d+ of \d+ steps|[Nr] = |threshold |[\d.]+ blocks|[^,]*$))")
"""Where the name of a family ends and its setting begins."""


def family_of(case: str) -> str:
    """ "TaylorSeer, m = 3, N = 5" as "TaylorSeer, m = 3"."""
    return SETTING.split(case, maxsplit=1)[0]


def draw(rows: Sequence[Row], path: Path = PICTURE) -> None:
    """One panel a measure and kind of run, one curve a family; settings that beat fewer steps are filled."""
    panels: dict[str, dict[str, Any]] = {f"{kind}{measure}": {} for kind in ("", GUIDED) for measure in MEASURES}
    for row in rows:
        kind = GUIDED if row.case.startswith(GUIDED) else ""
        family = family_of(row.case.removeprefix(GUIDED))
        for measure in MEASURES:
            said = next(part for part in row.note.split("; ") if part.startswith(measure))
            value = float(said.removeprefix(measure).split("±")[0])
            # The plain run of all steps has no error, and no place on a logarithmic axis.
            if value and row.ratio is not None:
                xs, ys, filled = panels[f"{kind}{measure}"].setdefault(family, ([], [], []))
                xs.append(row.ratio.value)
                ys.append(value)
                filled.append(BEATS in said)
    titles = {name: name[0].upper() + name[1:] + ": lower is better" for name in panels}
    pictures.save_panels(
        path,
        {titles[name]: curves for name, curves in panels.items()},
        title="Quality against time: ways to do less at some steps, and fewer steps",
        x_label="times faster than the plain run of all steps",
        y_label="",
        reference=PLAIN,
        filled_means="Filled: better than the plain solver with fewer steps, in the same time, in every round.",
    )


if __name__ == "__main__":
    draw(read(RESULTS / "frontier.json").rows)
