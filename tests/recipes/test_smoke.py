"""Every study runs at a few steps: its claims are numbers, its pictures exist, and its page can be written."""

import importlib
import math

import matplotlib.pyplot  # noqa: F401 (imported here, so that the first run does not pay for all)
import pytest
import tensorboardX  # noqa: F401

from diffusion_jax.metrics import judges
from diffusion_jax.recipes.__main__ import built, run
from diffusion_jax.recipes.page import system_page
from diffusion_jax.recipes.report import read_report
from diffusion_jax.recipes.systems import SYSTEMS

MODULES = {s.slug: importlib.import_module(f"diffusion_jax.recipes.{s.slug}") for s in SYSTEMS if built(s.slug)}
SLUGS = [slug for slug, module in MODULES.items() if hasattr(module, "study")]


@pytest.fixture(autouse=True)
def hasty_judges(monkeypatch):
    """Judges are trained for a few steps as well."""
    for world in judges.STEPS:
        monkeypatch.setitem(judges.STEPS, world, 10)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("slug", SLUGS)
def test_runs_at_a_few_steps(slug, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path / "cache"))
    report = run(slug, tmp_path / "out", variant="smoke")
    assert report.smoke and report.pictures
    for one in report.verdicts:
        assert all(math.isfinite(value) for value in (*one.ours, *one.against)), one.title
    for name in report.pictures:
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert read_report(tmp_path / "out" / "report.json") == report
    # Rows fit their lines.
    assert "its figures mean nothing" in system_page(report)
