"""Files: what is written is read back, nothing is unpickled, and what is wrong is said in a sentence."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.errors import InvalidInput

RNG = np.random.default_rng(0)
X0 = RNG.uniform(-1, 1, (12, 4, 4, 3)).astype(np.float32)
LABEL = RNG.integers(0, 5, 12).astype(np.int32)


def test_npz_and_npy_hold_what_was_saved(tmp_path):
    np.savez(tmp_path / "a.npz", x0=X0, label=LABEL)
    np.save(tmp_path / "a.npy", X0)
    source = data.arrays(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(source.x0, X0)
    np.testing.assert_array_equal(source.cond["label"], LABEL)
    assert source.num_classes == LABEL.max() + 1
    batch = next(data.pipeline(data.arrays(str(tmp_path / "a.npy")), 12, shuffle=False))
    np.testing.assert_array_equal(batch["x0"], X0)
    assert "cond" not in batch


def test_uint8_is_scaled_and_integers_are_tokens():
    pixels = data.arrays(x0=np.array([[0, 255]], np.uint8).reshape(1, 1, 2, 1)).x0
    np.testing.assert_array_equal(pixels.ravel(), [-1, 1])
    assert data.arrays(x0=np.arange(6).reshape(2, 3)).x0.dtype == np.int32


def test_latents_are_read_across_shards_scaled(tmp_path):
    data.write_latents(str(tmp_path), "part0", X0[:5], {"label": LABEL[:5]})
    data.write_latents(str(tmp_path), "part1", X0[5:].astype(np.float16), {"label": LABEL[5:]})
    source = data.latents(str(tmp_path), scale=0.5, shift=1.0)
    assert len(source) == 12 and source.shape == (4, 4, 3) and source.num_classes == LABEL.max() + 1
    batch = next(data.pipeline(source, 12, shuffle=False))
    np.testing.assert_allclose(batch["x0"], (X0 - 1) * 0.5, atol=5e-4)
    np.testing.assert_array_equal(batch["cond"]["label"], LABEL)


def test_array_record_round_trips(tmp_path):
    path = str(tmp_path / "a.array_record")
    tokens = np.arange(36, dtype=np.int32).reshape(12, 3)
    examples = [{"x0": X0[i], "cond": {"label": LABEL[i], "tokens": tokens[i]}} for i in range(12)]
    data.write_array_record(path, examples)
    source = data.array_record(path)
    assert len(source) == 12 and source.shape == (4, 4, 3)
    batch = next(data.pipeline(source, 12, shuffle=False))
    np.testing.assert_array_equal(batch["x0"], X0)
    np.testing.assert_array_equal(batch["cond"]["label"], LABEL)
    np.testing.assert_array_equal(batch["cond"]["tokens"], tokens)


def test_image_folders_with_and_without_classes(tmp_path):
    for name, value in (("cat", 0), ("dog", 255)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((10 + i, 20, 3), value, np.uint8)).save(tmp_path / "classes" / name / f"{i}.png")
    source = data.image_folder(str(tmp_path / "classes"), size=8)
    assert source.class_names == ("cat", "dog") and source.num_classes == 2 and source.shape == (8, 8, 3)
    batch = next(data.pipeline(source, 4, shuffle=False))
    np.testing.assert_array_equal(batch["cond"]["label"], [0, 0, 1, 1])
    np.testing.assert_allclose(batch["x0"].mean(axis=(1, 2, 3)), [-1, -1, 1, 1])
    flat = data.image_folder(str(tmp_path / "classes" / "cat"), size=8, channels=1)
    assert flat.num_classes is None and flat[0].keys() == {"x0"} and flat[0]["x0"].shape == (8, 8, 1)


def test_tensorflow_datasets_by_random_access(monkeypatch):
    with pytest.raises(InvalidInput, match=r"diffusion_jax\[tfds\]"):
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
        data.tfds("cifar10")
    records = [{"image": np.full((6, 8, 3), 255, np.uint8), "label": i % 2} for i in range(4)]
    module = types.SimpleNamespace(data_source=lambda name, split, data_dir: records)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    source = data.tfds("toy", size=4)
    batch = next(data.pipeline(source, 4, shuffle=False))
    assert source.shape == (4, 4, 3)
    np.testing.assert_array_equal(batch["x0"], np.ones((4, 4, 4, 3)))
    np.testing.assert_array_equal(batch["cond"]["label"], [0, 1, 0, 1])
    with pytest.raises(InvalidInput, match="'picture'"):
        data.tfds("toy", image_key="picture")


def test_broken_files_are_named(tmp_path):
    def written(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.savez(tmp_path / "pickled.npz", x0=np.array([{"a": 1}], object))
    np.savez(tmp_path / "unnamed.npz", images=X0)
    np.savez(tmp_path / "uneven.npz", x0=X0, label=LABEL[:3])
    np.savez(tmp_path / "nan.npz", x0=np.full((3, 2), np.nan, np.float32))
    np.savez(tmp_path / "whole.npz", x0=X0)
    cut = written("cut.npz", (tmp_path / "whole.npz").read_bytes()[:300])
    (tmp_path / "empty").mkdir()
    written("bad/x.png", b"not an image")
    written("mixed/x.png", b"")
    written("mixed/a/x.png", b"")
    cases = [
        (lambda: data.arrays(str(tmp_path / "pickled.npy")), "without pickle"),
        (lambda: data.arrays(str(tmp_path / "pickled.npz")), "without pickle"),
        (lambda: data.arrays(str(tmp_path / "unnamed.npz")), "'x0' is needed"),
        (lambda: data.arrays(str(tmp_path / "uneven.npz")), "one entry per example"),
        (lambda: data.arrays(str(tmp_path / "nan.npz")), "Example 0"),
        (lambda: data.arrays(cut), "damaged"),
        (lambda: data.arrays(str(tmp_path / "no.npz")), "does not exist"),
        (lambda: data.arrays(), "either a path or x0"),
        (lambda: data.latents(str(tmp_path / "no")), "does not exist"),
        (lambda: data.latents(str(tmp_path / "empty")), "no shard"),
        (lambda: data.image_folder(str(tmp_path / "no")), "does not exist"),
        (lambda: data.image_folder(str(tmp_path / "empty")), "no image"),
        (lambda: data.image_folder(str(tmp_path / "whole.npz")), "is a file"),
        (lambda: data.image_folder(str(tmp_path / "mixed")), "loose images"),
        (lambda: data.image_folder(str(tmp_path / "bad"))[0], "cannot be decoded"),
        (lambda: data.array_record(str(tmp_path / "no")), "does not exist"),
        (lambda: data.array_record(written("bad.array_record", b"junk" * 100)), "cannot be read"),
    ]
    for call, part in cases:
        with pytest.raises(InvalidInput, match=part):
            call()
