"""The how-to of one's own images: its code at tiny sizes, and that its overrides are those of the config."""

import re

import pytest

from diffusion_jax.config import load
from diffusion_jax.config.overrides import apply_overrides
from tests.drawings import draw_folder
from tests.guides.running import DOCS, run

CONFIG = "image_folder"
TINY = '"data.size=8", "model.patch=1", "model.width=16", "model.depth=1", "model.heads=2", "train.batch_size=8", '


def test_your_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder("my_pictures", 24, classes=True)
    smaller = {'"train.steps=2000"': TINY + '"train.steps=1", "train.sample_every=None", "train.validate_every=None"'}
    with pytest.warns(UserWarning, match="1 of 24 pictures"):
        names = run("your_images.md", smaller)
    assert int(names["state"].step) == 1 and len(names["experiment"].held_out) == 2
    assert list((tmp_path / "out" / "mine" / "checkpoints").iterdir())


def test_its_overrides_can_be_given(tmp_path):
    config = load(f"configs/{CONFIG}.py:{draw_folder(tmp_path / 'drawings', 3)}")
    text = (DOCS / "your_images.md").read_text()
    given = re.findall(r"`\"?--config\.([\w.]+=[^`]*?)\"?`", text)
    assert len(given) > 12
    for override in given:
        if ".call=" not in override:
            apply_overrides(config, [override])
