"""Talking faces in a latent space: clips to train on, people to be streamed, measures as functions of time."""

from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.data import portrait
from diffusion_jax.data.sources import Source
from diffusion_jax.models import LatentSpace


def latent_clips(space: LatentSpace, source: Source, frames: int) -> data.ArraySource:
    """Clips of the space, two of each example: its first frames with the portrait of who speaks, and its last ones with
    a frame of long before, as streams will have it."""
    whole = data.encoded(source, space.encode)
    still = np.asarray(space.encode(whole.cond["reference"]))
    x0, audio = (np.concatenate([a[:, :frames], a[:, -frames:]]) for a in (whole.x0, whole.cond["audio"]))
    return data.ArraySource(x0, {"audio": audio, "reference": np.concatenate([still, whole.x0[:, 0]])}, "latent clips")


class Crowd(NamedTuple):
    """People and what they say: portraits in pixels and in the space, voices, their features, how far mouths open."""

    portraits: Any
    voices: Any
    pictures: Any
    audio: Any
    opening: Any


def crowd(config: ConfigDict, space: LatentSpace, seed: int) -> Crowd:
    """The streams of one seed, `config.length` training clips long."""
    first, frames = seed * config.streams, config.length * config.frames
    source = data.talking_faces("test", length=first + config.streams, size=config.clips.size, frames=frames)
    people = range(first, first + config.streams)
    portraits = portrait.reference_pictures([source.face(i) for i in people], config.clips.size)
    speeches = [source.speech(i) for i in people]
    voices, opening = (np.stack(values) for values in zip(*speeches, strict=True))
    return Crowd(portraits, voices, space.encode(portraits), portrait.log_mel(voices), opening)


def stream_measures(config: ConfigDict, space: LatentSpace, latents: Any, people: Crowd) -> dict[str, np.ndarray]:
    """Sync, identity error (colour, shape), flicker, residual in `config.windows` windows, equally spaced, `[W]`."""
    frames, (count, size) = latents.shape[1], (config.windows, config.window)
    starts = np.linspace(0, frames - size, count).astype(int)
    cut = starts[:, None] + np.arange(size)
    clips = np.asarray(space.decode(latents[:, cut].reshape(-1, size, *latents.shape[2:])))
    wanted = np.repeat(people.portraits, count, axis=0)
    values = portrait.portrait_measures(clips, people.opening[:, cut].reshape(-1, size), wanted)
    return {name: np.nanmean(value.reshape(-1, count), axis=0) for name, value in values.items()}
