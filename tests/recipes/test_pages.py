"""The code of the pages runs as it is printed, on a reader's own network."""

import pytest

from diffusion_jax.recipes.page import TEXTS, code_of

SLUGS = sorted(path.stem for path in TEXTS.glob("*.md"))


@pytest.mark.parametrize("slug", SLUGS)
def test_the_code_of_a_page_runs(slug, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = code_of(slug)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    assert "recipes" not in code
    exec(compile(code, f"{slug}.md", "exec"), {})
