"""Every shipped config is run by a test, is what a run writes down of it, and has the sizes of its paper."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.config import ConfigDict, build, load, to_json
from diffusion_jax.training.weights import write_config
from tests.configs.one_step import IMAGES, POINTS_AND_TEXT, loaded
from tests.guides.test_your_images import CONFIG as RUN_BY_ITS_GUIDE
from tests.test_commands import CONFIG as RUN_BY_ITS_COMMANDS

CONFIGS = sorted(path.stem for path in Path("configs").glob("*.py"))


def test_every_config_is_run():
    assert {*CONFIGS} == {*IMAGES, *POINTS_AND_TEXT, RUN_BY_ITS_COMMANDS, RUN_BY_ITS_GUIDE}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_run_writes_down_is_the_config(name, tmp_path):
    config = loaded(name, tmp_path)
    write_config(tmp_path, config.to_dict())
    assert load(str(tmp_path / "config.json")) == ConfigDict(json.loads(to_json(config)))


@pytest.mark.parametrize("preset", ["S/2", "XL/2"])
def test_imagenet_presets_are_the_papers(preset):
    network = build(load(f"configs/imagenet_dit.py:{preset}").model)
    label = jax.ShapeDtypeStruct((1,), np.int32)
    shapes = models.param_shapes(network, (1, 32, 32, 4), {"label": label})
    millions = models.count_params(shapes) / 1e6
    assert millions == pytest.approx({"S/2": 33, "XL/2": 675}[preset], rel=0.02)
