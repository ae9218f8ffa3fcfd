"""Files: what is written is read back, nothing is unpickled, and what is wrong is said in a sentence."""

import sys
import types
import warnings

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


def test_unsigned_integers_are_pixels_and_signed_ones_tokens(tmp_path):
    bright = {np.uint8: 255, np.uint16: 65535, np.uint32: 2**32 - 1, bool: 1}
    for kind, white in bright.items():
        stored = np.array([0, white], kind).reshape(2, 1, 1, 1)
        np.save(tmp_path / "a.npy", stored)
        np.savez(tmp_path / "a.npz", x0=stored)
        data.write_latents(str(tmp_path / f"latents of {kind.__name__}"), "a", stored)
        data.write_array_record(str(tmp_path / "a.array_record"), [{"x0": row} for row in stored])
        for source in (
            data.arrays(x0=stored),
            data.arrays(str(tmp_path / "a.npy")),
            data.arrays(str(tmp_path / "a.npz")),
            data.latents(str(tmp_path / f"latents of {kind.__name__}")),
            data.array_record(str(tmp_path / "a.array_record")),
        ):
            x0 = next(data.pipeline(source, 2, shuffle=False))["x0"]
            assert x0.dtype == np.float32 and x0.shape == (2, 1, 1, 1)
            np.testing.assert_array_equal(x0.ravel(), [-1, 1])
    assert data.arrays(x0=np.arange(6).reshape(2, 3)).x0.dtype == np.int32
    assert data.arrays(x0=np.zeros((2, 5), np.uint8)).x0.shape == (2, 5)
    twelve = data.arrays(x0=np.array([[0, 4095]], np.uint16), value_range=(0, 4095))
    np.testing.assert_array_equal(twelve.x0, [[-1, 1]])
    with pytest.raises(InvalidInput, match="int32"):
        data.arrays(x0=np.array([[2**31]]))


def test_conditions_keep_what_they_are(tmp_path):
    cond = {
        "label": np.arange(3, dtype=np.uint8),
        "tokens": np.array([[7], [8], [9]], np.uint16),
        "tokens_mask": np.array([[True], [False], [True]]),
        "concat": np.full((3, 2, 2, 1), 255, np.uint8),
        "pooled": np.ones((3, 2)),
    }
    np.savez(tmp_path / "a.npz", x0=X0[:3], **cond)
    data.write_latents(str(tmp_path / "shards"), "a", X0[:3], cond)
    rows = [{"x0": X0[i], "cond": {key: value[i] for key, value in cond.items()}} for i in range(3)]
    data.write_array_record(str(tmp_path / "a.array_record"), [{**row, "cond": {**row["cond"]}} for row in rows])
    for source in (data.arrays(str(tmp_path / "a.npz")), data.latents(str(tmp_path / "shards"))):
        read = next(data.pipeline(source, 3, shuffle=False))["cond"]
        for key, kind in (("label", np.int32), ("tokens", np.int32), ("tokens_mask", bool), ("pooled", np.float32)):
            assert read[key].dtype == kind
            np.testing.assert_array_equal(read[key], cond[key])
        np.testing.assert_array_equal(read["concat"], np.ones((3, 2, 2, 1), np.float32))
    record = data.array_record(str(tmp_path / "a.array_record"))[2]["cond"]
    assert record["label"].dtype == np.int32 and record["label"] == 2 and (record["concat"] == 1).all()


@pytest.mark.parametrize(
    ("label", "part"),
    [
        (np.arange(12) - 1, "is -1"),
        (np.arange(1, 13), "is 12, but the 12 classes are 0 to 11"),
        (np.eye(12), "argmax"),
        (np.arange(12.0), "astype"),
        (np.ones(12, bool), "astype"),
        (list("abcdefghijkl"), "return_inverse"),
    ],
    ids=["from -1", "from 1", "one-hot", "floats", "bools", "names"],
)
def test_labels_are_numbers_of_classes(label, part, tmp_path):
    np.savez(tmp_path / "a.npz", x0=X0, label=label)
    data.write_latents(str(tmp_path / "shards"), "a", X0, {"label": np.asarray(label)})
    for make in (
        lambda: data.arrays(x0=X0, label=label, num_classes=12),
        lambda: data.arrays(str(tmp_path / "a.npz"), num_classes=12),
        lambda: data.latents(str(tmp_path / "shards"), num_classes=12),
        lambda: data.ArraySource(X0, {"label": np.asarray(label)}, num_classes=12),
    ):
        with pytest.raises(InvalidInput, match=part):
            make()
    if np.asarray(label).dtype.kind in "if" and np.ndim(label) == 1:
        data.write_array_record(
            str(tmp_path / "a.array_record"), [{"x0": X0[i], "cond": {"label": label[i]}} for i in range(12)]
        )
        with pytest.raises(InvalidInput, match=rf"(record \d+ of .*a.array_record).*{part}"):
            next(data.pipeline(data.array_record(str(tmp_path / "a.array_record"), num_classes=12), 12))


def test_ranges_of_images_are_those_of_the_library(tmp_path):
    inside = (X0 + 1) / 2
    for make in (lambda **k: data.arrays(x0=inside, **k), lambda **k: data.arrays(str(tmp_path / "a.npy"), **k)):
        np.save(tmp_path / "a.npy", inside)
        with pytest.warns(UserWarning, match=r"value_range=\(0, 1\)"):
            make()
        np.testing.assert_allclose(make(value_range=(0, 1)).take(np.arange(12))["x0"], X0, atol=1e-6)
        np.testing.assert_array_equal(make(value_range=(-1, 1)).take(np.arange(12))["x0"], inside)
    np.save(tmp_path / "b.npy", 255 * inside)
    for make in (lambda: data.arrays(x0=255 * inside), lambda: data.arrays(str(tmp_path / "b.npy"))):
        with pytest.raises(InvalidInput, match=r"value_range=\(0, 255\)"):
            make()
    # Bright bytes are bytes, and vectors and latents have any range.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.save(tmp_path / "c.npy", np.full((2, 4, 4, 3), 200, np.uint8))
        data.arrays(str(tmp_path / "c.npy"))
        data.arrays(x0=np.full((2, 4, 4, 3), 200, np.uint8))
    data.arrays(x0=255 * inside.reshape(12, -1))
    data.arrays(x0=np.repeat(inside, 2, -1)[..., :4] * 9)


def test_shards_are_read_as_they_are_now(tmp_path):
    for value in (0.25, 0.5):
        data.write_latents(str(tmp_path), "a", np.full((3, 2, 2, 4), value, np.float32), {"label": np.arange(3)})
        source = data.latents(str(tmp_path))
        assert (source[0]["x0"] == value).all()
    np.save(tmp_path / "a.label.npy", np.arange(3) + 2)
    assert data.latents(str(tmp_path))[0]["cond"]["label"] == 2
    # What is mapped was replaced by another file, or is gone.
    data.write_latents(str(tmp_path), "a", np.full((1, 2, 2, 4), 1, np.float32), {"label": np.arange(1)})
    with pytest.raises(InvalidInput, match=r"a.x0.npy.*has changed"):
        source[2]
    (tmp_path / "a.x0.npy").unlink()
    with pytest.raises(InvalidInput, match=r"a.x0.npy.*can no longer be read"):
        source[2]
    np.save(tmp_path / "b.npy", X0)
    mapped = data.arrays(str(tmp_path / "b.npy"))
    np.save(tmp_path / "b.npy", X0[:2])
    with pytest.raises(InvalidInput, match=r"b.npy.*has changed"):
        mapped[11]


def test_shards_must_agree(tmp_path):
    data.write_latents(str(tmp_path), "a", X0, {"label": LABEL})
    data.write_latents(str(tmp_path), "b", X0[:, :2], {"label": LABEL})
    with pytest.raises(InvalidInput, match=r"shape of '.*b.x0.npy'"):
        data.latents(str(tmp_path))
    data.write_latents(str(tmp_path), "b", X0)
    (tmp_path / "b.label.npy").unlink()
    with pytest.raises(InvalidInput, match=r"conditions of '.*b.x0.npy'"):
        data.latents(str(tmp_path))


def test_nan_is_found_wherever_it_stands(tmp_path):
    late = X0.copy()
    late[11, 0, 0, 0] = np.inf
    np.save(tmp_path / "a.npy", late)
    with pytest.raises(InvalidInput, match="x0 at position 11"):
        list(data.pipeline(data.arrays(str(tmp_path / "a.npy")), 4, shuffle=False, epochs=1))
    pooled = np.zeros((12, 2), np.float32)
    pooled[7, 1] = np.nan
    np.savez(tmp_path / "a.npz", x0=X0, pooled=pooled)
    with pytest.raises(InvalidInput, match=r"Example 7 .*cond\['pooled'\]"):
        data.arrays(str(tmp_path / "a.npz"))
    with pytest.raises(InvalidInput, match=r"cond\['pooled'\] at position 7"):
        list(data.pipeline(data.ArraySource(X0, {"pooled": pooled}), 4, shuffle=False, epochs=1))


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
        (lambda: data.arrays(x0=X0 * 1j), "complex"),
        (lambda: data.arrays(x0=np.array(["2020-01-01"], "M8[D]")), "datetime64"),
        (lambda: data.arrays(x0=[[1], [1, 2]]), "no array of numbers"),
        (lambda: data.arrays(x0=np.float32(1)), "axis of examples"),
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
