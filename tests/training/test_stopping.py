"""Asked to stop by a signal, a run saves and leaves; the rest of it equals a run that was not asked."""

import errno
import os
import signal

import grain
import numpy as np
import pytest

from diffusion_jax import training
from diffusion_jax.errors import Halted
from diffusion_jax.training import checkpoint, optimizers

from .problems import Batches, equal, init_params, make_objective


def shuffled():
    table = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    data = grain.MapDataset.source(np.arange(64)).shuffle(seed=1).repeat().batch(16)
    return data.map(lambda index: {"x0": table[index], "index": index}).to_iter_dataset()


def train(workdir=None, kill=(), at=0, ready=lambda: None, data=Batches):
    """Six steps; after step `at` the signals `kill` are sent to this process."""

    def ask(state, writer):
        if int(state.step) == at:
            ready()
            for number in kill:
                os.kill(os.getpid(), number)

    return training.train(
        make_objective(),
        optimizers.adamw(1e-2),
        data(),
        init_params=init_params,
        steps=6,
        workdir=None if workdir is None else str(workdir),
        callbacks=[training.Callback(1, ask)],
        log_every=2,
        checkpoint_every=3,
        progress=False,
    )


@pytest.fixture(scope="module")
def whole():
    return train()


KILLS = [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]]


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: " then ".join(number.name for number in kill))
def test_a_signal_in_the_middle_then_the_rest_equals_the_whole(whole, tmp_path, kill):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    early = train(tmp_path, kill, at=4)
    assert int(early.step) == 4 and sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "4"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert equal(train(tmp_path), whole)


def test_the_iterators_of_grain_go_on_where_they_were(tmp_path):
    whole = train(data=shuffled)
    assert int(train(tmp_path, [signal.SIGTERM], at=4, data=shuffled).step) == 4
    assert equal(train(tmp_path, data=shuffled), whole)


def test_a_second_interrupt_leaves_at_once_and_what_was_saved_stays(whole, tmp_path):
    def saved():
        while not (tmp_path / "checkpoints" / "3").exists():
            pass

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [signal.SIGINT, signal.SIGINT], at=5, ready=saved)
    assert os.listdir(tmp_path / "checkpoints") == ["3"]
    assert equal(train(tmp_path), whole)


def test_a_start_that_fails_leaves_no_lock(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "writable", refused)
        with pytest.raises(Halted, match="Too many open files") as held:
            training.Checkpointer(tmp_path)
    training.Checkpointer(tmp_path).close()
    assert held.value is not None
