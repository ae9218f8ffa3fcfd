"""A notebook is run from the first cell to the last, with the sizes of its parameter cell made small.

The notebooks of a test file share a kernel, whose names are forgotten before each: to import JAX costs as much as the
cells of a short one.
"""

import nbformat
from nbclient import NotebookClient

SMALL = {
    "quickstart": """
from diffusion_jax.metrics import judges

steps, num_samples, workdir = 2, 100, None
judges.STEPS["digits"] = 30
""",
    "tour_of_the_timestep": "num_draws = 500",
    "compose_your_own_sampler": "num_samples, num_steps = 200, 6",
    "choose_each_parts_own_time": "steps, num_samples = 2, 4",
}


def check_it_runs(name, kernel):
    notebook = nbformat.read(f"notebooks/{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert "import diffusion_jax" in notebook.cells[1].source, "the first code cell installs in Colab"
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(SMALL[name]))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    NotebookClient(notebook, km=kernel, timeout=600).execute()
