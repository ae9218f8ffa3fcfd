"""Talking faces: mouths follow the voice, drawings are read back, features can be streamed, faults are told apart."""

import numpy as np
import pytest

from diffusion_jax import config, data
from diffusion_jax.data import portrait, voice
from diffusion_jax.data.voice import HOP
from diffusion_jax.errors import InvalidInput

COUNT, FRAMES = 16, 16


@pytest.fixture(scope="module")
def source():
    return data.talking_faces(length=1000, frames=FRAMES, seed=1)


@pytest.fixture(scope="module")
def batch(source):
    return source.take(range(COUNT))


@pytest.fixture(scope="module")
def reading(batch):
    return portrait.read(batch["x0"])


@pytest.fixture(scope="module")
def opening(source):
    return np.stack([source.speech(i).opening for i in range(COUNT)])


def test_the_verifier_reads_every_frame_back(source, batch, reading, opening):
    faces = [source.face(i) for i in range(COUNT)]
    assert reading.residual.max() < 1e-4
    np.testing.assert_allclose(reading.opening, opening, atol=1e-3)
    np.testing.assert_allclose(reading.position, portrait.positions(faces, FRAMES), atol=1e-4)
    aspects = np.array([face.aspect for face in faces])
    np.testing.assert_allclose(reading.aspect, np.repeat(aspects[:, None], FRAMES, axis=1), rtol=1e-3)
    np.testing.assert_allclose(reading.colour, np.repeat(portrait.colours(faces)[:, None], FRAMES, axis=1), atol=1e-3)
    assert batch["x0"].min() >= -1 and batch["x0"].max() <= 1


def test_small_portraits_are_read_back_too():
    source = data.talking_faces("test", length=32, size=16, frames=4, seed=2)
    batch = source.take(range(32))
    opening = np.stack([source.speech(i).opening for i in range(32)])
    reading = portrait.read(batch["x0"])
    np.testing.assert_allclose(reading.opening, opening, atol=5e-3)
    assert max(error.max() for error in portrait.identity_error(reading, batch["cond"]["reference"]).values()) < 5e-3


def test_true_clips_score_perfectly(batch, opening):
    score = portrait.verify(batch["x0"], opening, batch["cond"]["reference"])
    assert score["sync"] > 0.999
    assert max(score[name] for name in ("colour", "shape", "flicker", "residual")) < 1e-4


def test_each_fault_moves_its_own_measure(batch, opening):
    x, still = batch["x0"], batch["cond"]["reference"]
    measure = lambda clips: portrait.verify(clips, opening, still)  # noqa: E731
    true = measure(x)
    shifted = measure(x[:, ::-1])
    assert shifted["sync"] < 0.5 and shifted["colour"] < 1e-4
    frozen = measure(np.repeat(x[:, :1], FRAMES, axis=1))
    assert abs(frozen["sync"]) < 1e-3 and frozen["flicker"] < 1e-4
    darker = measure(0.8 * x - 0.2)
    assert darker["colour"] > 0.1 and darker["sync"] > 0.99 and darker["shape"] < 1e-3
    other = measure(np.roll(x, 1, axis=0))
    assert other["colour"] > 0.3 and other["shape"] > 0.05
    gain = np.where(np.arange(FRAMES) % 2, 1.0, 0.9)[:, None, None, None]
    flickering = measure((x + 1) * gain - 1)
    assert flickering["flicker"] > 0.01 > 100 * true["flicker"] and flickering["sync"] > 0.99
    noise = measure(np.random.default_rng(0).standard_normal(x.shape))
    assert noise["residual"] > 0.2


def test_measures_survive_noise(batch, opening):
    noisy = batch["x0"] + 0.15 * np.random.default_rng(0).standard_normal(batch["x0"].shape)
    score = portrait.verify(noisy, opening, batch["cond"]["reference"])
    assert score["sync"] > 0.99 and score["colour"] < 0.05 and score["shape"] < 0.01 and score["residual"] < 0.1


def test_measures_are_functions_of_time(source, batch, reading, opening):
    people = source.speakers(range(COUNT))
    np.testing.assert_array_equal(people.opening, opening)
    np.testing.assert_allclose(people.portraits, batch["cond"]["reference"], atol=1e-6)
    np.testing.assert_array_equal(portrait.log_mel(people.waveform), batch["cond"]["audio"])
    half = batch["x0"].copy()
    half[:, 8:] = 0.8 * half[:, 8:] - 0.2
    # What is decoded are the windows alone.
    found = portrait.measures_over_time(half / 2, lambda z: 2 * z, people, 2, 8)
    assert found["colour"][0] < 1e-3 and found["colour"][1] > 0.1
    assert found["sync"].min() > 0.99 and all(values.shape == (2,) for values in found.values())
    with pytest.raises(InvalidInput, match="window"):
        portrait.measures_over_time(half, lambda z: z, people, 2, FRAMES + 1)
    assert portrait.sync(reading, opening, 8).shape == (COUNT, 2)
    assert portrait.sync(reading, opening)[:, 0].min() > 0.999
    assert np.isnan(portrait.sync(reading, np.zeros_like(opening))).all()


def test_the_mouth_and_the_sound_belong_together(source, batch, opening):
    waveform = np.stack([source.speech(i).waveform for i in range(COUNT)])
    assert np.abs(waveform).max() <= 1 and waveform.shape == (COUNT, FRAMES * HOP)
    loudness = np.sqrt((waveform.reshape(COUNT, FRAMES, HOP) ** 2).mean(-1))
    assert np.corrcoef(loudness.ravel(), opening.ravel())[0, 1] > 0.9
    assert opening.min() >= 0 and 0.8 < opening.max() <= 1 and 0.15 < opening.mean() < 0.5
    audio = batch["cond"]["audio"].reshape(-1, voice.BANDS)
    assert audio.min() >= -1 and audio.max() < 1.5
    # Even a linear map of one frame's features knows most of the opening.
    design = np.concatenate([audio, np.ones((len(audio), 1))], axis=1)
    fitted = design @ np.linalg.lstsq(design, opening.ravel(), rcond=None)[0]
    assert np.corrcoef(fitted, opening.ravel())[0, 1] > 0.8


def test_features_look_back_only_and_can_be_streamed(source):
    waveform = source.speech(3).waveform
    whole = portrait.log_mel(waveform)
    streamed = [portrait.log_mel(waveform[:HOP])]
    streamed += [portrait.log_mel(waveform[(i - 1) * HOP : (i + 1) * HOP])[1:] for i in range(1, FRAMES)]
    np.testing.assert_allclose(np.concatenate(streamed), whole, atol=1e-5)
    changed = waveform.copy()
    changed[10 * HOP :] = 0.0
    np.testing.assert_array_equal(portrait.log_mel(changed)[:10], whole[:10])
    with pytest.raises(InvalidInput, match="waveform"):
        portrait.log_mel(waveform[:100])


def test_a_tone_lights_its_band():
    time = np.arange(8 * HOP) / voice.SAMPLE_RATE
    peaks = [portrait.log_mel(np.sin(2 * np.pi * f * time).astype(np.float32))[4].argmax() for f in (120, 300, 600)]
    assert 0 <= peaks[0] < peaks[1] < peaks[2] < voice.BANDS


def test_the_reference_is_the_same_person_at_rest(source, batch):
    still = portrait.read(batch["cond"]["reference"][:, None])
    assert np.abs(still.position).max() < 1e-3 and np.abs(still.opening).max() < 1e-2
    np.testing.assert_allclose(still.aspect[:, 0], [source.face(i).aspect for i in range(COUNT)], rtol=1e-3)


def test_a_clip_is_a_function_of_its_index_and_the_first_frames_of_a_longer_one(source):
    long = data.talking_faces(length=10, frames=200, seed=1)
    for i in (0, 9):
        short, whole = source[i], long[i]
        np.testing.assert_allclose(short["x0"], whole["x0"][:FRAMES], atol=1e-6)
        np.testing.assert_allclose(short["cond"]["audio"], whole["cond"]["audio"][:FRAMES], atol=1e-6)
        np.testing.assert_array_equal(short["cond"]["reference"], whole["cond"]["reference"])
    assert portrait.read(long.take([0, 1])["x0"]).residual.max() < 1e-3


def test_splits_share_nobody():
    train, test = data.talking_faces("train"), data.talking_faces("test")
    assert not {train.face(i) for i in range(500)} & {test.face(i) for i in range(500)}


def test_it_is_made_from_a_config_and_goes_through_the_pipeline():
    source = config.build(config.call("data.talking_faces", length=40, size=16))
    batch = next(data.pipeline(source, 8))
    assert batch["x0"].shape == (8, *source.shape) == (8, 8, 16, 16, 3) and batch["x0"].dtype == np.float32
    assert batch["cond"]["audio"].shape == (8, 8, 16) and batch["cond"]["reference"].shape == (8, 16, 16, 3)


@pytest.mark.parametrize("wrong", [{"split": "val"}, {"size": 8}, {"frames": 0}, {"length": 0}])
def test_impossible_worlds_are_refused(wrong):
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        data.talking_faces(**wrong)
    with pytest.raises(InvalidInput, match="clips"):
        portrait.read(np.zeros((2, 16, 16, 3)))
