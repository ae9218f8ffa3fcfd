"""What is freed stays with the process, so that touching it again costs no page fault; the environment can say no."""

import json
import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource
import diffusion_jax
from diffusion_jax.malloc import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        bytearray(96 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(json.dumps([faults(), *keep_freed_memory()]))
"""


def told(**variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, env=clean | variables
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told anything")
def test_freed_memory_is_kept_and_found_again():
    faults, own_mapping, _ = told()
    assert own_mapping >= 2**25
    # A page of 4 KiB each would be 98304. Older versions of glibc keep blocks of up to 32 MiB only.
    assert faults < 100 or own_mapping < 2**26


@pytest.mark.parametrize(
    "variables",
    [
        {"DIFFUSION_JAX_MALLOC": "system"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
    ],
    ids=str,
)
def test_the_environment_has_the_last_word(variables):
    assert told(**variables)[1:] == [0, 0]
