"""The how-to of vector times."""

from tests.guides.running import run


def test_vector_times():
    smaller = {
        'video_dit("S/4")': 'video_dit("S/4", width=16, depth=2, heads=2)',
        '"S", times="tokens", skips=True': '"S", times="tokens", skips=True, width=16, depth=3, heads=2',
        '(1,), "S", ': '(1,), "S", width=16, depth=2, heads=2, ',
        "linspace(20)": "linspace(10)",
    }
    names = run("vector_times.md", smaller)
    assert {x.shape for x in names["made"].values()} == {(2, 8, 16, 16, 3)}
    assert names["run"]._cache_size() == 1
    assert (names["video"][:, 0] == names["clips"][:, 0]).all() and names["video"][:, 1:].any()
    assert names["long"].shape == (2, 16, 16, 16, 3)
    assert names["slid"].shape == (2, 16, 16, 16, 3)
    assert names["image"].shape == (2, 8, 8, 1)
    assert names["chunk"].shape == (2, 4, 2)
    assert float(names["stream"].run.cost.evaluations) == 3 * 8
