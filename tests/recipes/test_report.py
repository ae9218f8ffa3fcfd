"""Reports and pages: what is written is read back, failures are shown, and nothing is published that was tuned on."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from diffusion_jax.command import run_command
from diffusion_jax.config import ConfigDict
from diffusion_jax.errors import InvalidInput
from diffusion_jax.recipes import page
from diffusion_jax.recipes import report as report_module
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.recipes.page import index_page, reasons_of, sections_of, system_page, verdict_table
from diffusion_jax.recipes.report import check_publishable, commit, read_report, reported
from diffusion_jax.recipes.study import Results
from diffusion_jax.recipes.systems import SYSTEMS
from diffusion_jax.recipes.verdicts import Row, judge

ROWS = [
    Row("p(x | y) is better", "share", [2.0, 2.1, 2.2], [1.0, 1.1, 1.2], "higher", "5x"),
    Row("it is faster", "seconds", [3.0, 3.1, 3.2], [1.0, 1.1, 1.2], "lower", "2x", factor=0.5),
    Row("nobody can tell", "points", [1.0, -1.0, 0.5], 0.0, "higher"),
]
CONFIG = ConfigDict({"seed_numbers": (7, 8, 9, 12), "tuned_on": (100, 101)})


def study(s):
    s.picture("curve").write_text("a picture")
    return Results(ROWS, {s.picture("curve"): "What one sees."}, "noise")


@pytest.fixture
def report(tmp_path):
    return reported(study, "taylorseer", CONFIG, tmp_path, "python -m diffusion_jax.recipes taylorseer")


@pytest.fixture
def text(monkeypatch, tmp_path):
    def write(reasons):
        (tmp_path / "taylorseer.md").write_text(
            "# Title\n\nWhat it does.\n\n## On your own network\n\n```python\nx = 1\n```\n" + reasons
        )

    monkeypatch.setattr(page, "TEXTS", tmp_path)
    return write


def test_a_report_is_read_back_with_all_that_it_needs(report, tmp_path):
    assert read_report(tmp_path / "report.json") == report
    assert report.seeds == (7, 8, 9, 12) and report.tuned_on == (100, 101)
    assert re.fullmatch(r"[0-9a-f]{12}\+?|", report.commit)
    assert {"jax", "python"} <= report.versions.keys() and report.config["tuned_on"] == [100, 101]
    assert [one.verdict for one in report.verdicts] == ["holds", "fails", "undecided"]
    assert report.verdicts[0].ours == (2.0, 2.1, 2.2)


def test_a_commit_is_marked_where_the_code_differs_and_not_where_reports_do(tmp_path, monkeypatch):
    package = tmp_path / "diffusion_jax" / "recipes"
    for folder in (package, tmp_path / "configs", tmp_path / "docs"):
        folder.mkdir(parents=True)
        (folder / "file.py").write_text("x = 1\n")

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(report_module, "__file__", str(package / "report.py"))
    assert commit() == ""
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    (tmp_path / "docs" / "file.py").write_text("x = 2\n")
    assert re.fullmatch("[0-9a-f]{12}", commit())
    (tmp_path / "configs" / "file.py").write_text("x = 2\n")
    assert commit().endswith("+")


def test_the_page_shows_verdicts_reasons_and_pictures(report, text):
    text("## What does not hold, and why\n\n- **it is faster**: it does\n  more.\n")
    made = system_page(report)
    assert made.startswith("# Title\n\nWhat it does.")
    assert "| holds | p(x \\| y) is better | share | 2.1 ± 0.1 | > | 1.1 ± 0.1 | 5x |" in made
    assert "- **it is faster** (fails): it does more." in made
    assert "- **nobody can tell** (undecided): these seeds do not decide it; the interval of the " in made
    assert "![What one sees.](../images/taylorseer_curve.png)" in made
    assert "Seeds 7 to 9, 12; choices were made on 100 to 101." in made
    assert "smoke" not in made
    assert "its figures mean nothing" in system_page(dataclasses.replace(report, smoke=True))


def test_a_reason_without_a_failing_claim_and_too_long_a_row_are_refused(report, text):
    text("## What does not hold, and why\n\n- **p(x | y) is better**: it was not.\n")
    with pytest.raises(InvalidInput, match=r"p\(x \| y\) is better"):
        system_page(report)
    text("")
    long = dataclasses.replace(report, verdicts=(judge(ROWS[0]._replace(published="x" * 200)),))
    with pytest.raises(InvalidInput, match="200 fit"):
        system_page(long)


def test_bounds_are_told():
    rows = [row._replace(factor=0.5, margin=-0.03) for row in ROWS[:1]] + [
        ROWS[0]._replace(direction="equal", margin=2.0)
    ]
    relations = [line.split(" | ")[4] for line in verdict_table([judge(row) for row in rows])[2:]]
    assert relations == ["> -0.03 + 0.5 x", "= ± 2"]


def test_the_index_is_one_screen(report):
    made = index_page({"taylorseer": report})
    assert "| [TaylorSeer](systems/taylorseer.md) | what is reused from earlier t | 1 | 1 | 1 | share: 2.1" in made
    assert len(SYSTEMS) == 56 and made.count("\n") < 40
    assert all(system.slug in made for system in SYSTEMS)


def test_only_whole_runs_on_seeds_that_nothing_was_chosen_on_are_published(report):
    check_publishable(report)
    with pytest.raises(InvalidInput, match=r"\[8\]"):
        check_publishable(dataclasses.replace(report, tuned_on=(8, 100)))
    with pytest.raises(InvalidInput, match="smoke"):
        check_publishable(dataclasses.replace(report, smoke=True))


def test_a_config_says_its_seeds_and_titles_are_unique(tmp_path):
    with pytest.raises(InvalidInput, match="tuned_on"):
        reported(study, "taylorseer", ConfigDict({"seed_numbers": (1,)}), tmp_path, "")
    with pytest.raises(InvalidInput, match="have one title"):
        reported(lambda s: Results([ROWS[0], ROWS[0]], {}, ""), "taylorseer", CONFIG, tmp_path, "")


@pytest.mark.parametrize(
    "argv", [["taylorser"], [], ["taylorseer:papr"], ["no-such-thing"], ["ertacache", "--config.x=1"]]
)
def test_a_wrong_system_exits_with_2(argv, capsys):
    assert run_command(main, argv) == 2
    assert "error: " in capsys.readouterr().err


def test_list_names_every_system(capsys):
    main(["--list"])
    assert len(capsys.readouterr().out.splitlines()) == 56


DOCS = Path(__file__).parents[2] / "docs"
REPORTS = sorted(path.stem for path in (DOCS / "reports").glob("*.json"))


@pytest.mark.parametrize("slug", REPORTS)
def test_published_pages_are_those_of_the_published_reports(slug):
    report = read_report(DOCS / "reports" / f"{slug}.json")
    check_publishable(report)
    assert (DOCS / "systems" / f"{slug}.md").read_text() == system_page(report)
    assert {name for name in report.pictures if not (DOCS / "images" / f"{slug}_{name}").is_file()} == set()
    assert sections_of(slug) and reasons_of(slug) is not None


def test_the_published_index_is_that_of_the_published_reports():
    assert (DOCS / "systems.md").read_text() == index_page(
        {s: read_report(DOCS / "reports" / f"{s}.json") for s in REPORTS}
    )
