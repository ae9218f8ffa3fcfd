"""A world of moving shapes: clips of one coloured shape that flies and bounces off the walls, and their verifier.

Generator (`world`): clip i is a function of (seed, split, i) and its law of motion runs for any number of frames, so a
longer clip begins with the shorter one. Captioner: names size, colour, shape and the first direction. Verifier: `read`
finds shape, colour, size and position in every frame; the other functions say what a clip keeps of its first frame and
of the law, `verify` all of it. Fréchet distances between the features given here are `metrics.clip_distances`.

Lengths are in pixels: pixel i covers [i, i + 1), x grows to the right, y downwards; velocities are per frame.
"""

from diffusion_jax.data.moving.verifier import (
    Reading,
    difference_features,
    direction,
    drift,
    frame_features,
    keeps_identity,
    labels,
    motion_energy,
    next_position_error,
    position_error,
    read,
    speed,
    verify,
)
from diffusion_jax.data.moving.world import (
    ATTRIBUTES,
    DIRECTIONS,
    SHAPES,
    SIZES,
    Moving,
    MovingShapes,
    bounce,
    class_of,
    describe,
    draw_moving,
    moving_shapes,
    render,
    trajectory,
)

__all__ = [
    "ATTRIBUTES",
    "DIRECTIONS",
    "SHAPES",
    "SIZES",
    "Moving",
    "MovingShapes",
    "Reading",
    "bounce",
    "class_of",
    "describe",
    "difference_features",
    "direction",
    "draw_moving",
    "drift",
    "frame_features",
    "keeps_identity",
    "labels",
    "motion_energy",
    "moving_shapes",
    "next_position_error",
    "position_error",
    "read",
    "render",
    "speed",
    "trajectory",
    "verify",
]
