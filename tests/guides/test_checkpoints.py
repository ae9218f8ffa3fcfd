"""The how-to of checkpoints."""

from tests.guides.running import checkpoints, run
from tests.interop.folders import SIZE


def test_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = checkpoints(tmp_path / "checkpoints")
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
        "cube.safetensors",
        "style.safetensors",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
