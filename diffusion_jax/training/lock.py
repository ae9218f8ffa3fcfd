"""One run in a folder at a time: a file that names who has it, under a lock of the system that ends with its process.

So the lock of a process that was killed is free at once. Several hosts that see one folder see each other's locks if
its file system has them (NFS does); buckets have none, and there two runs are not kept apart.
"""

import contextlib
import json
import os
import socket
from datetime import datetime
from typing import Any

from diffusion_jax.errors import InvalidInput

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None


class FolderLock:
    """Holds `root` for this process until `release`. The processes of one run need one lock, of the first of them.

    Raises InvalidInput, naming the owner, if another run has it.
    """

    def __init__(self, root: Any):
        self._file = None
        if fcntl is None or "://" in os.fspath(root):
            return
        file = open(os.path.join(os.fspath(root), "lock"), "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise InvalidInput(
                    f"{root} is in use: {_owner(file)}. Wait for it, stop it, or give another workdir."
                ) from None
        except OSError:
            # A file system without locks.
            file.close()
            return
        self._file = file
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n")
        file.flush()

    def release(self) -> None:
        """Lets others have it. The file stays: removing it would race with who has just opened it."""
        if self._file is not None:
            with contextlib.suppress(OSError), self._file:
                self._file.truncate(0)
            self._file = None


def _owner(file: Any) -> str:
    try:
        file.seek(0)
        owner = json.loads(file.read())
        return f"process {owner['pid']} on {owner['host']} has been training there since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process is training there"
