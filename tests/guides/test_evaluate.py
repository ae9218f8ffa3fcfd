"""The page on measuring: its code runs, and its commands are ones."""

import re
import shlex

import numpy as np
from PIL import Image

from diffusion_jax.evaluate import flags
from tests.guides.running import DOCS, run


def test_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name in ("drawn", "test"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            picture = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "photos" / name / f"{i}.png")
    names = run("evaluate.md", {})
    assert names["report"]["images"]["sizes"] == {"9 x 12": 8}


def test_the_commands():
    text = (DOCS / "evaluate.md").read_text()
    commands = re.findall(r"^diffusion-jax evaluate (.*)$", text, re.MULTILINE)
    assert len(commands) > 6
    for command in commands:
        flags().parse_args(shlex.split(command))
    mentioned = set(re.findall(r"`(--[a-z-]+)", text))
    known = {option for action in flags()._actions for option in action.option_strings}
    assert mentioned <= {*known, "--local-dir"}
