"""The stream: a permutation each epoch, the same for any number of hosts, and restored bit for bit."""

import json

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.errors import InvalidInput

LENGTH = 30


@pytest.fixture
def source():
    values = np.arange(LENGTH, dtype=np.float32)[:, None] / LENGTH
    return data.arrays(x0=values, label=np.arange(LENGTH) % 7)


def identity(batch):
    """Which example of the source each row is."""
    return np.rint(batch["x0"][:, 0] * LENGTH).astype(int)


def read(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], dict):
            assert_same(a[name], b[name])
        else:
            np.testing.assert_array_equal(a[name], b[name])


def jitter(example, rng):
    return {**example, "x0": example["x0"] + np.float32(0.01) * rng.standard_normal(1).astype(np.float32)}


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_epoch_is_a_permutation_even_when_batches_cross_its_border(source, shuffle):
    batches = list(data.pipeline(source, 8, epochs=4, shuffle=shuffle))
    assert len(batches) == 4 * LENGTH // 8
    order = np.concatenate([identity(batch) for batch in batches])
    for epoch in range(3):
        assert sorted(order[epoch * LENGTH : (epoch + 1) * LENGTH]) == list(range(LENGTH))
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index, np.arange(len(index)))
    assert index.dtype == np.int32
    assert (order[:LENGTH] == order[LENGTH : 2 * LENGTH]).all() == (not shuffle)


def test_the_condition_stays_with_its_example(source):
    batch = next(data.pipeline(source, 16))
    np.testing.assert_array_equal(batch["cond"]["label"], identity(batch) % 7)


def test_the_seed_alone_decides_the_order(source):
    first = read(data.pipeline(source, 8, seed=3, num_threads=0), 9)
    again = read(data.pipeline(source, 8, seed=3, num_threads=3), 9)
    other = read(data.pipeline(source, 8, seed=4), 9)
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)
    assert any((a["x0"] != b["x0"]).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_hold_contiguous_blocks_of_the_global_batch(source, hosts):
    whole = read(data.pipeline(source, 12, transforms=(jitter,), process_index=0, process_count=1), 6)
    parts = [
        read(data.pipeline(source, 12, transforms=(jitter,), process_index=h, process_count=hosts), 6)
        for h in range(hosts)
    ]
    for step, batch in enumerate(whole):
        for name in ("x0", "index"):
            np.testing.assert_array_equal(batch[name], np.concatenate([part[step][name] for part in parts]))


@pytest.mark.parametrize("done", [0, 1, 5, 11])
@pytest.mark.parametrize("hosts", [1, 3])
def test_restoring_goes_on_bit_for_bit_with_any_number_of_hosts(source, done, hosts):
    run = data.pipeline(source, 6, seed=1, transforms=(jitter,), process_index=0, process_count=1)
    read(run, done)
    state = json.loads(json.dumps(run.get_state()))
    after = read(run, 4)
    parts = []
    for host in range(hosts):
        resumed = data.pipeline(source, 6, seed=1, transforms=(jitter,), process_index=host, process_count=hosts)
        resumed.set_state(state)
        assert resumed.get_state() == state
        parts.append(read(resumed, 4))
    for step, batch in enumerate(after):
        np.testing.assert_array_equal(batch["x0"], np.concatenate([part[step]["x0"] for part in parts]))
        np.testing.assert_array_equal(batch["index"], np.concatenate([part[step]["index"] for part in parts]))


def test_the_state_counts_what_was_delivered_not_what_was_read_ahead(source):
    run = data.pipeline(source, 6, num_threads=4, prefetch=16)
    read(run, 2)
    assert run.get_state()["examples"] == 12
    assert run.epoch == 12 / LENGTH


def test_a_running_iterator_can_be_set_back(source):
    run = data.pipeline(source, 6)
    start = run.get_state()
    first = read(run, 3)
    run.set_state(start)
    for a, b in zip(first, read(run, 3), strict=True):
        assert_same(a, b)


def test_another_batch_size_sees_the_same_stream(source):
    small, large = data.pipeline(source, 5), data.pipeline(source, 15)
    read(small, 6)
    large.set_state(small.get_state())
    np.testing.assert_array_equal(next(large)["x0"], np.concatenate([b["x0"] for b in read(small, 3)]))


def test_transforms_draw_anew_each_epoch_and_mirror_what_they_say(source):
    order = np.concatenate([b["x0"] for b in data.pipeline(source, 10, epochs=2, shuffle=False, transforms=(jitter,))])
    assert (order[:LENGTH] != order[LENGTH:]).all()
    images = data.arrays(x0=np.random.default_rng(0).uniform(-1, 1, (64, 4, 6, 1)).astype(np.float32))
    flipped = next(data.pipeline(images, 64, shuffle=False, transforms=(data.flip(),)))["x0"]
    mirrored = (flipped == images.x0[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (mirrored | (flipped == images.x0).all(axis=(1, 2, 3))).all()
    assert 16 < mirrored.sum() < 48
    for transform, shape in ((data.resize(3), (3, 3, 1)), (data.random_crop(2), (2, 2, 1))):
        assert next(data.pipeline(images, 8, transforms=(transform,)))["x0"].shape == (8, *shape)
    normalised = next(data.pipeline(images, 64, transforms=(data.normalise(0.5, 2.0),)))["x0"]
    np.testing.assert_allclose(normalised.mean(), (images.x0.mean() - 0.5) / 2, atol=1e-6)


@pytest.mark.parametrize("transform", [data.flip(1.0), data.random_crop(3), data.resize(3)])
def test_what_lies_on_pixels_moves_with_them(transform):
    image = np.random.default_rng(0).uniform(0, 1, (4, 6, 1)).astype(np.float32)
    example = {"x0": image, "weight": image[..., 0], "cond": {"concat": image, "audio": np.ones((2, 6, 1)), "label": 3}}
    moved = transform(example, np.random.default_rng(1))
    assert moved["x0"].shape != image.shape or (moved["x0"] == image[:, ::-1]).all()
    np.testing.assert_array_equal(moved["weight"], moved["x0"][..., 0])
    np.testing.assert_array_equal(moved["cond"]["concat"], moved["x0"])
    assert moved["cond"]["audio"] is example["cond"]["audio"] and moved["cond"]["label"] == 3


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"batch_size": 31}, "holds only 30"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 10, "process_index": 0, "process_count": 4}, "divisible by the number of hosts, 4"),
        ({"batch_size": 10, "process_index": 2, "process_count": 2}, "process_index"),
        ({"batch_size": 10, "epochs": 0}, "epochs"),
        ({"batch_size": 10, "seed": -1}, "seed"),
        ({"batch_size": 10, "num_threads": -1}, "num_threads"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_read(source, arguments, part):
    with pytest.raises(InvalidInput, match=part):
        data.pipeline(source, **arguments)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"seed": 9}, "seed"),
        ({"length": 31}, "length"),
        ({"examples": 7}, "batch_size"),
        ({"examples": None}, "examples"),
    ],
)
def test_the_state_of_another_stream_is_refused(source, change, part):
    run = data.pipeline(source, 6)
    state = {**run.get_state(), **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(InvalidInput, match=part):
        run.set_state(state)


def test_a_nan_is_named():
    values = np.zeros((20, 2), np.float32)
    values[13, 1] = np.nan
    with pytest.raises(InvalidInput, match="Example 13"):
        data.arrays(x0=values)
    source = data.ArraySource(values)
    with pytest.raises(InvalidInput, match="position 13"):
        list(data.pipeline(source, 5, shuffle=False))
    with pytest.raises(InvalidInput, match="Example 13"):
        data.check_finite(source)


def test_examples_of_different_shapes_are_refused():
    class Ragged:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"x0": np.zeros((2 + index % 2, 2), np.float32)}

    with pytest.raises(InvalidInput, match="cannot be batched"):
        next(data.pipeline(Ragged(), 4))
