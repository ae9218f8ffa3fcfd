"""The page on watching a run."""

from tests.guides.running import run


def test_watching():
    assert "Print" in run("watching.md", {})
