"""The how-to of data of one's own."""

import numpy as np
from PIL import Image

from tests.guides.running import run


def test_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opaque = np.full((40, 48, 4), 255, np.uint8)
    cutout = opaque.copy()
    cutout[:8, :, 3] = 0
    for name, picture in {
        "classes/cat/1.png": opaque,
        "classes/dog/1.png": opaque,
        "held_out/dog/1.png": opaque,
        "captions/1.png": opaque,
        "captions/2.png": cutout,
        "cutouts/1.png": cutout,
    }.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "photos" / name)
    (tmp_path / "photos/captions/1.txt").write_text("a white wall")
    (tmp_path / "photos/captions/metadata.jsonl").write_text('{"file_name": "2.png", "text": "another"}\n')
    names = run("data.md", {})
    assert set(names["batch"]["cond"]["context"].ravel()) == {len("a white wall"), len("another")}
    np.testing.assert_array_equal(names["source"][0]["weight"][10:], 1)
