"""Fashion-MNIST from its files: sizes, labels, and what is said of files that are absent or damaged."""

import gzip

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.config import build, call
from diffusion_jax.data.fashion_mnist import read_idx
from diffusion_jax.errors import InvalidInput
from diffusion_jax.reading import read_gzip

RNG = np.random.default_rng(0)
PICTURES, LABELS = RNG.integers(0, 256, (12, 28, 28)).astype(np.uint8), np.arange(12, dtype=np.uint8) % 10


def packed(array, kind=8, shape=None):
    header = bytes([0, 0, kind, array.ndim]) + np.array(array.shape if shape is None else shape, ">u4").tobytes()
    return gzip.compress(header + array.tobytes())


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 12), ("t10k", 4)):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(packed(PICTURES[:count]))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(packed(LABELS[:count]))
    return tmp_path


def test_pixels_and_labels_are_those_of_the_files(folder):
    source = build(call("data.fashion_mnist", folder=str(folder)))
    assert source.shape == (28, 28, 1) and source.x0.dtype == np.float32 and len(source) == 12
    np.testing.assert_allclose(source.x0[..., 0], PICTURES / 127.5 - 1, atol=1e-6)
    assert source.x0.min() == -1 and source.x0.max() == 1
    np.testing.assert_array_equal(source.cond["label"], LABELS)
    assert source.num_classes == len(source.class_names) == 10 and source.class_names[9] == "ankle boot"
    assert len(data.fashion_mnist("test", folder=str(folder))) == 4
    np.testing.assert_array_equal(data.fashion_mnist(length=3, folder=str(folder)).x0, source.x0[:3])


def test_sizes_are_means_of_blocks_of_the_picture_or_of_it_and_its_border(folder):
    whole, bordered = (data.fashion_mnist(size=size, folder=str(folder)).x0 for size in (28, 32))
    np.testing.assert_array_equal(bordered[:, 2:-2, 2:-2], whole)
    assert (bordered[:, :2] == -1).all() and (bordered[:, :, -2:] == -1).all()
    for size in (14, 7, 16, 8, 4):
        large = whole if 28 % size == 0 and size != 4 else bordered
        block = large.shape[1] // size
        means = large.reshape(12, size, block, size, block, 1).mean(axis=(2, 4))
        np.testing.assert_allclose(data.fashion_mnist(size=size, folder=str(folder)).x0, means, atol=1e-6)


def test_what_is_not_there_is_told_with_the_command_that_installs_it(tmp_path):
    with pytest.raises(InvalidInput, match="apt-get install dataset-fashion-mnist"):
        data.fashion_mnist(folder=str(tmp_path))
    with pytest.raises(InvalidInput, match="size is 10"):
        data.fashion_mnist(size=10)
    with pytest.raises(InvalidInput, match="length is 0"):
        data.fashion_mnist(length=0)


DAMAGED = {
    "images": {
        "cut": (packed(PICTURES)[:900], "damaged, or no gzip file"),
        "no gzip": (b"pixels", "damaged, or no gzip file"),
        "no idx": (gzip.compress(b"\1\0\10\3" + bytes(99)), "is no IDX file"),
        "short header": (gzip.compress(b"\0\0\10\3\0"), "announces the shape"),
        "floats": (packed(PICTURES, kind=13), "type 0xd"),
        "too few bytes": (packed(PICTURES, shape=(13, 28, 28)), "announces the shape .13, 28, 28."),
        "other pictures": (packed(PICTURES[:, :8]), "shapes of images and labels"),
        "fewer": (packed(PICTURES[:5]), "shapes of images and labels"),
    },
    "labels": {"no class": (packed(LABELS + 5), "the 10 classes are 0 to 9")},
}


@pytest.mark.parametrize(("part", "what"), [(part, what) for part, cases in DAMAGED.items() for what in cases])
def test_damaged_files_are_told(folder, part, what):
    content, told = DAMAGED[part][what]
    (folder / f"train-{part}-idx{3 if part == 'images' else 1}-ubyte.gz").write_bytes(content)
    with pytest.raises(InvalidInput, match=told):
        data.fashion_mnist(folder=str(folder))


def test_no_more_is_unpacked_than_is_read(tmp_path):
    file = tmp_path / "large.gz"
    file.write_bytes(gzip.compress(bytes(10_000)))
    assert read_gzip(file, 10_000) == bytes(10_000)
    with pytest.raises(InvalidInput, match="unpacks to more than 9999 bytes"):
        read_gzip(file, 9_999)
    with pytest.raises(InvalidInput, match="does not exist"):
        read_idx(tmp_path / "none.gz")
