"""The notebooks run from the first cell to the last, with the sizes of their parameter cells made small."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

SMALL = {
    "quickstart": "steps, num_samples, workdir = 20, 104, None",
    "tour_of_the_timestep": "num_draws = 500",
    "compose_your_own_sampler": "num_samples, num_steps = 200, 6",
    "choose_each_parts_own_time": "steps, num_samples = 2, 4",
}


def test_every_notebook_is_in_this_test():
    assert {path.stem for path in Path("notebooks").glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name, monkeypatch, tmp_path):
    # One device, as a reader has it; the kernel inherits the environment.
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path))
    notebook = nbformat.read(f"notebooks/{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert "import diffusion_jax" in notebook.cells[1].source, "the first code cell installs in Colab"
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(SMALL[name]))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": "."}}).execute()
