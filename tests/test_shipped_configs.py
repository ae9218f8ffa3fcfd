"""Every shipped config is imported, shrunk, trained one step and sampled; what it names exists."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.config import ConfigDict, load, override, to_json
from diffusion_jax.experiment import compiled_sampler, prepare, prepare_sampling
from diffusion_jax.train import run

CONFIGS = sorted(path.stem for path in Path("configs").glob("*.py"))

TINY = {
    "digits_dit": ["model.width=16", "model.depth=1", "model.heads=2"],
    "digits_unet": ["model.channels=8", "model.multipliers=(1,)", "model.attention=(1,)", "model.heads=2"],
    "faces_dit": ["model.width=16", "model.depth=1", "model.heads=2"],
    "imagenet_dit": ["model.width=16", "model.depth=1", "model.heads=2", "model.dtype=float32"],
    "prose_masked": ["model.width=16", "model.depth=1", "model.heads=2", "data.length=16", "held_out.length=16"],
    "shapes_text_dit": ["model.width=16", "model.depth=1", "model.heads=2", "data.length=40", "held_out.length=40"],
    "toy2d": ["model.width=8", "model.depth=1", "data.source.num_examples=64", "held_out.source.num_examples=64"],
}
SHORT = ["train.steps=1", "train.batch_size=16", "train.validation_examples=8"]


def shrunk(name: str, folder: Path):
    config = override(load(f"configs/{name}.py"), [*SHORT, *TINY[name], "mesh.data=8"])
    if name == "imagenet_dit":
        rng = np.random.default_rng(0)
        latents = rng.normal(size=(16, 8, 8, 4)).astype(np.float32)
        data.write_latents(str(folder), "shard", latents, {"label": np.full(16, 3, np.int32)})
        config = override(config, [f"data.folder={folder}", f"held_out.folder={folder}"])
    return config


def test_every_config_is_in_this_test():
    assert set(CONFIGS) == set(TINY)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_step_and_one_batch(name, tmp_path):
    experiment = prepare(shrunk(name, tmp_path))
    state = run(experiment, tmp_path / "run", progress=False)
    assert load(str(tmp_path / "run" / "config.json")) == ConfigDict(json.loads(to_json(experiment.config)))
    assert int(state.step) == 1
    assert int(state.skipped) == 0
    sampling = prepare_sampling(experiment)
    grid = sampling.grid[jnp.array([0, -2, -1])]
    index = np.arange(8, dtype=np.int32)
    cond = sampling.conditions(index) if sampling.conditions else None
    params = state.ema[experiment.config.sampling.ema]
    samples = compiled_sampler(experiment, sampling)(jax.random.key(0), params, grid, cond, index)
    assert samples.x.shape == (8, *experiment.shape)
    assert bool(jnp.all(jnp.isfinite(samples.x)))


@pytest.mark.parametrize("preset", ["S/2", "XL/2"])
def test_imagenet_presets_are_the_papers(preset):
    from diffusion_jax import models
    from diffusion_jax.config import build

    network = build(load(f"configs/imagenet_dit.py:{preset}").model)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = models.param_shapes(network, (1, 32, 32, 4), {"label": label})
    millions = models.count_params(shapes) / 1e6
    assert millions == pytest.approx({"S/2": 33, "XL/2": 675}[preset], rel=0.02)
