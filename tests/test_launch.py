"""Launchers: what they would execute, what they refuse, and that a preempted slice is created again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import diffusion_jax

ROOT = Path(diffusion_jax.__file__).parent.parent

GCLOUD = """#!/usr/bin/env bash
echo "${*%%$'\\n'*}" >> calls
case "$*" in
  *"queued-resources describe"*) cat queue 2>/dev/null ;;
  *"tpu-vm describe"*) cat slice 2>/dev/null ;;
  *"queued-resources create"*) echo ACTIVE > queue; echo READY > slice ;;
  *"queued-resources delete"*) rm -f queue slice ;;
  *" ssh "*)
    if [[ ! -e preempted ]]; then
      touch preempted; echo SUSPENDED > queue; echo PREEMPTED > slice; exit "${FIRST_CODE:-255}"
    fi
    exit "${CODE:-0}" ;;
esac
true
"""
"""Stands for Google Cloud: the first run is preempted, the second ends with CODE."""


@pytest.fixture
def launch(tmp_path):
    """Runs `launch/tpu_pod.sh` of a small repository, with that gcloud."""
    checkout, tools = tmp_path / "checkout", tmp_path / "tools"
    shutil.copytree(ROOT / "launch", checkout / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / ".gitignore").write_text("out/\n/calls\n/queue\n/slice\n/preempted\n")
    tools.mkdir()
    (tools / "gcloud").write_text(GCLOUD)
    (tools / "gcloud").chmod(0o755)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "--all"], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=checkout, check=True)

    def run(*arguments, **variables):
        kept = {name: value for name, value in os.environ.items() if name not in ("ACCELERATOR", "SPOT", "PROJECT")}
        environment = kept | {"PATH": f"{tools}:{os.environ['PATH']}", "POLL": "0"} | variables
        command = ["bash", str(checkout / "launch/tpu_pod.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        calls = checkout / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return checkout, run


TRAIN = ("pod", "zone-b", "--config=digits_dit", "--workdir=gs://bucket/a run")


def test_a_dry_run_prints_every_command_and_executes_none(launch):
    _, run = launch
    done, calls = run("--dry-run", *TRAIN, ACCELERATOR="v5litepod-16", SPOT="1", PROJECT="mine")
    assert done.returncode == 0 and calls == []
    create, delete, scp, ssh = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    place = "--zone=zone-b --project=mine"
    kind = "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
    queued = "gcloud compute tpus queued-resources"
    assert create.split() == f"{queued} create pod --node-id=pod {place} {kind}".split()
    assert delete.split() == f"{queued} delete pod {place} --force --quiet".split()
    assert scp.startswith("gcloud compute tpus tpu-vm scp ") and ssh.startswith("gcloud compute tpus tpu-vm ssh pod ")
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {ssh}"], capture_output=True, text=True).stdout.split("\0")
    remote = next(word for word in words if word.startswith("--command="))
    assert "train --config=digits_dit --workdir=gs://bucket/a\\ run" in remote


@pytest.mark.parametrize(("variables", "code"), [({}, 0), ({"CODE": "3"}, 3), ({"FIRST_CODE": "0"}, 0)])
def test_a_preempted_slice_is_created_again_and_the_run_goes_on(launch, variables, code):
    """Also where the preempted run has saved and left with 0. What ends on a slice that stands is not repeated."""
    _, run = launch
    done, calls = run(*TRAIN, ACCELERATOR="v5litepod-16", **variables)
    assert done.returncode == code, done.stderr
    verbs = [call.split()[3] for call in calls if call.split()[3] != "describe"]
    assert verbs == ["create", "scp", "ssh", "delete", "create", "scp", "ssh"]


def test_a_slice_is_not_created_unless_it_is_asked_for(launch):
    _, run = launch
    done, calls = run(*TRAIN)
    assert done.returncode == 3 and "the slice pod is absent" in done.stderr
    assert [call.split()[3] for call in calls] == ["describe"]


def test_a_request_that_failed_is_told_and_not_repeated(launch):
    checkout, run = launch
    (checkout / "queue").write_text("FAILED\n")
    done, calls = run(*TRAIN, ACCELERATOR="v5litepod-16")
    assert done.returncode == 3 and "has failed" in done.stderr
    assert {call.split()[3] for call in calls} == {"describe"}


def test_what_is_not_committed_is_refused_or_taken_along_and_told(launch, tmp_path):
    checkout, run = launch
    (checkout / "new.py").touch()
    (checkout / "launch/gke.yaml").unlink()
    (checkout / "out").mkdir()
    (checkout / "out/samples.png").touch()
    index = (checkout / ".git/index").read_bytes()
    refused, calls = run(*TRAIN)
    assert refused.returncode == 2 and calls == []
    assert "new.py" in refused.stderr and "launch/gke.yaml" in refused.stderr
    taken, _ = run("--dry-run", "--include-uncommitted", *TRAIN)
    assert taken.returncode == 0
    assert "Left out, since git ignores them:\n   out/" in taken.stderr
    source = ["bash", "-c", "source launch/snapshot.sh && git ls-tree -r --name-only $(snapshot_tree 1)"]
    files = subprocess.run(source, cwd=checkout, capture_output=True, text=True).stdout.split()
    assert "new.py" in files and "launch/gke.yaml" not in files and "out/samples.png" not in files
    staged = subprocess.run(["git", "diff", "--cached", "--quiet"], cwd=checkout)
    assert staged.returncode == 0 and len((checkout / ".git/index").read_bytes()) == len(index)


def test_a_stopped_command_is_told_from_a_finished_one():
    stoppable = [str(ROOT / "launch/stoppable.sh"), "bash", "-c"]
    assert subprocess.run([*stoppable, "exit 5"]).returncode == 5
    saves = "trap 'exit 0' TERM; echo ready; while true; do sleep 0.02; done"
    with subprocess.Popen([*stoppable, saves], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            ["bash", "launch/slurm.sbatch", "--dry-run", "--config=a", "--workdir=b c"],
            ["srun --kill-on-bad-exit=1 .venv/bin/python -m diffusion_jax train --config=a --workdir=b\\ c"],
        ),
        (
            [sys.executable, "launch/gke.py", "--image=r/i:t", "--pods=2", "--dry-run", "--", "--workdir=gs://b/$x"],
            ["completions: 2", 'args: ["--workdir=gs://b/$x"]', "image: r/i:t"],
        ),
        (
            [sys.executable, "launch/local.py", "--processes=2", "--dry-run", "--", "echo", "a b"],
            ["JAX_PROCESS_ID=0 echo 'a b'", "JAX_PROCESS_ID=1 echo 'a b'"],
        ),
    ],
    ids=["slurm", "gke", "local"],
)
def test_dry_runs_of_the_other_launchers(command, says):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert all(text in done.stdout for text in says)
