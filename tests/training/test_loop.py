"""The loop stops, logs, calls back and resumes as it says, with grain's iterators too."""

import json
import os
import signal

import grain
import jax
import numpy as np
import pytest

from diffusion_jax import training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.training import ema, logging, optimizers

from .problems import Batches, equal, init_params, make_objective


def train(data=None, steps=6, **settings):
    settings = {"log_every": 2, "checkpoint_every": 3, "progress": False, **settings}
    return training.train(
        make_objective(),
        optimizers.adamw(1e-2),
        Batches() if data is None else data,
        init_params=init_params,
        steps=steps,
        ema={"power": ema.power(0.1)},
        **settings,
    )


class Memory:
    def __init__(self):
        self.figures, self.pictures, self.closed = [], [], False

    def scalars(self, step, values):
        self.figures.append((step, dict(values)))

    def image(self, step, name, image):
        self.pictures.append((step, name, image.shape))

    def close(self):
        self.closed = True


def test_callbacks_logs_and_checkpoints_come_when_they_are_due(tmp_path, capsys):
    seen = []

    def evaluate(state, writer):
        seen.append(int(state.step))
        writer.image(int(state.step), "samples/grid", np.zeros((4, 5, 3), np.uint8))
        return {"score": state.step * 2}

    memory = Memory()
    callbacks = [training.Callback(4, evaluate, at_end=True)]
    train(
        workdir=str(tmp_path),
        callbacks=callbacks,
        writer=memory,
        config={"name": "tiny"},
        snapshot_every=2,
        keep=1,
        progress=True,
    )
    assert seen == [4, 6]
    assert memory.pictures == [(4, "samples/grid", (4, 5, 3)), (6, "samples/grid", (4, 5, 3))] and memory.closed
    log = logging.read_log(tmp_path / "metrics.jsonl")
    assert [(r["step"], "loss" in r, r.get("score")) for r in log] == [
        (2, True, None),
        (4, True, None),
        (4, False, 8.0),
        (6, True, None),
        (6, False, 12.0),
    ]
    assert log == [{"step": step, **figures} for step, figures in memory.figures]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["6"]
    assert sorted(os.listdir(tmp_path / "snapshots")) == ["2", "4", "6"]
    assert sorted(os.listdir(tmp_path / "pictures")) == ["samples_grid_0000004.png", "samples_grid_0000006.png"]
    assert os.listdir(tmp_path / "tensorboard")
    assert training.read_config(tmp_path) == {"name": "tiny"}
    assert "6/6" in capsys.readouterr().err


def test_sigterm_in_the_middle_then_the_rest_equals_the_whole(tmp_path):
    def ask(state, writer):
        if int(state.step) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def source():
        data = grain.MapDataset.source(np.arange(64)).shuffle(seed=1).repeat().batch(16)
        table = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
        return data.map(lambda index: {"x0": table[index], "index": index}).to_iter_dataset()

    before = signal.getsignal(signal.SIGTERM)
    whole = train(source())
    early = train(source(), workdir=str(tmp_path), callbacks=[training.Callback(1, ask)], checkpoint_every=100)
    assert int(early.step) == 4 and os.listdir(tmp_path / "checkpoints") == ["4"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert equal(train(source(), workdir=str(tmp_path)), whole)


def test_too_many_steps_that_are_not_finite_end_the_run_with_the_last_good_state(tmp_path):
    good = train(steps=2)
    with pytest.raises(training.Diverged, match="not finite for 4 steps in a row, up to step 6"):
        train(Batches(poison=range(2, 100)), steps=50, max_skipped=3, workdir=str(tmp_path))
    assert equal(training.load_params(tmp_path), good.params)
    # JSON knows no NaN.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1], parse_constant=pytest.fail)["loss"] == "nan"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"steps": 0}, "steps is 0"),
        ({"log_every": -1}, "log_every is -1"),
        ({"callbacks": [training.Callback(0, print)]}, r"callbacks\[0\].every is 0"),
        ({"data": [{"x0": np.zeros((16, 4), np.float32)}]}, "the data ended after 1 batches, but 6 steps"),
        ({"data": Batches(size=12)}, "batch_size is 12"),
    ],
)
def test_mistakes_are_named(settings, words):
    with pytest.raises(InvalidInput, match=words):
        train(**settings)


def test_data_that_has_no_position_cannot_have_a_workdir(tmp_path):
    with pytest.raises(InvalidInput, match="no get_state and set_state"):
        train(iter([{"x0": np.zeros((16, 4), np.float32)}]), workdir=str(tmp_path))


def test_a_log_forgets_what_came_after_the_step_it_resumes_from(tmp_path):
    path = tmp_path / "log.jsonl"
    log = logging.JsonLines(path)
    for step in (1, 2, 3):
        log.scalars(step, {"loss": 1.0 / step})
    log.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')
    log = logging.JsonLines(path, resume_step=2)
    log.scalars(3, {"loss": float("inf")})
    log.close()
    assert logging.read_log(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": "inf"}]


def test_nothing_is_kept_without_a_workdir():
    state = train(steps=2)
    assert int(state.step) == 2 and len(jax.tree.leaves(state.params)[0].sharding.device_set) == 8
