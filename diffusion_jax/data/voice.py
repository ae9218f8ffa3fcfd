"""The voice of the talking faces: a synthetic waveform of syllables, and its features by frame, looking back only."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import invalid

FRAME_RATE, SAMPLE_RATE = 25, 1600
HOP = SAMPLE_RATE // FRAME_RATE
"""Samples of the waveform in one frame."""
BANDS = 16


class Speech(NamedTuple):
    """A voice: its waveform `[frames * HOP]` in [-1, 1], and the mouth's opening in each frame, the mean envelope."""

    waveform: Float[np.ndarray, " samples"]
    opening: Float[np.ndarray, " frames"]


def draw_speech(rng: np.random.Generator, frames: int) -> Speech:
    """Syllables of 0.16 .. 0.32 s, some with a pause after them, on the harmonics of one pitch.

    The envelope of a syllable is a squared sine of height 0.4 .. 1; the voice may set in within a syllable.
    """
    pitch, begin, *phases = rng.random(18)
    pitch = 100 + 100 * pitch
    time = (np.arange(frames * HOP) + 0.5) / SAMPLE_RATE
    envelope = np.zeros_like(time)
    at = -0.5 * begin
    while at < time[-1]:
        length, height, pauses, pause = rng.random(4)
        length = 0.16 * (1 + length)
        first, last = np.searchsorted(time, (at, at + length))
        inside = (time[first:last] - at) / length
        envelope[first:last] = (0.4 + 0.6 * height) * np.sin(np.pi * inside) ** 2
        at += length + (0.1 + 0.3 * pause) * (pauses < 0.25)
    number = np.arange(1, int(0.5 * SAMPLE_RATE / pitch) + 1)
    waves = np.sin(2 * np.pi * (pitch * number[:, None] * time + np.array(phases[: len(number)])[:, None]))
    voice = (waves / number[:, None]).sum(0) / (1 / number).sum()
    opening = envelope.reshape(frames, HOP).mean(axis=1)
    return Speech((envelope * voice).astype(np.float32), opening.astype(np.float32))


def log_mel(waveform: Float[np.ndarray, "*B samples"]) -> Float[np.ndarray, "*B frames 16"]:
    """Log-mel features, one vector a frame of `HOP` samples, of order one.

    Each looks at the frame's own samples and those of the frame before (silence before the first), through a Hann
    window. In a stream, prepend the last `HOP` samples to the new ones and drop the first vector.
    """
    waveform = np.asarray(waveform, np.float32)
    if waveform.shape[-1] % HOP or not waveform.shape[-1]:
        raise invalid("waveform.shape", waveform.shape, f"its length must be a multiple of {HOP} samples, one frame")
    blocks = waveform.reshape(*waveform.shape[:-1], -1, HOP)
    before = np.concatenate([np.zeros_like(blocks[..., :1, :]), blocks[..., :-1, :]], axis=-2)
    windows = np.concatenate([before, blocks], axis=-1) * np.hanning(2 * HOP + 1)[:-1].astype(np.float32)
    power = np.abs(np.fft.rfft(windows)) ** 2 / HOP
    # Floor at -50 dB of a loud band: the logarithm then runs over about [-1, 1].
    return (0.4 * np.log10(power @ _MEL.T + 1e-4) + 0.8).astype(np.float32)


def _mel_filters():
    """Triangles `[BANDS, HOP + 1]`, equally spaced on the mel scale from 60 Hz to half the sample rate."""
    low, high = 2595 * np.log10(1 + np.array([60, SAMPLE_RATE / 2]) / 700)
    mel = np.linspace(low, high, BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequency = np.arange(HOP + 1) * SAMPLE_RATE / (2 * HOP)
    up = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(np.minimum(up, down), 0)


_MEL = _mel_filters()
