"""The loop stops, logs, calls back and resumes as it says, with grain's iterators too."""

import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.training import ema, logging, optimizers

from .problems import Batches, equal, init_params, make_objective


def train(data=None, steps=6, optimizer=None, **settings):
    settings = {"log_every": 2, "checkpoint_every": 3, "progress": False, **settings}
    return training.train(
        make_objective(),
        optimizer or optimizers.adamw(1e-2),
        Batches() if data is None else data,
        init_params=init_params,
        steps=steps,
        **{"ema": {"power": ema.power(0.1)}, **settings},
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
    # No terminal: a line for each record, and nothing that a terminal alone can draw.
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert "\r" not in shown.out + shown.err and lines[0].startswith("Compiling the training step ... ")
    assert [line.split("   loss ")[0] for line in lines[1:4]] == [f"step {n} of 6" for n in (2, 4, 6)]


def test_a_run_whose_every_step_was_skipped_is_not_trained_however_often_it_is_started(tmp_path):
    for _ in range(2):
        with pytest.raises(training.Diverged, match=r"Nothing was learned: .* in any of 2 steps"):
            train(Batches(poison=range(100)), steps=2, workdir=str(tmp_path))


def test_what_a_callback_will_need_is_checked_before_the_first_step(tmp_path):
    seen = []

    def check(state):
        seen.append(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), state.params["up"]["bias"]))
        return state.ema["power"]["up"], state.ema["fast"]

    callback = training.Callback(1500, print, check=check)
    with pytest.raises(InvalidInput, match=r"callbacks\[0\], due every 1500 steps, cannot run: 'fast'"):
        train(workdir=str(tmp_path / "new"), callbacks=[callback])
    assert seen == [((16,), "float32")] and not (tmp_path / "new").exists()


def _points(folder):
    """What TensorBoard shows: (tag, step) in the order of files, without what the start of a later one hides."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == SessionLog.START:
                shown = [point for point in shown if point[1] < event.step]
            shown += [(value.tag, event.step, round(value.simple_value, 4)) for value in event.summary.value]
    return shown


def test_tensorboard_has_each_point_once_and_at_once(tmp_path):
    def log(resume_step, steps):
        board = logging.TensorBoard(tmp_path, resume_step)
        for step in steps:
            board.scalars(step, {"loss": 1.0 / step, "time=0.5": 2.0})
        # Killed: it is not closed.
        return board

    boards = [log(0, (1, 2, 3))]
    assert [point[1] for point in _points(tmp_path) if point[0] == "loss"] == [1, 2, 3]
    boards.append(log(0, (1, 2, 3)))
    assert [point[1] for point in _points(tmp_path) if point[0] == "loss"] == [1, 2, 3]
    boards.append(log(2, (3, 4)))
    assert [point for point in _points(tmp_path) if point[0] == "loss"] == [
        ("loss", step, round(1 / step, 4)) for step in (1, 2, 3, 4)
    ]
    boards[-1].image(4, "sheet", np.zeros((3, 4, 3), np.uint8))
    assert _points(tmp_path)[-1][:2] == ("sheet", 4)
    assert len(list(tmp_path.iterdir())) == len(boards)


def test_too_many_steps_that_are_not_finite_end_the_run_with_the_last_good_state(tmp_path):
    good = train(steps=2)
    with pytest.raises(training.Diverged, match="not finite for 4 steps in a row, up to step 6"):
        train(Batches(poison=range(2, 100)), steps=50, max_skipped=3, workdir=str(tmp_path))
    assert equal(training.load_params(tmp_path), good.params)
    # JSON knows no NaN.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1], parse_constant=pytest.fail)["loss"] == "nan"


def _breaks_at(step):
    """An optimiser whose state is NaN after so many updates, which stay as they are."""

    def update(updates, state, params=None):
        return updates, {"count": state["count"] + 1, "sum": jnp.where(state["count"] + 1 >= step, jnp.nan, 0.0)}

    return optax.GradientTransformation(lambda params: {"count": 0, "sum": jnp.float32(0.0)}, update)


LOSES_AT_FOUR = ema.Ema(lambda n: jnp.where(n == 4, jnp.nan, 0.5))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"optimizer": optax.chain(optax.adam(1e-3), _breaks_at(4))}, "opt_state"),
        ({"ema": {"late": LOSES_AT_FOUR}}, "ema/late"),
    ],
    ids=["moments", "an average"],
)
def test_moments_and_averages_that_are_lost_are_never_saved(settings, name, tmp_path):
    """The updates stay finite, so the step itself sees nothing."""
    settings = {"workdir": str(tmp_path), "checkpoint_every": 2} | settings
    with pytest.raises(training.Diverged, match=rf"^{name}.* is not finite after step 4, so the state is not saved"):
        train(steps=6, **settings)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2"]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"steps": 0}, "steps is 0"),
        ({"log_every": -1}, "log_every is -1"),
        ({"callbacks": [training.Callback(0, print)]}, r"callbacks\[0\].every is 0"),
        ({"data": [{"x0": np.zeros((16, 4), np.float32)}]}, "the data ended after 1 batches, but 6 steps"),
        ({"data": Batches(size=12)}, "batch_size is 12"),
        ({"profile": (4, 2), "workdir": "unused"}, "profile is '4:2', but two steps are needed"),
        ({"profile": (2, 4)}, "profile is '2:4', but a trace is written into the workdir"),
        ({"log_to": ("jsonlines",)}, "log_to is 'jsonlines', which does not exist; did you mean 'jsonl'"),
        (
            {"ema": {"fixed": ema.fixed(0.9)}, "snapshot_every": 2},
            "snapshot_every is 2, but .* no power-function track",
        ),
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


def test_a_trace_is_of_the_steps_that_were_asked_for_and_changes_nothing(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    seen = training.Callback(1, lambda state, writer: calls.append(int(state.step)))
    traced = train(workdir=str(tmp_path), profile=(2, 4), callbacks=[seen])
    assert calls == [1, 2, str(tmp_path / "profile"), 3, 4, "stop", 5, 6]
    assert equal(traced, train())
    with pytest.raises(InvalidInput, match="profile is '2:4', but the run goes on at step 6: only later steps"):
        train(workdir=str(tmp_path), steps=8, profile=(2, 4))
