"""The processes of a run watch each other: when one is lost or stops, the others end with a sentence, not in a wait.

Each counts up a key in the store that JAX's coordination keeps in process 0. Without that a process whose peer is gone
waits in a collective for minutes. If process 0 itself is killed, JAX ends the others at once, with words of its own.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

INTERVAL = 1.0
"""Seconds between two signs of life."""

PATIENCE = 30.0
"""Seconds without one after which a process counts as lost."""

DONE, STOPPED = "done", "stopped: "

_watched = 0


@contextlib.contextmanager
def watched(rest: str) -> Iterator[None]:
    """Around what all processes do together. rest: how the run goes on; the end of the sentence.

    When one of them is lost the others end here, with exit code 3: what they wait for will not come.
    """
    global _watched
    if jax.process_count() == 1:
        yield
        return
    _watched += 1
    watch = _Watch(f"diffusion_jax/alive/{_watched}", rest)
    try:
        yield
    except BaseException as error:
        watch.leave(STOPPED + (str(error).splitlines() or [type(error).__name__])[0][:300])
        raise
    watch.leave(DONE)


class _Watch:
    def __init__(self, prefix: str, rest: str):
        from jax._src import distributed

        self._client: Any = distributed.global_state.client
        self._prefix, self._rest = prefix, rest
        self._left = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def leave(self, last_words: str) -> None:
        self._left.set()
        # Where the store is gone, nobody is left to read them.
        with contextlib.suppress(Exception):
            self._say(last_words)

    def _say(self, words: str) -> None:
        self._client.key_value_set(f"{self._prefix}/{jax.process_index()}", words, allow_overwrite=True)

    def _run(self) -> None:
        beat, heard = 0, {}
        while not self._left.wait(INTERVAL):
            beat += 1
            try:
                self._say(str(beat))
                said = dict(self._client.key_value_dir_get(self._prefix))
            except Exception:
                self._end("Process 0 of this run was lost")
                return
            now = time.monotonic()
            for key, words in said.items():
                number = key.rsplit("/", 1)[-1]
                before, since = heard.get(number, (None, now))
                heard[number] = (words, now if words != before else since)
                if words.startswith(STOPPED):
                    self._end(f"Process {number} of this run {words.rstrip('.')}")
                elif words != DONE and now - heard[number][1] > PATIENCE:
                    self._end(
                        f"Process {number} of this run was lost: it gave no sign of life for {PATIENCE:g} seconds"
                    )

    def _end(self, why: str) -> None:
        if self._left.is_set():
            return
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"error: {why}; {self._rest}\n".encode())
        os._exit(3)
