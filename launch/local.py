"""Starts a command as several processes of one run on this machine, joined over the loopback address.

    python launch/local.py --processes=2 -- diffusion-jax train --config=... --workdir=out/two

The same program that a pod runs, for trying it out: each process sees its own devices (with --devices=N, N virtual CPU
devices) and all of them form one mesh. Output lines carry the process's number; the first failure ends the others.
"""

import argparse
import os
import shlex
import socket
import subprocess
import sys
import threading


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def relay(process: subprocess.Popen, name: int) -> None:
    for line in process.stdout:
        sys.stdout.write(f"[{name}] {line}")
        sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    parser.add_argument("--devices", type=int, help="virtual CPU devices a process (default: the devices it finds)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- followed by the command")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command or arguments.processes < 1:
        parser.error("give a command after --, and at least one process")

    added = {"JAX_NUM_PROCESSES": str(arguments.processes), "PYTHONUNBUFFERED": "1"}
    added["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"
    if arguments.devices:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices}"
        added |= {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    if arguments.dry_run:
        for i in range(arguments.processes):
            variables = [f"{name}={shlex.quote(value)}" for name, value in (added | {"JAX_PROCESS_ID": str(i)}).items()]
            print(" ".join([*variables, shlex.join(command)]))
        return 0
    environment = os.environ | added
    processes = [
        subprocess.Popen(
            command,
            env=dict(environment, JAX_PROCESS_ID=str(i)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(arguments.processes)
    ]
    readers = [threading.Thread(target=relay, args=(p, i), daemon=True) for i, p in enumerate(processes)]
    for reader in readers:
        reader.start()
    code = 0
    waiting = list(processes)
    while waiting:
        for process in list(waiting):
            try:
                result = process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            waiting.remove(process)
            if result and not code:
                code = result
                for other in waiting:
                    other.terminate()
    for reader in readers:
        reader.join(timeout=5)
    return code


if __name__ == "__main__":
    sys.exit(main())
