"""`sample --pretrained`: the sampling config applied to a checkpoint, and what is refused."""

import numpy as np
from PIL import Image

from diffusion_jax import sample
from diffusion_jax.command import run_command
from diffusion_jax.commands.image_files import read_settings
from tests.interop.folders import SIZE, dit_folder, sd_folder


def test_fields_of_the_sampling_config_reach_the_network(tmp_path, capsys):
    """A solver's arguments, a preset of acceleration, a grid and a transformation; the seeds are those of `--seed`."""
    sd = sd_folder(tmp_path / "sd")
    command = [f"--pretrained={sd}", "--prompt=a cat", f"--size={SIZE}x{SIZE}", "--steps=4", "--solver=dpm_solver_pp"]
    pixels = {}
    for name, more in {
        "plain": [],
        "forecast": ["--config.sampling.acceleration.preset=interval_reuse"],
        "changed": ["--solver=dpm_solver_pp(order=1)", "--config.sampling.grid=timesteps.karras(steps=3)"],
        "seeds": ["--seeds=2,0"],
    }.items():
        assert run_command(sample.main, [*command, *more, f"--output={tmp_path / name}"]) == 0, capsys.readouterr().err
        pixels[name] = np.asarray(Image.open(tmp_path / name / "images" / "00000.png"), int)
    assert all((pixels["plain"] != pixels[name]).any() for name in ("changed", "forecast"))
    second = np.asarray(Image.open(tmp_path / "seeds" / "images" / "00001.png"), int)
    np.testing.assert_array_equal(second, pixels["plain"])
    made = read_settings(tmp_path / "changed" / "images" / "00000.png")
    assert made["solver"].startswith("dpm_solver_pp(order=1") and made["steps"] == 3 and len(made["config"]) == 1
    assert run_command(sample.main, [*command, "--config.train.steps=3", f"--output={tmp_path / 'x'}"]) == 2
    assert run_command(sample.main, [*command, "--shard-size=3", f"--output={tmp_path / 'x'}"]) == 2
    assert "--shard-size is for a training run (--workdir)" in capsys.readouterr().err


def test_a_model_of_classes_is_asked_by_class(tmp_path, capsys):
    dit = dit_folder(tmp_path / "dit")
    command = [f"--pretrained={dit}", "--steps=2", f"--size={SIZE}x{SIZE}", f"--output={tmp_path / 'a'}"]
    assert run_command(sample.main, [*command, "--prompt=bee"]) == 2
    assert "was trained on classes: use --class" in capsys.readouterr().err
    assert run_command(sample.main, [*command, "--class=bee,3"]) == 0
    assert [read_settings(tmp_path / "a" / "images" / f"0000{i}.png")["class"] for i in (0, 1)] == ["bee", "3"]
