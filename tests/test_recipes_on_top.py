"""Nothing stands on recipes: what is worth calling lives in the packages, where configs, benchmarks, notebooks and the
how-tos find it. Within the package the floors of import-linter say the same (`make lint`)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORT = re.compile(
    r"^\W*(?:(?:from|import) diffusion_jax\.recipes\b|from diffusion_jax import (?:\([^)]*|[^\n]*)\brecipes\b)",
    flags=re.MULTILINE,
)


@pytest.mark.parametrize("folder", ["benchmarks", "configs", "notebooks", "docs"])
def test_nothing_beside_the_package_imports_recipes(folder):
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".ipynb", ".md")]
    assert files
    assert not [str(path) for path in files if IMPORT.search(path.read_text(encoding="utf-8"))]


def test_an_import_would_be_seen():
    for text in (
        "from diffusion_jax.recipes.parts import digits",
        "def f():\n    import diffusion_jax.recipes as all",
        "from diffusion_jax import models, recipes",
        "from diffusion_jax import (\n    models,\n    recipes,\n)",
        '    "from diffusion_jax.recipes import fvdm, trained\\n",',
    ):
        assert IMPORT.search(text)
    for text in ("    python -m diffusion_jax.recipes fvdm", "from diffusion_jax import models\n\nrecipes = 1"):
        assert not IMPORT.search(text)
