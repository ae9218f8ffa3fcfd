"""What a reader sees of a notebook that was not run: a badge, an installation that keeps Colab's JAX, outputs."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted(Path("notebooks").glob("*.ipynb"))

LARGEST = 400_000
"""Bytes of a notebook with its pictures."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_ready_to_be_read(path):
    text = path.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert f"colab.research.google.com/github/diffusion-jax/diffusion_jax/blob/main/{path}" in sources[0]
    assert "--constraint kept.txt" in sources[1] and '("jax", "jaxlib")' in sources[1]
    for cell, source in zip(cells, sources):
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error" and output.get("name") != "stderr", source
            assert len(output.get("text", [])) <= 20, "a page of text, or a bar by the hundred lines"
        if "plt.show()" in source and "def " not in source:
            assert any("image/png" in output.get("data", {}) for output in cell["outputs"]), source
    assert len(text) < LARGEST
