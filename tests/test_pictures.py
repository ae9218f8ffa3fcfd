"""Pictures show what they were given."""

import imageio.v3 as imageio
import numpy as np

from diffusion_jax import pictures


def test_strips_show_every_clip(tmp_path):
    red, blue = np.full((3, 8, 8, 3), -1.0), np.full((2, 3, 8, 8, 3), -1.0)
    red[..., 0], blue[..., 2] = 1.0, 1.0
    pictures.save_strips(tmp_path / "strips.png", {"one": red, "two of another": blue})
    sheet = imageio.imread(tmp_path / "strips.png")[..., :3].astype(int)
    areas = [(np.abs(sheet - colour).sum(-1) < 60).sum() for colour in ([255, 0, 0], [0, 0, 255])]
    assert areas[0] > 3 * 8 * 8
    assert 1.6 < areas[1] / areas[0] < 2.4


def test_captions_stand_under_their_images(tmp_path):
    red = np.full((2, 8, 8, 3), -1.0)
    red[..., 0] = 1.0
    inks = []
    for captions in (["", ""], ["seven", "three"]):
        pictures.save_captioned(tmp_path / "rows.png", {"": (red, captions)})
        sheet = imageio.imread(tmp_path / "rows.png")[..., :3].astype(int)
        inks.append((sheet.sum(-1) < 200).sum())
        reds = np.abs(sheet - [255, 0, 0]).sum(-1) < 60
    assert inks[0] == 0 and inks[1] > 20
    columns = np.flatnonzero(reds.any(0))
    assert (np.diff(columns) > 1).sum() == 1


def test_a_plot_carries_its_numbers(tmp_path):
    curves = {"one": (np.arange(3), np.array([0.1, 0.02, 0.3])), "two": ((0,), (0.5,))}
    pictures.save_curves(tmp_path / "a.png", curves, x_label="step", y_label="loss", title="Loss", log=False)
    before = imageio.imread(tmp_path / "a.png")
    pictures.redraw(tmp_path / "a.png")
    np.testing.assert_array_equal(imageio.imread(tmp_path / "a.png"), before)
    pictures.redraw(tmp_path / "a.png", title="Another")
    assert (imageio.imread(tmp_path / "a.png") != before).any()


def test_small_images_are_enlarged_and_what_is_missing_of_a_row_is_empty():
    sheet = pictures.grid(np.full((3, 8, 8, 1), -1.0), 2, zoom=None)
    assert pictures.readable_zoom(8, 8) == 8 and pictures.readable_zoom(512, 512) == 1
    assert sheet.shape == (2 * 66 + 2, 2 * 66 + 2, 3)
    assert (sheet == 0).all(-1).sum() == 3 * 64**2 and (sheet[68:, 68:] == 255).all()
