"""The page on sampling: its commands are understood, its code runs on a run and a picture that the command wrote."""

import re
import shlex

import numpy as np

from diffusion_jax import train
from diffusion_jax.commands import sample_flags
from diffusion_jax.commands.image_files import write_image
from tests.guides.running import DOCS, run
from tests.test_commands import TRAIN


def test_sampling(tmp_path, monkeypatch):
    train.main([*TRAIN, f"--workdir={tmp_path / 'out' / 'digits'}"])
    settings = {"prompt": "a red cube", "seed": 3, "steps": 30}
    write_image(tmp_path / "out" / "cubes" / "images" / "00002.png", np.zeros((8, 8, 3)), settings)
    monkeypatch.chdir(tmp_path)
    names = run("sampling.md", {})
    assert names["settings"] == settings | {"version": names["settings"]["version"]}
    assert names["samples"].shape == (8, 8, 8, 1)


def test_every_flag_of_the_page_exists():
    text = (DOCS / "sampling.md").read_text().replace("\\\n", " ")
    known = {name for action in sample_flags.sample_parser()._actions for name in action.option_strings}
    flags = set(re.findall(r"`?(--[a-z][a-z-]*)", text)) - {"--config", "--trust", "--help"}
    assert len(flags) > 20 and flags <= known
    commands = re.findall(r"^diffusion-jax sample (.*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        argv = [one for one in shlex.split(command) if not one.startswith("--config.")]
        sample_flags.sample_parser().parse_args(argv)
