"""The world of moving shapes: what is rendered is read back, the law holds, and broken clips are told apart."""

import numpy as np
import pytest

from diffusion_jax import config, data, metrics
from diffusion_jax.data import moving
from diffusion_jax.data.moving import Moving
from diffusion_jax.errors import InvalidInput

SIZE, FRAMES = 16, 16


@pytest.fixture(scope="module")
def source():
    return data.moving_shapes(length=2000, frames=FRAMES, captions=True)


@pytest.fixture(scope="module")
def clips(source):
    return source.take(range(400))["x0"]


@pytest.fixture(scope="module")
def reading(clips):
    return moving.read(clips)


def test_the_verifier_reads_every_frame_back(source, clips, reading):
    movings = [source.moving(i) for i in range(400)]
    assert reading.recognised.all()
    for name, values in moving.ATTRIBUTES.items():
        truth = np.array([values.index(getattr(m, name)) for m in movings])
        np.testing.assert_array_equal(getattr(reading, name), np.repeat(truth[:, None], FRAMES, axis=1))
    places = np.stack([moving.trajectory(m, FRAMES, SIZE) for m in movings])
    assert np.abs(places - reading.position).max() < 0.15
    radii = np.array([moving.SIZES[m.size] * SIZE for m in movings])
    assert np.abs(reading.radius / radii[:, None] - 1).max() < 0.05
    assert moving.keeps_identity(reading).all()
    assert clips.min() >= -1 and clips.max() <= 1


@pytest.mark.parametrize("size", [24, 32])
def test_other_sizes_are_read_back_too(size):
    source = data.moving_shapes("test", length=60, size=size, frames=3, classes=("colour", "size", "shape"), seed=3)
    batch = source.take(range(60))
    shown = moving.labels(moving.read(batch["x0"]), ("colour", "size", "shape"))
    np.testing.assert_array_equal(shown, np.repeat(batch["cond"]["label"][:, None], 3, axis=1))
    assert source.num_classes == 48 and set(batch["cond"]["label"]) <= set(range(48))


def test_shapes_of_one_size_have_one_area():
    areas = [
        ((moving.render([Moving(shape, "red", "large", (16.3, 15.8), (0.0, 0.0))], 32, 1)[..., 0] + 1) / 2).sum()
        for shape in moving.SHAPES
    ]
    np.testing.assert_allclose(areas, np.pi * (0.19 * 32) ** 2, rtol=0.03)


def test_objects_stay_inside_and_keep_their_speed(source, clips, reading):
    light = (clips.max(-1) + 1) / 2
    mass = light.sum((2, 3))
    assert np.abs(mass / mass.mean(1, keepdims=True) - 1).max() < 0.05
    speeds = [np.hypot(*source.moving(i).velocity) for i in range(400)]
    assert min(speeds) >= 0.03 * SIZE and max(speeds) <= 0.1 * SIZE
    assert np.median(np.abs(moving.speed(reading, 15)[:, 0] - speeds)) < 0.02
    assert moving.next_position_error(reading).mean() < 0.08
    drift = moving.drift(reading)
    assert drift["size"].shape == drift["speed"].shape == (2,)
    assert drift["size"][1] < 0.01 and drift["speed"][1] < 0.05


def test_a_bounce_reflects():
    low, high = np.array([2.0, 2.0]), np.array([14.0, 14.0])
    np.testing.assert_allclose(moving.bounce(np.array([1.0, 15.5]), low, high), [3.0, 12.5])
    np.testing.assert_allclose(moving.bounce(np.array([-11.0, 40.0]), low, high), [13.0, 12.0])
    thing = Moving("square", "red", "small", (8.0, 8.0), (1.2, 0.0))
    path = moving.trajectory(thing, 30)
    assert np.allclose(path[:, 1], 8.0) and (np.abs(np.diff(path[:, 0])) <= 1.2 + 1e-9).all()
    assert np.ptp(path[:, 0]) > 10


def test_a_clip_is_a_function_of_its_index_and_the_first_frames_of_a_longer_one(source):
    short = data.moving_shapes(length=500, frames=8)
    again = data.moving_shapes(length=2000, frames=32)
    for i in (0, 17, 499):
        np.testing.assert_array_equal(short[i]["x0"], again[i]["x0"][:8])
        np.testing.assert_array_equal(short[i]["x0"], short.take([3, i])["x0"][1])
    assert source.moving(0) != data.moving_shapes(seed=1).moving(0)


def test_splits_share_no_clip():
    train, test = data.moving_shapes("train"), data.moving_shapes("test")
    assert not {train.moving(i) for i in range(1000)} & {test.moving(i) for i in range(500)}


def test_captions_and_labels_are_true(source, reading):
    directions = moving.direction(reading)
    agree = 0
    for i in range(400):
        thing, example = source.moving(i), source[i]
        words = source.tokenizer.decode(example["cond"]["tokens"]).split()
        assert words[:4] == [thing.size, thing.colour, thing.shape, "moving"]
        assert example["cond"]["label"] == moving.labels(reading)[i, 0] == moving.class_of(thing)
        agree += words[4] == moving.DIRECTIONS[directions[i]]
    # A wall may turn the very first step, and near the diagonal a reading may tip over.
    assert agree > 340


def test_broken_clips_are_told_apart(clips, reading):
    rng = np.random.default_rng(0)
    true = moving.verify(clips)
    assert true["recognised"] == true["identity"] == 1.0 and true["motion_energy"] > 0.02
    swapped = np.concatenate([clips[:, :8], clips[rng.permutation(400), 8:]], axis=1)
    later = moving.keeps_identity(moving.read(swapped))
    assert later[:, :8].all() and later[:, 8:].mean() < 0.12
    still = np.repeat(clips[:, :1], FRAMES, axis=1)
    assert moving.verify(still)["motion_energy"] == 0.0 and moving.verify(still)["identity"] == 1.0
    shuffled = clips[:, rng.permutation(FRAMES)]
    assert moving.verify(shuffled)["next_position_error"] > 10 * true["next_position_error"]
    assert moving.verify(np.full_like(clips[:4], -1.0))["recognised"] == 0.0
    white = np.repeat(clips[:50].max(-1, keepdims=True), 3, axis=-1)
    assert moving.verify(white)["recognised"] == 0.0
    both = np.maximum(clips[:100], clips[100:200])
    assert moving.verify(both)["recognised"] < 0.3
    assert moving.position_error(reading, reading).max() == 0.0


def test_reading_survives_soft_and_noisy_clips(source, clips):
    noisy = 0.9 * clips + 0.15 * np.random.default_rng(0).standard_normal(clips.shape)
    result = moving.verify(noisy, source.take(range(400))["cond"]["label"])
    assert result["adherence"] > 0.98 and result["next_position_error"] < 0.4


def test_the_first_frame_of_another_clip_may_be_the_reference(clips, reading):
    np.testing.assert_array_equal(moving.keeps_identity(reading, reading), moving.keeps_identity(reading))
    other = moving.read(np.roll(clips, 1, axis=0))
    assert moving.keeps_identity(reading, other).mean() < 0.15


def test_clips_are_compared_with_those_whose_first_frame_they_are_to_keep(clips):
    real, where = clips[:64], np.arange(FRAMES) > 0
    still = np.repeat(real[:, :1], FRAMES, axis=1)
    same, stopped, swapped = (moving.verify(x, reference=real, where=where) for x in (real, still, real[::-1]))
    assert same["identity"] == same["colour"] == stopped["identity"] == stopped["colour"] == 1.0
    assert swapped["identity"] < 0.3 and swapped["identity"] < swapped["colour"] < 0.5
    assert same["position_error"] == 0 and stopped["position_error"] > 1
    # By frame of each clip: what is not looked at may be anything.
    half = np.where(np.arange(64)[:, None] % 2 == 0, np.arange(FRAMES) < 4, np.arange(FRAMES) >= 4)
    mixed = np.where(half[..., None, None, None], real, real[::-1])
    assert moving.verify(mixed, reference=real, where=half)["identity"] == 1.0
    assert moving.verify(mixed, reference=real, where=~half)["identity"] < 0.3
    nothing = moving.verify(np.full_like(real[:4], -1.0), reference=real[:4])
    assert nothing["colour"] == nothing["identity"] == nothing["recognised"] == 0.0


def test_frechet_distances_order_what_is_broken(clips):
    other = data.moving_shapes("test", frames=FRAMES).take(range(400))["x0"]
    slow = data.moving_shapes("test", frames=FRAMES, speeds=(0.02, 0.05)).take(range(400))["x0"]
    alike = (other, 0.9 * other - 0.1, 0.7 * other - 0.3, slow)
    near, slight, strong, late = (metrics.clip_distances(x, clips) for x in alike)
    assert 2 * near["frames"] < slight["frames"] < strong["frames"]
    assert 5 * near["motion"] < late["motion"]
    few = clips[:50]
    itself, still = (metrics.clip_distances(x, few) for x in (few, np.repeat(few[:, :1], FRAMES, axis=1)))
    assert max(itself.values()) < 1e-6 and still["motion"] > 1


def test_it_is_made_from_a_config_and_goes_through_the_pipeline():
    entry = config.call("data.moving_shapes", length=64, captions=True)
    source = config.build(entry)
    batch = next(data.pipeline(source, 8))
    assert batch["x0"].shape == (8, *source.shape) == (8, 8, 16, 16, 3) and batch["x0"].dtype == np.float32
    assert batch["cond"]["label"].shape == (8,) and batch["cond"]["tokens"].shape == (8, 5)
    assert "cond" not in data.moving_shapes(classes=())[0]


@pytest.mark.parametrize(
    "wrong", [{"split": "val"}, {"size": 4}, {"classes": ("hue",)}, {"speeds": (0.2, 0.1)}, {"frames": 0}]
)
def test_impossible_worlds_are_refused(wrong):
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        data.moving_shapes(**wrong)
    with pytest.raises(InvalidInput, match="clips"):
        moving.read(np.zeros((2, 16, 16, 3)))
