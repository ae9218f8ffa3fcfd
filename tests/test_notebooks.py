"""The notebooks run from the first cell to the last, with the sizes of their parameter cells made small.

They share a kernel, whose names are forgotten before each: importing JAX four times would cost more than the cells.
"""

import os
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

SMALL = {
    "quickstart": """
from diffusion_jax.metrics import features

steps, num_samples, workdir = 2, 100, None
features.STEPS["digits"] = 30
""",
    "tour_of_the_timestep": "num_draws = 500",
    "compose_your_own_sampler": "num_samples, num_steps = 200, 6",
    "choose_each_parts_own_time": "steps, num_samples = 2, 4",
}


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


def test_every_notebook_is_in_this_test():
    assert {path.stem for path in Path("notebooks").glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name, kernel):
    notebook = nbformat.read(f"notebooks/{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert "import diffusion_jax" in notebook.cells[1].source, "the first code cell installs in Colab"
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(SMALL[name]))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    NotebookClient(notebook, km=kernel, timeout=600).execute()
