"""A shipped config, shrunk, trained one step and sampled.

One device and no folder: checkpoints and the mesh have tests of their own.
`digits_dit` is run by `tests.test_commands`, `image_folder` by `tests.guides.test_your_images`.
"""

from pathlib import Path

import jax
import numpy as np

from diffusion_jax import data
from diffusion_jax.config import load
from diffusion_jax.config.overrides import apply_overrides
from diffusion_jax.data.latent_shards import describe_latents
from diffusion_jax.distributed import make_mesh
from diffusion_jax.experiment import compiled_sampler, prepare, prepare_sampling
from diffusion_jax.train import run
from tests.drawings import draw_folder

TINY = ["model.width=16", "model.depth=1", "model.heads=2"]
IMAGES = {
    "digits_unet": ["model.channels=8", "model.multipliers=(1,)", "model.attention=(0,)", "model.heads=2"],
    "faces_dit": ["model.width=16", "model.depth=1", "model.heads=2"],
    "latents": [*TINY, "sampling.decoder=None", "train.sample_every=None"],
    "imagenet_dit": ["model.width=16", "model.depth=1", "model.heads=2", "model.dtype=float32"],
}
POINTS_AND_TEXT = {
    "prose_masked": [*TINY, "data.length=16", "held_out.length=16"],
    "shapes_text_dit": [*TINY, "model.conditions.0.depth=1", "data.length=40", "held_out.length=40"],
    "toy2d": ["model.width=8", "model.depth=1", "data.source.num_examples=64", "held_out.source.num_examples=64"],
}
SHORT = ["train.steps=1", "train.batch_size=8", "train.validation_examples=4"]


def loaded(name: str, folder: Path):
    """A shipped config; one that is set up by what is in a folder, on a folder of drawings."""
    variant = f":{FOLDERS[name](folder)}" if name in FOLDERS else ""
    return load(f"configs/{name}.py{variant}")


def latents_folder(folder: Path) -> Path:
    """Latents without a condition, as `diffusion-jax encode` leaves them."""
    latents = np.random.default_rng(0).normal(size=(16, 8, 8, 4)).astype(np.float32)
    for part in ("train", "held_out"):
        data.write_latents(folder / "latents" / part, "shard", latents)
    description = {"autoencoder": {"folder": "none"}, "text": None, "examples": {"train": 16, "held_out": 16}}
    describe_latents(folder / "latents", description)
    return folder / "latents"


FOLDERS = {"image_folder": lambda folder: draw_folder(folder / "drawings", 24), "latents": latents_folder}


def shrunk(name: str, folder: Path):
    config = apply_overrides(loaded(name, folder), [*SHORT, *(IMAGES | POINTS_AND_TEXT)[name]])
    if name == "imagenet_dit":
        rng = np.random.default_rng(0)
        latents = rng.normal(size=(16, 8, 8, 4)).astype(np.float32)
        data.write_latents(str(folder), "shard", latents, {"label": np.full(16, 3, np.int32)})
        config = apply_overrides(config, [f"data.folder={folder}", f"held_out.folder={folder}"])
    return config


def check_one_step_and_one_batch(name, folder):
    experiment = prepare(shrunk(name, folder))._replace(mesh=make_mesh(devices=jax.devices()[:1]))
    state = run(experiment, workdir=None, progress=False)
    assert int(state.step) == 1
    assert int(state.skipped) == 0
    sampling = prepare_sampling(experiment)
    grid = np.asarray(sampling.grid)[[0, -2, -1]]
    index = np.arange(4, dtype=np.int32)
    cond = sampling.conditions(index) if sampling.conditions else None
    params = state.ema[experiment.config.sampling.ema]
    samples = compiled_sampler(experiment, sampling)(jax.random.key(0), params, grid, cond, index)
    assert samples.x.shape == (4, *experiment.shape)
    assert np.isfinite(samples.x).all()
