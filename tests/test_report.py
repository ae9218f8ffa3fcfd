"""The report shows what a run left, refers to nothing outside of itself, and says what differs from the defaults."""

import json
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest

from diffusion_jax import charts, pictures, report, summary
from diffusion_jax.command import run_command
from diffusion_jax.config import load

VOID = {"meta", "img", "wbr"}


class Page(HTMLParser):
    """Tags as they open and close, what attributes refer to, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def workdir(tmp_path):
    config = load("configs/digits_dit.py")
    config.train.steps = 40
    folder = tmp_path / "<b>run & co</b>"
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    records = [{"step": i, "loss": 1 / i, "loss/t=0.0625": 0.5, "grad_norm": "nan", "mse": 2.0} for i in range(1, 31)]
    records.append({"step": 30, "validation/loss": 0.25, "validation/loss/t=0.0625": 0.125})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    measured = {"frechet": 1.25, "clip": {"score": 0.3}, "samples": {"seed": 0}, "note": "<script>"}
    (folder / "metrics.json").write_text(json.dumps(measured))
    images = np.zeros((4, 8, 8, 1))
    pictures.save_grid(folder / "samples.png", images, 2)
    for step in range(0, 60, 10):
        pictures.save_grid(folder / "pictures" / f"samples_{step:07d}.png", images, 2)
    return folder


def test_a_page_stands_alone_and_shows_the_run(workdir):
    path = report.write_report(workdir)
    text = path.read_text()
    page = Page(text)
    assert path == workdir / "report.html" and "script" not in page.tags and "link" not in page.tags
    assert "url(" not in text and "@import" not in text
    # The sample, and four of the six pictures of training: the first and the last among them.
    assert len(page.references) == 5 and all(value.startswith("data:image/png;base64,") for value in page.references)
    assert "step 0." in page.text and "step 50." in page.text and "step 10." not in page.text
    for shown in (
        *("<b>run & co</b>", "models.dit on data.digits · 30 of 40 steps", "Loss by timestep", "<script>"),
        *("1.25", "clip.score", "held-out loss", "denoisers.guided(null={label: 10}, scale=1.25)"),
        f"diffusion-jax sample --workdir={shlex.quote(str(workdir))}",
    ):
        assert shown in page.text
    assert page.tags.count("svg") == 3
    # Tiles have the last record that has the figure.
    assert "0.03333training loss" in page.text and "0.25held-out loss" in page.text


def test_a_large_picture_is_named_and_not_shown(workdir, monkeypatch):
    monkeypatch.setattr(report, "MOST_PICTURE", 8)
    page = Page(report.report_page(workdir))
    assert not page.references and "samples.png is too large to be shown here" in page.text


def test_what_a_run_lacks_is_left_out(tmp_path, capsys):
    assert run_command(report.main, [f"--workdir={tmp_path}"]) == 2
    assert "config.json does not exist: workdir must be the folder of a run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"data": {"call": "my_package:folder", "path": "x"}}))
    (tmp_path / "metrics.json").write_text("torn {")
    output = tmp_path / "elsewhere.html"
    assert run_command(report.main, [f"--workdir={tmp_path}", f"--output={output}"]) == 0
    page = Page(output.read_text())
    # Code of others is named, and not imported.
    assert "my_package:folder(path='x')" in page.text and "svg" not in page.tags
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "elsewhere.html", "metrics.json"]


def test_the_defaults_are_not_told():
    plain = load("configs/digits_dit.py").to_dict()
    assert report.changed_settings("train", plain["train"], plain["train"]).keys() == {
        "train.steps",
        "train.batch_size",
    }
    assert report.changed_settings("sampling", plain["sampling"], plain["sampling"]) == {}
    changed = {**plain["train"], "keep": 7}
    assert report.changed_settings("train", changed, plain["train"])["train.keep"] == "7"
    assert report.call_in_words({"call": "data.digits", "split": "test"}) == "data.digits(split='test')"


@pytest.mark.parametrize(
    ("y", "log"),
    [
        ([1.0, 10.0, 1e5], True),
        ([1.0, 1.0], True),
        ([0.0, -3.0, 5.0], True),
        ([float("nan"), 2.0], False),
        ([1e-30, 1e30], True),
        (list(np.random.default_rng(0).normal(size=3000)), False),
    ],
    ids=["decades", "constant", "not positive", "one point", "a huge range", "long"],
)
def test_curves_stay_within_their_chart_and_are_short(y, log):
    chart = charts.line_chart({"a": (range(len(y)), y)}, x_label="step", y_label="loss", log=log)
    points = [
        tuple(map(float, point.split())) for part in chart.split(' d="M')[1:] for point in part.split('"')[0].split("L")
    ]
    assert points and all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in points)
    assert len(chart) < 30_000 and 2 <= chart.count('class="grid"') <= 12


def test_nothing_is_drawn_of_nothing():
    assert charts.line_chart({"a": ([1], [float("nan")]), "b": ([], [])}, x_label="x", y_label="y") == ""


def test_a_block_is_aligned_and_numbers_are_readable():
    assert summary.as_block("Training", {"model": "a", "workdir": "b"}) == "Training\n  model    a\n  workdir  b"
    counted = [summary.count_of(n, noun) for n, noun in ((1, "class"), (10, "class"), (1438, "example"))]
    assert counted == ["1 class", "10 classes", "1,438 examples"]
    assert [summary.bytes_in_words(n) for n in (12, 2.9e6, 5e15)] == ["12 B", "2.9 MB", "5e+03 TB"]
    assert summary.shape_in_words({"image": (8, 8, 1), "gain": ()}) == "image 8 x 8 x 1, gain 1 number"
