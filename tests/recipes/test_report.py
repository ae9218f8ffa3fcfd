"""Reports: what is written is read back, failures are shown, and the table has a row for every system."""

import dataclasses

import pytest

from diffusion_jax.command import run_command
from diffusion_jax.errors import InvalidInput
from diffusion_jax.recipes import SYSTEMS, Claim, Report
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.recipes.report import claim, page, read_report, summary

CLAIM = Claim(
    "faster", "seconds", 2.0, 1.0, "lower", "5x", holds=False, seeds=3, spread=0.1, reason="too small a model"
)


def report():
    return Report("taylorseer", 1.0, "cpu", (CLAIM,), "python -m diffusion_jax.recipes taylorseer")


def test_round_trip(tmp_path):
    assert read_report(report().write(tmp_path)) == report()


def test_the_table_has_all_fifty_six_systems_and_shows_failures():
    text = page({"taylorseer": report()})
    assert len(SYSTEMS) == 56
    assert all(f"`{system.slug}`" in text for system in SYSTEMS)
    assert "**no**: too small a model" in text
    assert "1 of 56" in text
    assert "To be read with it" not in text
    noted = dataclasses.replace(report(), notes="tuned on seed 0.")
    assert "To be read with it: tuned on seed 0." in page({"taylorseer": noted})


def test_a_bar_in_a_claim_does_not_end_its_cell():
    conditional = claim("p(x | y)", "share", 1.0, 2.0, "higher", "")
    row = summary(Report("taylorseer", 1.0, "cpu", (conditional,), "")).splitlines()[-1]
    assert row.replace("\\|", "").count("|") == 7
    assert "p(x \\| y)" in row


def test_a_failing_claim_needs_a_reason():
    with pytest.raises(InvalidInput, match="gives no reason"):
        Claim("x", "m", 1.0, 1.0, "higher", "", holds=False)


@pytest.mark.parametrize(
    "direction, ours, margin, holds",
    [
        ("higher", 1.1, 0.0, True),
        ("higher", 1.1, 0.2, False),
        ("higher", 0.98, -0.03, True),
        ("lower", 0.9, 0.0, True),
        ("lower", 1.1, 0.0, False),
        ("equal", 1.02, 0.03, True),
        ("equal", 1.05, 0.03, False),
    ],
)
def test_a_claim_over_seeds_holds_by_its_margin(direction, ours, margin, holds):
    made = claim("x", "m", [0.9, 1.1], [ours - 0.1, ours + 0.1], direction, "", margin=margin, reason="why")
    assert (made.holds, made.reason) == (holds, "" if holds else "why")
    assert made.seeds == 2
    assert made.spread == pytest.approx(0.2 / 2**0.5)


@pytest.mark.parametrize("argv", [["taylorser"], [], ["no-such-thing"]])
def test_wrong_system_exits_with_2(argv, capsys):
    assert run_command(main, argv) == 2
    assert "error: " in capsys.readouterr().err


def test_list_names_every_system(capsys):
    main(["--list"])
    assert len(capsys.readouterr().out.splitlines()) == 56
