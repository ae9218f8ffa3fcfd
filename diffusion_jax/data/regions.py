"""Regions of pictures of 32 x 32 pixels, of which persons and their garments are drawn, as masks `[N, 32, 32]`."""

import numpy as np

SIZE = 32
"""Pixels a side."""

MIDDLES = np.arange(SIZE, dtype=np.float32) + 0.5
"""Where the middles of pixels are, along either axis."""


def capsule(a, b, radius):
    """The pixels within `radius` of the segments from a to b `[N, 2]`."""
    ax, ay, bx, by = (np.reshape(value, (-1, 1, 1)).astype(np.float32) for value in (*a.T, *b.T))
    x, y, along_x, along_y = MIDDLES - ax, MIDDLES[:, None] - ay, bx - ax, by - ay
    square = np.maximum(along_x**2 + along_y**2, 1e-6)
    share = np.clip(x * (along_x / square) + y * (along_y / square), 0, 1)
    distance = (x - share * along_x) ** 2 + (y - share * along_y) ** 2
    return distance < np.square(np.reshape(radius, (-1, 1, 1)))


def trapezoid(middle, top, bottom, half_top, half_bottom):
    """The pixels between two heights whose distance from `middle` stays within a width that changes linearly."""
    middle, top, bottom, half_top, half_bottom = (
        np.reshape(value, (-1, 1, 1)) for value in (middle, top, bottom, half_top, half_bottom)
    )
    y = MIDDLES[:, None]
    half = half_top + (half_bottom - half_top) * (y - top) / (bottom - top)
    return (y > top) & (y < bottom) & (np.abs(MIDDLES - middle) < half)
