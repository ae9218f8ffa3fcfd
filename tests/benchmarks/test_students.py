"""The table of students: means and spreads of the seeds, in its place of the page, and every method in it."""

import pytest

from benchmarks import students
from benchmarks.students import BEGIN, END, as_table, draw, put_into_page
from diffusion_jax.students import METHODS

FIGURES = {
    "teacher, DDIM, 2 steps": {
        "distance": [1.0, 3.0], "precision": [0.5, 0.5], "recall": [0.25, 0.75], "accuracy": [1.0, 1.0],
        "training": [0.0, 0.0], "evaluations": [4.0, 4.0],
    },
    "mean_flow, 1 steps": {
        "distance": [2.0, 2.0], "precision": [1.0, 1.0], "recall": [1.0, 1.0], "accuracy": [0.5, 1.0],
        "training": [10.0, 20.0], "evaluations": [1.0, 1.0],
    },
}  # fmt: skip


def test_the_table_stands_in_its_place_of_the_page(tmp_path):
    first, second = as_table(FIGURES)[2:]
    assert first == "| teacher, DDIM | 2 | 4 | 2 ± 1 | 0.5 ± 0 | 0.5 ± 0.25 | 1 ± 0 |  |"
    assert second.startswith("| mean flow | 1 | 1 | 2 ± 0 |") and second.endswith("| 15 |")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    put_into_page([first], page)
    assert page.read_text() == f"before\n{BEGIN}\n{first}\n{END}\nafter\n"
    page.write_text("no place")
    with pytest.raises(AssertionError, match="no place for the table"):
        put_into_page([first], page)
    draw(FIGURES, tmp_path / "students.png")
    assert (tmp_path / "students.png").stat().st_size > 0


def test_the_page_has_a_place_and_methods_have_rates():
    assert students.PAGE.read_text().count(BEGIN) == 1
    assert set(students.RATES) <= set(METHODS)
