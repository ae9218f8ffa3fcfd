"""The table of students: means and spreads of the seeds, in its place of the page, and every method in it."""

import pytest

from benchmarks import students
from benchmarks.students import (
    END,
    Sizes,
    as_table,
    command,
    draw,
    made_by,
    put_into_page,
    student_config,
    teacher_config,
)
from diffusion_jax import stages
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
    begin = f"<!-- table: {command('digits')} -->"
    page.write_text(f"before\n{begin}\nold\n{END}\nafter\n")
    put_into_page([first], "digits", page)
    assert page.read_text() == f"before\n{begin}\n{first}\n{END}\nafter\n"
    with pytest.raises(AssertionError, match="no place for the table"):
        put_into_page([first], "fashion_mnist", page)
    draw(FIGURES, tmp_path / "students.png", "digits")
    assert (tmp_path / "students.png").stat().st_size > 0


def test_the_page_has_a_place_and_methods_have_rates():
    assert students.PAGE.read_text().count(f"<!-- table: {command('digits')} -->") == 1
    assert set(students.RATES) <= set(METHODS)


def test_a_student_of_every_method_can_be_made():
    config = teacher_config(Sizes(2, 30, 64, "digits", True))
    config.train.steps, config.model.width, config.model.depth = 0, 8, 1
    base = stages.stage("untrained", config, keep=False)
    for method in METHODS:
        settings = {"steps": 1} if method in ("progressive", "kernel_matching", "distribution_matching") else {}
        made = made_by(student_config(method, Sizes(smoke=True), 0, 2, **settings), base, True)
        assert made.grid(2).shape == (3,), method
