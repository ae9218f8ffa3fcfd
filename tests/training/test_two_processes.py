"""A run of two processes of which one is lost ends with a sentence, and goes on with another number of processes."""

import jax
import numpy as np

from diffusion_jax import training
from diffusion_jax.training import optimizers
from tests.distributed.hosts import start_two

from .problems import Batches, init_params, make_objective

STEPS = 8

TWO = """
import os, signal, sys, time
import jax
from diffusion_jax import distributed
from diffusion_jax.command import leave, run_command
from diffusion_jax.training import peers
from tests.training.problems import Batches
from tests.training.test_two_processes import Share, train
distributed.initialize()
peers.PATIENCE = 2.0

def die(state, writer):
    if jax.process_index() == 1 and int(state.step) == 6:
        while not os.path.isdir(os.path.join(sys.argv[1], "checkpoints", "4")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

leave(run_command(lambda argv: train(sys.argv[1], die, Share())))
"""


class Share(Batches):
    """The rows of this process."""

    def __iter__(self):
        whole = super().__iter__()

        class Rows:
            get_state, set_state = whole.get_state, whole.set_state

            def __next__(self):
                rows = slice(jax.process_index() * 8, jax.process_index() * 8 + 8)
                return {name: value[rows] for name, value in next(whole).items()}

        return Rows()


def train(workdir=None, function=lambda state, writer: None, data=None):
    return training.train(
        make_objective(),
        optimizers.adamw(1e-2),
        Batches() if data is None else data,
        init_params=init_params,
        steps=STEPS,
        workdir=workdir,
        checkpoint_every=4,
        log_every=2,
        callbacks=[training.Callback(1, function)],
        progress=False,
    )


def test_a_lost_process_ends_the_other_and_one_process_goes_on(tmp_path):
    processes = start_two(TWO, str(tmp_path))
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [3, -9], outputs
    told = [line for line in outputs[0].splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "process" in told[0].lower() and "lost" in told[0], outputs[0]
    assert f"the same command goes on from what is in {tmp_path}" in told[0]
    assert "Traceback" not in outputs[0]
    steps = []
    state = train(str(tmp_path), lambda state, writer: steps.append(int(state.step)))
    assert steps == [5, 6, 7, 8]
    whole = train()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, whole.params)
