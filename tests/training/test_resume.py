"""Killed at any instant, a run ends bit for bit as if nothing had happened."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax import timesteps, training
from diffusion_jax.training import ema, logging, optimizers

from .problems import equal, init_params, make_objective

SCRIPT = Path(__file__).with_name("run_once.py")
STEPS = 16
CHANCE = random.Random(2)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Makes a run in a process of its own with one device; returns (return code, output)."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        # Every process runs the program that the first one compiled.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    command, folder = [sys.executable, str(SCRIPT)], tmp_path_factory.mktemp("outputs")
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipe) as starter:

        def run(workdir, kill):
            output = folder / f"{workdir.name}-{kill}"
            starter.stdin.write(json.dumps([str(workdir), STEPS, kill, str(output)]) + "\n")
            starter.stdin.flush()
            return int(starter.stdout.readline()), output.read_text()

        yield run
        starter.stdin.close()


def final_state(workdir):
    """The checkpoint of the last step, as a whole, and the logged losses."""
    objective = make_objective(timesteps.importance(num_buckets=2, history=2))
    initial = training.make_init(
        objective,
        optimizers.adamw(optimizers.constant(1.0)),
        init_params,
        {"x0": np.zeros((16, 4), np.float32)},
        ema={"fixed": ema.fixed(0.9), "power": ema.power(0.1)},
    )
    with training.Checkpointer(workdir) as checkpointer:
        restored = checkpointer.restore(jax.eval_shape(initial))
    log = [
        {name: value for name, value in record.items() if name != "steps_per_second"}
        for record in logging.read_log(Path(workdir) / "metrics.jsonl")
    ]
    return restored, log


def test_a_run_killed_again_and_again_equals_one_that_was_not(launch, tmp_path):
    code, output = launch(tmp_path / "whole", "never")
    assert code == 0, output
    broken = tmp_path / "broken"
    kills = [
        f"step:{CHANCE.randint(1, 3)}",
        "saving:4",
        f"step:{CHANCE.randint(5, 7)}",
        "saving:8",
        f"step:{CHANCE.randint(13, 15)}",
        "saving:16",
    ]
    for kill in kills:
        code, output = launch(broken, kill)
        assert code == -9, (kill, code, output)
        if kill.startswith("saving"):
            assert not (broken / "checkpoints" / kill.partition(":")[2]).exists()
    # Asked politely, it saves where it is and leaves; there was no checkpoint due at this step.
    code, output = launch(broken, "term:14")
    assert code == 0 and "left at step 14" in output, output
    assert (broken / "checkpoints" / "14").is_dir()
    code, output = launch(broken, "never")
    assert code == 0 and f"left at step {STEPS}" in output, output

    expected, expected_log = final_state(tmp_path / "whole")
    found, found_log = final_state(broken)
    assert expected.step == found.step == STEPS
    assert expected.data == found.data == {"at": STEPS}
    assert equal(expected.state, found.state)
    assert [record["step"] for record in expected_log] == list(range(1, STEPS + 1))
    assert found_log == expected_log
    whole, mended = (training.reconstruct_ema(tmp_path / name, 0.12) for name in ("whole", "broken"))
    assert equal(whole, mended)
