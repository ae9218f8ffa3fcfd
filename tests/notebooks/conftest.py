"""The kernel in which the notebooks of a test file run."""

import os

import pytest
from jupyter_client import KernelManager


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # One device, as a reader has it; the kernel inherits the environment.
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
        patch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        manager = KernelManager()
        manager.start_kernel(cwd=".")
        yield manager
        manager.shutdown_kernel()
