"""Reports: what is written is read back, failures are shown, and the table has a row for every system."""

import pytest

from diffusion_jax.command import run_command
from diffusion_jax.errors import InvalidInput
from diffusion_jax.recipes import SYSTEMS, Claim, Report
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.recipes.report import read, table

CLAIM = Claim(
    "faster", "seconds", 2.0, 1.0, "lower", "5x", holds=False, seeds=3, spread=0.1, reason="too small a model"
)


def report():
    return Report("taylorseer", 1.0, "cpu", (CLAIM,), "python -m diffusion_jax.recipes taylorseer")


def test_round_trip(tmp_path):
    assert read(report().write(tmp_path)) == report()


def test_the_table_has_all_fifty_six_systems_and_shows_failures():
    page = table({"taylorseer": report()})
    assert len(SYSTEMS) == 56
    assert all(f"`{system.slug}`" in page for system in SYSTEMS)
    assert "does not hold**: too small a model" in page
    assert "1 of 56" in page


def test_a_failing_claim_needs_a_reason():
    with pytest.raises(InvalidInput, match="gives no reason"):
        Claim("x", "m", 1.0, 1.0, "higher", "", holds=False)


@pytest.mark.parametrize("argv", [["taylorser"], [], ["no-such-thing"]])
def test_wrong_system_exits_with_2(argv, capsys):
    assert run_command(main, argv) == 2
    assert "error: " in capsys.readouterr().err


def test_list_names_every_system(capsys):
    main(["--list"])
    assert len(capsys.readouterr().out.splitlines()) == 56
