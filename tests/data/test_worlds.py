"""The embedded worlds: ranges, splits that share nothing, determinism, no network."""

import socket

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.errors import InvalidInput


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a world asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


IMAGES = {
    "digits": (data.digits, {}, (8, 8, 1)),
    "digits32": (data.digits, {"size": 32, "padding": 4}, (32, 32, 1)),
    "patches": (data.patches, {}, (32, 32, 3)),
    "grey patches": (data.patches, {"channels": 1, "names": ("camera", "histology", "retina")}, (32, 32, 1)),
    "textures": (data.textures, {}, (32, 32, 1)),
    "faces": (data.faces, {"others": True}, (24, 24, 1)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_fill_the_range_and_splits_share_no_example(name):
    constructor, arguments, shape = IMAGES[name]
    train, test = constructor("train", **arguments), constructor("test", **arguments)
    assert len(train) > 2 * len(test) > 0
    for source in (train, test):
        assert source.shape == shape and source.x0.dtype == np.float32
        assert source.x0.min() >= -1 and source.x0.max() <= 1 and np.ptp(source.x0) > 1
        assert set(source.cond["label"]) == set(range(source.num_classes))
        assert len(source.class_names) == source.num_classes
    # Flat patches (a sky, a black crop) may well be equal; those with any structure may not.
    rows = [{x.tobytes() for x in s.x0 if x.std() > 0.05} for s in (train, test)]
    assert not rows[0] & rows[1]
    np.testing.assert_array_equal(train.x0, constructor("train", **arguments).x0)


def test_digits_are_all_there_and_stratified():
    train, test = data.digits("train"), data.digits("test")
    assert len(train) + len(test) == 1797
    share = np.bincount(test.cond["label"]) / (np.bincount(train.cond["label"]) + np.bincount(test.cond["label"]))
    assert np.abs(share - 0.22).max() < 0.01


@pytest.mark.parametrize("name", data.PHOTOGRAPHS)
def test_every_photograph_is_inside_the_packages(name):
    image = data.photograph(name)
    assert image.shape[-1] in (1, 3) and min(image.shape[:2]) >= 300
    assert image.min() >= -1 and image.max() <= 1


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_prose_reads_back_as_the_text_it_was_cut_from(tokenizer):
    source = data.prose("train", length=64, tokenizer=tokenizer, vocab_size=512)
    assert source.x0.dtype == np.int32 and source.x0.shape[1] == 64
    assert source.x0.min() >= 0 and source.x0.max() < source.vocab_size
    whole = "\n".join(data.prose_documents("train"))
    for row in source.x0[:: len(source) // 20]:
        assert source.tokenizer.decode(row).strip("�") in whole
    held_out = data.prose("test", length=64, tokenizer=tokenizer, vocab_size=512)
    assert not set(data.prose_documents("train")) & set(data.prose_documents("test"))
    assert len(source) > 4 * len(held_out) > 40


@pytest.mark.parametrize("text", ["", "plain", " leading  double ", "tabs\tand\nlines\n\n", "Fréchet → ∇x 漢字 🙂"])
def test_tokenizers_round_trip_any_text(text):
    bpe = data.bpe_tokenizer(("some plain words", "and some more words"), 300)
    for tokenizer in (data.byte_tokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.int32 and (ids < tokenizer.vocab_size).all()


def test_byte_pairs_are_shorter_than_bytes_and_trained_alike_twice():
    texts = ("the theory of the thing", "then there is the other")
    first, second = data.bpe_tokenizer(texts, 280), data.bpe_tokenizer(texts, 280)
    np.testing.assert_array_equal(first.encode(texts[0]), second.encode(texts[0]))
    assert len(first.encode(texts[0])) < len(texts[0])


@pytest.mark.parametrize("name", data.TOYS)
def test_toys_have_unit_scale_labels_and_independent_splits(name):
    train, test = data.toys2d(name, num_examples=4000), data.toys2d(name, "test", num_examples=4000)
    assert train.shape == (2,) and train.x0.dtype == np.float32
    assert 0.6 < train.x0.std() < 1.3 and np.abs(train.x0).max() < 4
    assert set(train.cond["label"]) == set(range(train.num_classes))
    assert not set(map(bytes, train.x0)) & set(map(bytes, test.x0))
    np.testing.assert_array_equal(train.x0, data.toys2d(name, num_examples=4000).x0)
    np.testing.assert_allclose(train.x0.mean(0), test.x0.mean(0), atol=0.1)


def test_the_density_of_a_mixture_integrates_to_one_and_matches_its_samples():
    source = data.gaussian_blobs(stds=(0.3, 0.5, 0.4), num_examples=50_000)
    density = source.density
    axis = np.linspace(-6, 6, 401)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    weight = np.exp(density.log_density(grid)) * (axis[1] - axis[0]) ** 2
    assert abs(weight.sum() - 1) < 1e-6
    mean = weight @ grid
    np.testing.assert_allclose(density.mean, mean, atol=1e-6)
    np.testing.assert_allclose(density.covariance, (grid - mean).T @ (weight[:, None] * (grid - mean)), atol=1e-5)
    np.testing.assert_allclose(source.x0.mean(0), density.mean, atol=0.03)
    np.testing.assert_allclose(np.cov(source.x0.T), density.covariance, atol=0.05)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: data.digits("trian"), "did you mean 'train'"),
        (lambda: data.digits(size=4), "size"),
        (lambda: data.patches(names=("astronut",)), "did you mean 'astronaut'"),
        (lambda: data.patches(channels=2), "channels"),
        (lambda: data.patches(size=400), "no such patch"),
        (lambda: data.textures(stride=0), "stride"),
        (lambda: data.faces(size=1), "size"),
        (lambda: data.prose(tokenizer="byte"), "did you mean 'bytes'"),
        (lambda: data.prose(length=0), "length"),
        (lambda: data.toys2d("two_moon"), "did you mean 'two_moons'"),
        (lambda: data.toys2d(noise=-1.0), "noise"),
        (lambda: data.gaussian_blobs(weights=(0.5, 0.6), means=((0.0,), (1.0,))), "sum to 1"),
        (lambda: data.gaussian_blobs(means=((0.0, 1.0),)), "means.shape"),
        (lambda: data.shapes(max_objects=9), "max_objects"),
        (lambda: data.shapes(size=8), "size"),
        (lambda: data.bpe_tokenizer(("a",), 10), "vocab_size"),
        (lambda: data.word_tokenizer(("red",)).encode("rad"), "did you mean 'red'"),
        (lambda: data.flip(2.0), "probability"),
        (lambda: data.normalise(0.0, 0.0), "std"),
    ],
)
def test_wrong_values_are_named(call, part):
    with pytest.raises(InvalidInput, match=part):
        call()
