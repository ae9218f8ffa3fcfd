"""Test set-up: eight virtual CPU devices, checked shapes, quick compilation, and its cache, shared by the workers."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.budget import Meter

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: without LLVM's optimisations and without XLA's fusion emitters programs compile
# in a third of the time, and one program by one thread: the workers are as many as the cores. Laws about single bits
# compile with `tests.shipped.jit`. The XLA of jax 0.12 stops the process at a flag that it does not know.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if version("jaxlib").startswith("0.10.")
        else "",
    ]
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
os.environ.setdefault("MPLBACKEND", "agg")
# NumPy's matrices are small here: threads of its own would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook("diffusion_jax", "beartype.beartype")

LARGEST = 2.5 * 2**30
"""Bytes that a worker may hold: beyond, compiled programs are dropped at the end of a file."""


def pytest_configure(config):
    config.pluginmanager.register(Meter(config), "processor time")


def pytest_collection_finish(session):
    # Tracing makes and drops objects by the hundred thousand; what was imported is not to be searched each time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    yield
    statm = Path("/proc/self/statm")
    if statm.is_file() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > LARGEST:
        import jax

        jax.clear_caches()
        gc.collect()
