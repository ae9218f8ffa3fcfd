"""The how-to of faster sampling."""

from tests.guides.running import checkpoints, run
from tests.interop.folders import SIZE


def test_faster_sampling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = checkpoints(tmp_path / "checkpoints")
    smaller = {
        '"S/2", conditions': '"S/2", width=16, depth=2, heads=2, conditions',
        '"S/2", width=192, depth=4, heads=3': '"S/2", width=8, depth=1, heads=2',
        "(8, 32, 32, 4)": "(8, 4, 4, 1)",
        "checkpoints/sd15": str(folder),
        "num_steps=30": "num_steps=4",
        "(512, 512)": f"({SIZE}, {SIZE})",
        "linspace(50)": "linspace(12)",
        "linspace(17)": "linspace(4)",
        "(3, 5)": "(3,)",
        "(0, 1, 2)": "(1,)",
    }
    names = run("faster_sampling.md", smaller)
    assert names["images"].shape == (1, SIZE, SIZE, 3)
    # An untrained network says nothing, so forecasts of it are exact, and only fewer steps change the sample.
    assert all(error < 1e-5 for name, (_, error, _) in names["table"].items() if "instead" not in name)
    # What is left out is counted, in evaluations of the whole network; a gate may leave out nothing of this one.
    assert all(fewer > 1.2 for name, (fewer, _, _) in names["table"].items() if "gate" not in name)
    assert names["rectified"].x.shape == names["out"].x.shape == (8, 4, 4, 1)
    assert float(names["out"].cost.evaluations) < 2 * 12
