"""Processes of a tiny run, for tests that kill it: each line `[WORKDIR, STEPS, KILL, OUTPUT]` of the input makes one.

It is forked from this one, which has imported everything and computed nothing. What it prints goes to the file OUTPUT;
its exit code is printed here. KILL is `never`, `step:N` (SIGKILL itself after step N), `saving:N` (SIGKILL while
checkpoint N is being written) or `term:N` (SIGTERM itself after step N).
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from problems import Batches, init_params, make_objective

from diffusion_jax import timesteps, training
from diffusion_jax.training import ema, optimizers


def main(workdir, steps, kill):
    kind, _, number = kill.partition(":")
    callbacks = [training.Callback(1, lambda state, writer: None)]
    if kind in ("step", "term"):
        sent = signal.SIGKILL if kind == "step" else signal.SIGTERM

        def die(state, writer):
            if int(state.step) == int(number):
                os.kill(os.getpid(), sent)

        callbacks = [training.Callback(1, die)]
    if kind == "saving":
        folder = Path(workdir) / "checkpoints"

        def watch():
            while not any(folder.glob(f"{number}.orbax-checkpoint-tmp*")):
                time.sleep(0.0002)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
    state = training.train(
        make_objective(timesteps.importance(num_buckets=2, history=2)),
        optimizers.adamw(optimizers.cosine(1e-2, total_steps=20)),
        Batches(),
        init_params=init_params,
        steps=steps,
        workdir=workdir,
        ema={"fixed": ema.fixed(0.9), "power": ema.power(0.1)},
        log_every=1,
        checkpoint_every=4,
        snapshot_every=4,
        callbacks=callbacks,
        progress=False,
    )
    print("left at step", int(state.step))


def forked(workdir, steps, kill, output):
    """The exit code of a run in a process of its own."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    written = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(written, stream)
    try:
        main(workdir, steps, kill)
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    for line in sys.stdin:
        print(forked(*json.loads(line)), flush=True)
