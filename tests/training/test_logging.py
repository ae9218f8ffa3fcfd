"""Tables and runs of Weights & Biases go on where a run does; names of writers are checked."""

import csv
import sys
import types

import numpy as np
import pytest

from diffusion_jax.errors import InvalidInput
from diffusion_jax.training import logging


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_table_is_continued_and_grows_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    table = logging.Csv(path)
    table.scalars(1, {"loss": 0.5})
    table.scalars(1, {"validation/loss": float("nan")})
    table.scalars(2, {"loss": 0.25, "rate, measured": 3.0})
    table.close()
    whole = path.read_text()
    assert [list(row.values()) for row in rows(path)] == [
        ["1", "0.5", "", ""],
        ["1", "", "nan", ""],
        ["2", "0.25", "", "3.0"],
    ]
    # Killed in the middle of a row, it goes on from step 1 and is then what it was.
    path.write_text(whole + "3,0.1")
    table = logging.Csv(path, resume_step=1)
    table.scalars(2, {"loss": 0.25, "rate, measured": 3.0})
    table.close()
    assert path.read_text() == whole
    # A run that begins anew in the folder.
    logging.Csv(path).close()
    assert rows(path) == []


def test_a_table_of_somebody_else_is_not_replaced(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("name,value\na,1\n")
    with pytest.raises(InvalidInput, match=r"metrics.csv is \['name'\], but the log of a run begins with 'step'"):
        logging.Csv(path)
    assert path.read_text() == "name,value\na,1\n"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("tensorbord",), "log_to is 'tensorbord', which does not exist; did you mean 'tensorboard'"),
        ("csv", "log_to is 'csv', but a list of names is needed"),
        (("csv", "wandb"), "wandb, which is not installed: `pip install wandb`"),
    ],
)
def test_writers_are_checked_by_name(names, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InvalidInput, match=words):
        logging.check_log_to(names)


class Service:
    """What keeps the runs of Weights & Biases: a history that only grows."""

    def __init__(self):
        self.histories, self.refuses = {}, False

    def init(self, *, id, resume, project, **options):
        if self.refuses:
            raise RuntimeError("No API key configured")
        assert resume == "allow" and project == "diffusion_jax"
        history = self.histories.setdefault(id, [])
        step = history[-1][0] + 1 if history else 0
        return types.SimpleNamespace(
            step=step, log=lambda values, step: history.append((step, *values)), finish=lambda: history
        )

    def Image(self, image):
        return image.shape


def test_a_run_of_weights_and_biases_goes_on_as_itself(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    writer = logging.WeightsAndBiases(tmp_path)
    for step in (1, 2, 3):
        writer.scalars(step, {"loss": 1.0})
    # From a checkpoint of step 1: what the history has is equal, and is not sent twice.
    writer = logging.WeightsAndBiases(tmp_path)
    for step in (2, 3, 4):
        writer.scalars(step, {"loss": 1.0})
    writer.image(4, "samples", np.zeros((2, 2, 3), np.uint8))
    (history,) = service.histories.values()
    assert history == [(1, "loss"), (2, "loss"), (3, "loss"), (4, "loss"), (4, "samples")]
    service.refuses = True
    with pytest.raises(InvalidInput, match=r"wandb does not start a run \(.*No API key.*\): call `wandb login`"):
        logging.WeightsAndBiases(tmp_path)


def test_a_run_writes_what_it_is_told_to_and_always_the_log(tmp_path):
    writer = logging.default_writer(tmp_path, log_to=("csv",))
    writer.scalars(1, {"loss": 0.5})
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]
