"""Every recipe runs at a few steps: its claims are numbers, its pictures exist, and its models are kept."""

import importlib
import math

import matplotlib.pyplot  # noqa: F401 (imported here, so that the first run does not pay for all)
import pytest
import tensorboardX  # noqa: F401

from diffusion_jax.metrics import judges
from diffusion_jax.recipes import SYSTEMS
from diffusion_jax.recipes.__main__ import built, run
from diffusion_jax.recipes.report import read_report

SLUGS = [system.slug for system in SYSTEMS if built(system.slug)]
for _slug in SLUGS:
    importlib.import_module(f"diffusion_jax.recipes.{_slug}")


@pytest.fixture(autouse=True)
def hasty_judges(monkeypatch):
    """Judges are trained for a few steps as well."""
    for world in judges.STEPS:
        monkeypatch.setitem(judges.STEPS, world, 10)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("slug", SLUGS)
def test_runs_at_a_few_steps(slug, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path / "cache"))
    report = run(slug, tmp_path / "out", smoke=True)
    assert report.claims
    assert report.pictures
    for claim in report.claims:
        assert math.isfinite(claim.baseline), claim.name
        assert math.isfinite(claim.ours), claim.name
    for name in report.pictures:
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert read_report(tmp_path / "out" / "report.json") == report
