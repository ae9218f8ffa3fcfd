"""Two real processes with two CPU devices each, joined by `jax.distributed` on this machine."""

import os
import socket
import subprocess
import sys


def start_two(script: str, *arguments: str) -> list[subprocess.Popen]:
    """Two processes that run `script` together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env={**environment, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]


def outputs_of_two(script: str, *arguments: str) -> list[str]:
    """What two processes print that run `script` together; fails if one of them does."""
    processes = start_two(script, *arguments)
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
    return outputs
