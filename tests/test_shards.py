"""Sets of samples: a shard holds what its identity says, sets are never mixed, and nothing sound is replaced."""

import json
import threading

import numpy as np
import pytest

from diffusion_jax import shards
from diffusion_jax.errors import InvalidInput

SET = {"seed": 0, "parameters": "abc", "sampling": {"steps": 4}}


def shard(start, size, value=0.0, **other):
    arrays = {"x": np.full((size, 2), value, np.float32), "index": np.arange(start, start + size, dtype=np.int32)}
    return shards.identified(arrays, SET | other, start)


@pytest.fixture
def folder(tmp_path):
    for path, start, size in shards.shard_paths(tmp_path, 5, 3):
        shards.write_shard(path, shard(start, size, start))
    return tmp_path


def paths(folder):
    return sorted(folder.glob("*.npz"))


def test_a_set_is_read_in_the_order_of_its_index(folder):
    samples = shards.read_samples(folder)
    np.testing.assert_array_equal(samples["index"], np.arange(5))
    np.testing.assert_array_equal(samples["x"][:, 0], [0, 0, 0, 3, 3])
    assert shards.set_identity(folder) == SET
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("bit", range(0, 8 * 600, 97))
def test_a_flipped_bit_never_passes_for_other_samples(bit, folder):
    path = paths(folder)[0]
    whole, content = shards.read_shard(path), bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)
    found = shards.read_shard(path)
    if found is not None:  # a byte that says nothing, such as a time
        for name, value in whole.items():
            np.testing.assert_array_equal(found[name], value)


def changed(arrays, **other):
    return arrays | {name: np.asarray(value) for name, value in other.items()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: changed(arrays, identity="{not json"),
        lambda arrays: changed(arrays, identity="[1]"),
        lambda arrays: changed(arrays, identity="{" + '"a":{' * 1000),
        lambda arrays: changed(arrays, identity=json.dumps(SET | {"index": [0, 2], "arrays": 5})),
        lambda arrays: changed(arrays, x=np.zeros((3, 3), np.float32)),
        lambda arrays: changed(arrays, x=np.zeros((2, 2), np.float32)),
        lambda arrays: changed(arrays, more=np.zeros(3)),
        lambda arrays: changed(arrays, index=np.arange(3, 6, dtype=np.int32)),
        lambda arrays: {name: value for name, value in arrays.items() if name != "index"},
        lambda arrays: {name: value for name, value in arrays.items() if name != "x"},
    ],
)
def test_a_shard_that_does_not_hold_what_its_identity_says_is_damaged(damage, tmp_path):
    np.savez(tmp_path / "a.npz", **damage(shard(0, 3)))
    assert shards.read_shard(tmp_path / "a.npz") is None


def test_a_sound_shard_of_other_samples_is_never_replaced(folder):
    path = paths(folder)[0]
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match=r"seed \(was 0, is 1\)"):
        shards.write_shard(path, shard(0, 3, seed=1))
    shards.write_shard(path, shard(0, 3, value=7.0))
    assert path.read_bytes() == before, "the same samples stay"
    path.write_bytes(before[:50])
    shards.write_shard(path, shard(0, 3))
    assert path.read_bytes() == before
    assert not list(folder.glob("*.partial"))


def test_of_several_that_write_a_shard_at_once_one_wins_and_the_others_are_told(tmp_path):
    path, told = tmp_path / "samples-00000-of-00001.npz", []

    def write(seed):
        try:
            shards.write_shard(path, shard(0, 3, seed, seed=seed))
        except InvalidInput as error:
            told.append(str(error))

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 7 and all("holds other samples" in text for text in told)
    found = shards.read_shard(path)
    assert found["x"][0, 0] == shards.identity_of(found)["seed"]
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_range_is_part_of_what_is_asked_for(folder):
    path = paths(folder)[1]
    stored = shards.identity_of(shards.read_shard(path))
    shards.check_identity(path, stored, SET | {"index": [3, 5]})
    with pytest.raises(InvalidInput, match=r"index \(was \[3, 5\], is \[3, 6\]\)"):
        shards.check_identity(path, stored, SET | {"index": [3, 6]})
    with pytest.raises(InvalidInput, match="another checkpoint or average"):
        shards.check_identity(path, stored, SET | {"parameters": "def"})


def renamed(folder):
    paths(folder)[0].rename(folder / "samples-00000-of-00003.npz")


def swapped(folder):
    first, second = paths(folder)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def of_two_seeds(folder):
    paths(folder)[1].unlink()
    shards.write_shard(folder / "samples-00001-of-00002.npz", shard(3, 2, seed=9))


def without_an_identity(folder):
    path = paths(folder)[1]
    held = shards.read_shard(path)
    np.savez(path, **{name: value for name, value in held.items() if name != "identity"})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (renamed, "several sets"),
        (swapped, "do not follow one another"),
        (of_two_seeds, r"seed \(was 9, is 0\)"),
        (without_an_identity, "seed"),
        (lambda folder: paths(folder)[0].unlink(), "1 readable shards of 2"),
        (lambda folder: paths(folder)[0].write_bytes(b"PK"), "00000-of-00002.npz cannot be read"),
    ],
)
def test_a_mixture_or_a_part_of_a_set_is_refused(spoil, says, folder):
    spoil(folder)
    with pytest.raises(InvalidInput, match=says):
        shards.read_samples(folder)


def test_a_set_has_no_more_shards_than_their_names_can_number(tmp_path):
    assert len(shards.shard_paths(tmp_path, 99_999, 1)) == 99_999
    for count, size in ((100_000, 1), (10**15, 1000), (2**31, 2**30)):
        with pytest.raises(InvalidInput, match="--num-samples is"):
            shards.shard_paths(tmp_path, count, size)
