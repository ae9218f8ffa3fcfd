"""A folder of drawings as a person has it: mixed sizes, one grey, one with transparency, one turned by its EXIF, one
damaged, captions beside them or classes.

    python tests/drawings.py FOLDER [classes]
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (200, 40, 30), "green": (40, 140, 60), "blue": (40, 70, 190), "yellow": (225, 180, 40)}
PAPER = (250, 247, 240)
SIZES = ((64, 64), (80, 60), (60, 90), (72, 96), (120, 80))
"""Widths and heights."""

GREY, TRANSPARENT, TURNED, DAMAGED = 5, 6, 7, 8
"""Numbers of the drawings that are so."""

SIDEWAYS = 6
"""The EXIF orientation of a camera that was held upright: the picture is stored lying on its left side."""


def drawing(number: int) -> tuple[Image.Image, str, str]:
    """Drawing `number`, the name of its shape, and a caption."""
    rng = np.random.default_rng(number)
    shape, colour = SHAPES[number % len(SHAPES)], list(COLOURS)[number // len(SHAPES) % len(COLOURS)]
    width, height = SIZES[number % len(SIZES)]
    image = Image.new("RGBA" if number == TRANSPARENT else "RGB", (width, height))
    if image.mode == "RGB":
        image.paste(PAPER, (0, 0, width, height))
    pen = ImageDraw.Draw(image)
    radius = int(rng.integers(12, 22))
    x, y = int(rng.integers(radius + 2, width - radius - 2)), int(rng.integers(radius + 2, height - radius - 2))
    corners = (x - radius, y - radius, x + radius, y + radius)
    fill = COLOURS[colour] + ((255,) if image.mode == "RGBA" else ())
    if shape == "circle":
        pen.ellipse(corners, fill=fill)
    elif shape == "square":
        pen.rectangle(corners, fill=fill)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    return (image.convert("L") if number == GREY else image), shape, f"a {colour} {shape}"


def draw_folder(folder: Path | str, count: int = 60, *, classes: bool = False, captions: bool = True) -> Path:
    """Writes drawings `0 .. count - 1`; in subfolders by shape with `classes`, else with captions in text files."""
    folder = Path(folder)
    for number in range(count):
        image, shape, caption = drawing(number)
        path = (folder / shape if classes else folder) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == TURNED:
            path, exif = path.with_suffix(".jpg"), Image.Exif()
            exif[0x0112] = SIDEWAYS
            image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
        else:
            image.save(path)
        if number == DAMAGED:
            path.write_bytes(path.read_bytes()[:-40])
        if captions and not classes:
            path.with_suffix(".txt").write_text(caption)
    return folder


if __name__ == "__main__":
    print(f"Wrote {draw_folder(sys.argv[1], classes='classes' in sys.argv[2:])}")
