"""The code of the how-tos runs as it is printed, at tiny sizes and on folders that the tests write."""

import re
from pathlib import Path

import pytest

from diffusion_jax import interop, models
from tests.interop.folders import SIZE, UNET, drawn, sd_folder

DOCS = Path(__file__).parent.parent / "docs"


def run(name, smaller):
    """Runs the code of a page with some of its text replaced, and returns the names that it defines."""
    text = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL))
    for found, put in smaller.items():
        assert found in text, found
        text = text.replace(found, put)
    names = {}
    exec(compile(text, name, "exec"), names)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = sd_folder(tmp_path_factory.mktemp("checkpoints") / "sd15")
    # A latent of the tiny autoencoder is two pixels, so the picture is halved once.
    control = models.controlnet("sd15", control_features=(4, 8), **UNET)
    interop.save_pretrained(folder.parent / "control", drawn("ControlNetModel", control))
    return folder


def test_checkpoints(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = {
        "checkpoints/sd15": str(folder),
        "num_steps=30": "num_steps=2",
        "checkpoints/sd-controlnet-canny": str(folder.parent / "control"),
        "(2, 512, 512, 3)": f"(2, {SIZE}, {SIZE}, 3)",
        "(512, 512)": f"({SIZE}, {SIZE})",
        "data=2": "data=2, devices=jax.devices()[:2]",
        "range(100)": "range(3)",
        "tile=64, overlap=16": "tile=4, overlap=2",
    }
    names = run("checkpoints.md", smaller)
    assert names["images"].shape == (2, SIZE, SIZE, 3)
    assert float(names["metrics"]["loss"]) > 0
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} == {
        "style.safetensors",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


def test_vector_times():
    smaller = {
        'video_dit("S/4")': 'video_dit("S/4", width=16, depth=2, heads=2)',
        '"S", times="tokens", skips=True': '"S", times="tokens", skips=True, width=16, depth=3, heads=2',
        '"S", pooled=True': '"S", pooled=True, width=16, depth=2, heads=2',
        "linspace(20)": "linspace(10)",
    }
    names = run("vector_times.md", smaller)
    assert {x.shape for x in names["made"].values()} == {(2, 8, 16, 16, 3)}
    assert names["run"]._cache_size() == 1
    assert names["long"].shape == (2, 16, 16, 16, 3)
    assert names["slid"].shape == (2, 16, 16, 16, 3)
    assert names["image"].shape == (2, 8, 8, 1)
    assert names["chunk"].shape == (2, 4, 2)
    assert float(names["stream"].run.cost.evaluations) == 3 * 8


def test_faster_sampling(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = {
        '"S/2", num_classes': '"S/2", width=16, depth=2, heads=2, num_classes',
        '"S/2", width=192, depth=4, heads=3': '"S/2", width=8, depth=1, heads=2',
        "(8, 32, 32, 4)": "(8, 4, 4, 1)",
        "checkpoints/sd15": str(folder),
        "num_steps=30": "num_steps=4",
        "(512, 512)": f"({SIZE}, {SIZE})",
        "linspace(50)": "linspace(12)",
        "linspace(17)": "linspace(4)",
        "(3, 5)": "(3,)",
    }
    names = run("faster_sampling.md", smaller)
    assert names["images"].shape == (1, SIZE, SIZE, 3)
    # An untrained network says nothing, so forecasts of it are exact, and only fewer steps change the sample.
    assert all(error < 1e-5 for name, (_, error, _) in names["table"].items() if "instead" not in name)
    assert all(faster > 1.2 for name, (faster, _, _) in names["table"].items() if "gate" not in name)
    assert names["rectified"].x.shape == names["out"].x.shape == (8, 4, 4, 1)
    assert float(names["out"].cost.evaluations) < 2 * 12
