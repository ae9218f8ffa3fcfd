"""Pictures become the pixels that a person sees: upright, by their depth, before a background; or they are refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import pixels
from diffusion_jax.errors import InvalidInput

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (8, 6, 3)).astype(np.uint8)
PIXELS = BYTES / 127.5 - 1
RAMP = np.linspace(0, 1, 48).reshape(8, 6)

STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}
"""What a camera stores of an upright picture for each EXIF orientation."""


@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_turned_as_their_exif_says(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](BYTES)))
    for suffix, options in (
        (".png", {}),
        (".tif", {}),
        (".webp", {"lossless": True}),
        (".jpg", {"quality": 100, "subsampling": 0}),
    ):
        stored.save(tmp_path / f"x{suffix}", exif=exif, **options)
        for value in (tmp_path / f"x{suffix}", Image.open(tmp_path / f"x{suffix}")):
            image = pixels.as_image(value)
            assert image.shape == PIXELS.shape
            np.testing.assert_allclose(image, PIXELS, atol=0.03 if suffix == ".jpg" else 1e-6, err_msg=suffix)


def test_depth_is_scaled_by_its_range(tmp_path):
    deep = (RAMP * 65535).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    Image.fromarray(deep.astype(">u2")).save(tmp_path / "big_endian.tif")
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float.tif")
    for name in ("deep.png", "deep.tif", "big_endian.tif", "float.tif"):
        found = pixels.as_image(tmp_path / name)
        np.testing.assert_allclose(found[..., 0], 2 * RAMP - 1, atol=4e-5, err_msg=name)
    Image.fromarray((255 * RAMP).astype(np.float32)).save(tmp_path / "unknown.tif")
    Image.fromarray((255 * RAMP).astype(np.int32)).save(tmp_path / "integers.tif")
    for name in ("unknown.tif", "integers.tif"):
        with pytest.raises(InvalidInput, match=name):
            pixels.as_image(tmp_path / name)


def test_palettes_bits_and_inks_show_their_colours(tmp_path):
    Image.fromarray(BYTES).quantize(256).save(tmp_path / "palette.png")
    np.testing.assert_allclose(pixels.as_image(tmp_path / "palette.png"), PIXELS, atol=1e-6)
    Image.fromarray(RAMP > 0.5).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(pixels.as_image(tmp_path / "bits.png")[..., 0], np.where(RAMP > 0.5, 1, -1))
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "red.tif")
    np.testing.assert_array_equal(pixels.as_image(tmp_path / "red.tif")[0, 0], [1, -1, -1])
    grey = pixels.as_image(Image.fromarray(BYTES), channels=1)
    np.testing.assert_allclose(grey[..., 0], PIXELS @ [0.299, 0.587, 0.114], atol=1e-6)
    flat = pixels.as_image(Image.fromarray(BYTES[..., 0]), channels=3)
    np.testing.assert_allclose(flat, np.repeat(PIXELS[..., :1], 3, -1), atol=1e-6)


def test_what_is_transparent_shows_the_background_alone(tmp_path):
    alpha = (255 * RAMP).astype(np.uint8)
    cutout = np.dstack([BYTES, alpha])
    share = alpha[..., None] / 255
    Image.fromarray(cutout).save(tmp_path / "cutout.png")
    for background, rgb in (("white", (1, 1, 1)), ("#ff0000", (1, -1, -1)), ((0, 0, 255), (-1, -1, 1))):
        for value in (tmp_path / "cutout.png", cutout):
            found, kept = pixels.image_and_alpha(value, background=background)
            np.testing.assert_allclose(found, share * PIXELS + (1 - share) * np.array(rgb), atol=1e-5)
            np.testing.assert_allclose(kept, share, atol=1e-6)
    for value in (tmp_path / "cutout.png", cutout):
        with pytest.raises(InvalidInput, match="background='white'"):
            pixels.as_image(value)
    Image.fromarray(np.dstack([BYTES, np.full_like(alpha, 255)])).save(tmp_path / "opaque.png")
    np.testing.assert_allclose(pixels.as_image(tmp_path / "opaque.png"), PIXELS, atol=1e-6)
    # One colour of the file is transparent, without a channel of its own.
    Image.fromarray(BYTES).save(tmp_path / "key.png", transparency=tuple(BYTES[2, 3].tolist()))
    np.testing.assert_array_equal(pixels.as_image(tmp_path / "key.png", background="black")[2, 3], [-1, -1, -1])
    with pytest.raises(InvalidInput, match="background"):
        pixels.as_image(cutout, background="no colour")


def test_one_picture_is_needed(tmp_path):
    first, second = Image.fromarray(BYTES), Image.fromarray(255 - BYTES)
    for name in ("moves.gif", "moves.png", "moves.webp", "pages.tif"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        with pytest.raises(InvalidInput, match=rf"{name}.*several frames"):
            pixels.as_image(tmp_path / name)
    # A camera's second image is a thumbnail or a depth.
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second], quality=95)
    first.save(tmp_path / "alone.jpg", quality=95)
    np.testing.assert_array_equal(pixels.as_image(tmp_path / "phone.jpg"), pixels.as_image(tmp_path / "alone.jpg"))


def test_arrays_are_pixels_by_their_type():
    expected = PIXELS.astype(np.float32)
    for value in (BYTES, jnp.asarray(BYTES), PIXELS, expected, jnp.asarray(expected), Image.fromarray(BYTES)):
        found = pixels.as_image(value, channels=3)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    deep = BYTES.astype(np.uint16) * 257
    np.testing.assert_allclose(pixels.as_image(deep), expected, atol=1e-6)
    np.testing.assert_allclose(pixels.scaled(deep.astype(np.uint32) * 65537, "x"), expected, atol=1e-6)
    np.testing.assert_array_equal(pixels.scaled(BYTES > 99, "x"), np.where(BYTES > 99, 1, -1))
    np.testing.assert_allclose(pixels.scaled(BYTES.astype(float), "x", (0, 255)), expected, atol=1e-6)
    np.testing.assert_allclose(pixels.scaled(BYTES.astype(np.int64), "x", (0, 255)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (BYTES / 255, r"\[0, 1\]"),
        (BYTES.astype(float), "x / 127.5 - 1"),
        (BYTES.astype(int), "signed integers are tokens"),
        (np.full((4, 4, 3), np.nan), "not finite"),
        (PIXELS[..., 0], r"\[H, W, C\]"),
        (np.moveaxis(PIXELS, -1, 0), "channels last"),
        (PIXELS[None], r"\[H, W, C\]"),
        (PIXELS * 1j, "complex"),
        (np.array([["2020-01-01"]], "M8[D]")[..., None], "datetime64"),
        (np.full((2, 2, 3), None), "object"),
        (np.zeros((0, 4, 3)), "no pixel"),
        (np.dstack([PIXELS, RAMP]), "transparency"),
        ("no/such.png", "no/such.png"),
    ],
    ids=str,
)
def test_what_could_be_meant_otherwise_is_refused(value, part):
    with pytest.raises(InvalidInput, match=part):
        pixels.as_image(value, "the picture", channels=3)


def test_a_stated_range_is_kept_to():
    for value_range in ((0, 254), (5, 255), (1, 0), (0, np.inf)):
        with pytest.raises(InvalidInput, match="value_range"):
            pixels.scaled(np.array([0, 255]), "x", value_range)
    with pytest.raises(InvalidInput, match="NaN"):
        pixels.scaled(np.array([np.nan, 1.0]), "x", (0, 1))
    with pytest.raises(InvalidInput, match="float32"):
        pixels.scaled(np.array([1e300]), "x")
