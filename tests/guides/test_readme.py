"""The README: its ten lines run, and its table of systems has all that are built and no others."""

import re
from pathlib import Path

import numpy as np

from tests.guides.running import DOCS

README = (DOCS.parent / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run_and_cost_what_they_say():
    text = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    small = {'"S/2", conditions': '"S/2", width=8, depth=1, heads=1, conditions', "32, 32, 4)": "4, 4, 1)"}
    for found, put in small.items():
        assert found in text
        text = text.replace(found, put)
    names: dict = {}
    exec(compile(text, "README.md", "exec"), names)
    assert names["out"].x.shape == (8, 4, 4, 1) and np.isfinite(names["out"].x).all()
    # Ten steps under guidance.
    assert float(names["out"].cost.evaluations) == 20


def test_its_systems_are_those_with_a_report():
    table = README[README.index("| system | what it does") :].partition("\n\n")[0]
    built = {path.stem for path in Path(DOCS / "reports").glob("*.json")}
    assert {
        slug for cell in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for slug in re.findall(r"`(\w+)`", cell)
    } == built
    assert f"{len(built)} are built" in README
