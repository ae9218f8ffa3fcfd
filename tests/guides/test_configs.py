"""The page on configs: its commands can be given, and its module and its config are used as they stand."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from diffusion_jax import config as configs
from diffusion_jax.command import split_overrides
from diffusion_jax.config.overrides import apply_overrides
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import check_training, prepare, prepare_sampling
from tests.guides.running import DOCS

PAGE = (DOCS / "configs.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
DIGITS = str(Path("configs/digits_dit.py").absolute())


def commands():
    """Overrides of each command of the page, and of each row of its table."""
    text = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    rows = re.findall(r"^\| .*`(--config\..*)` \|$", PAGE, re.MULTILINE)
    return [split_overrides(shlex.split(line))[0] for line in [*text.splitlines(), *rows]]


def test_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    names = {}
    (tmp_path / "my_parts.py").write_text(next(block for block in PYTHON if "def leaning" in block))
    for block in PYTHON:
        exec(compile(block.replace('"digits_dit"', repr(DIGITS)), "configs.md", "exec"), names)
    assert names["experiment"].config.train.steps == 500

    made = [apply_overrides(configs.load(DIGITS), overrides) for overrides in commands()]
    assert sum(config != configs.load(DIGITS) for config in made) >= 13
    for config in made:
        if config.model.conditions[0]["num_classes"] == 10 and config != configs.load(DIGITS):
            prepare_sampling(prepare(config))
    (tmp_path / "my_config.py").write_text(next(block for block in PYTHON if "def get_config" in block))
    own = prepare(configs.load("my_config.py:checkerboard"))
    check_training(own)
    assert prepare_sampling(own).grid.shape == (21,)

    stored = next(config for config in made if config.optimizer.call == "optax:sgd")
    (tmp_path / "config.json").write_text(configs.to_json(stored))
    with pytest.raises(InvalidInput) as error:
        configs.load("config.json")
    assert " ".join(str(error.value).split()).partition(" calls ")[2] in " ".join(PAGE.split())
    assert configs.load("config.json", ["optax"]).optimizer == stored.optimizer
