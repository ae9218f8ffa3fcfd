"""A person's own folder: damage is told, what is held out stays so, and pictures of any aspect are trained on."""

import warnings

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, pixels
from diffusion_jax.config import build, call
from diffusion_jax.config.overrides import apply_overrides
from diffusion_jax.data import picture_files
from diffusion_jax.data.buckets import BucketSchedule, bucket_sizes, nearest_bucket
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import check_training, prepare, prepare_sampling
from tests.configs.one_step import loaded
from tests.data.test_pipeline import assert_same
from tests.drawings import DAMAGED, GREY, TRANSPARENT, TURNED, draw_folder, drawing

COUNT = 24
LOOK = {"size": 16, "background": "white"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(draw_folder(tmp_path_factory.mktemp("drawings"), COUNT))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return str(draw_folder(tmp_path_factory.mktemp("classes"), COUNT, classes=True))


def usable(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make = data.captioned_folder if "tokenizer" in options else data.image_folder
        return make(folder, **{**LOOK, "on_error": "skip", **options})


def names(source):
    return {path.stem for path in source.files}


def test_a_damaged_picture_is_named_before_training_or_skipped_by_choice(folder):
    said = rf"1 of {COUNT} pictures in .* cannot be used: '{DAMAGED:03d}.png' \(cannot be decoded.*truncated"
    with pytest.raises(InvalidInput, match=rf"{said}.*on_error='skip'"):
        data.captioned_folder(folder, **LOOK, held_out=0.5).check()
    with pytest.warns(UserWarning, match=rf"{said}.*it is skipped"):
        source = data.captioned_folder(folder, **LOOK, on_error="skip")
    source.check()
    assert names(source) == {f"{i:03d}" for i in range(COUNT)} - {f"{DAMAGED:03d}"}
    assert [path.stem for path in source.skipped] == [f"{DAMAGED:03d}"]
    assert source.captions == tuple(drawing(int(path.stem))[2] for path in source.files)
    with pytest.raises(InvalidInput, match="on_error is 'ignore', which does not exist"):
        data.image_folder(folder, on_error="ignore")


def test_grey_transparent_and_turned_pictures_are_what_a_person_sees(folder):
    source = usable(folder, size=60, fit="stretch")
    shown = {int(path.stem): source[row]["x0"] for row, path in enumerate(source.files)}
    for number in (GREY, TRANSPARENT, TURNED):
        image = drawing(number)[0]
        if number == TRANSPARENT:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        wanted = pixels.resize(pixels.as_image(image.convert("RGB")), 60)
        assert np.abs(shown[number] - wanted).mean() < 0.02


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_what_is_held_out_depends_on_content_alone(folder, tmp_path, share):
    source = usable(folder, held_out=share)
    kept = names(source.held_out)
    assert len(kept) == round(share * (COUNT - 1)) and not kept & names(source)
    assert len(source) + len(source.held_out) == COUNT - 1
    renamed = {}
    for path in (*source.files, *source.held_out.files):
        renamed[f"x{hash(path.stem) % 1000}-{path.stem}"] = path.stem
        (tmp_path / f"{list(renamed)[-1]}{path.suffix}").write_bytes(path.read_bytes())
    again = usable(str(tmp_path), held_out=share)
    assert {renamed[name] for name in names(again.held_out)} == kept
    copy = source.held_out.files[0]
    (tmp_path / f"copy{copy.suffix}").write_bytes(copy.read_bytes())
    assert "copy" in names(usable(str(tmp_path), held_out=share).held_out)


def test_held_out_data_follow_the_data(classes):
    source = usable(classes, held_out=0.2)
    assert source.held_out.class_names == source.class_names == ("circle", "square", "triangle")
    for part in (source, source.held_out):
        assert part.labels == tuple(int(path.stem) % 3 for path in part.files)
    assert data.held_out(source) is source.held_out and len(data.held_out(data.unconditional(source))) == 5
    assert data.held_out(data.unconditional(source))[0].keys() == {"x0"}
    with pytest.raises(InvalidInput, match="holds nothing out: give it a share"):
        data.held_out(usable(classes))
    for share in (-0.1, 1.0):
        with pytest.raises(InvalidInput, match=r"held_out is .* lies in \[0, 1\)"):
            usable(classes, held_out=share)
    with pytest.raises(InvalidInput, match="none would be left to train on"):
        usable(classes, held_out=0.99)


def test_pictures_are_cropped_stretched_or_padded():
    image = np.linspace(-1, 1, 8 * 4 * 3, dtype=np.float32).reshape(8, 4, 3)
    np.testing.assert_array_equal(pixels.to_size(image, 4), image[2:6])
    np.testing.assert_array_equal(pixels.to_size(image, (8, 2), "crop"), image[:, 1:3])
    np.testing.assert_array_equal(pixels.to_size(image, 4, "stretch"), pixels.resize(image, 4))
    padded = pixels.to_size(image, 8, "pad", np.float32([1, 0, -1]))
    np.testing.assert_array_equal(padded[:, 2:6], image)
    np.testing.assert_array_equal(padded[:, [0, 7]], np.broadcast_to(np.float32([1, 0, -1]), (8, 2, 3)))
    with pytest.raises(InvalidInput, match=r"fit is 'padding'.*did you mean 'pad'"):
        pixels.to_size(image, 4, "padding")


def test_a_picture_is_decoded_once_and_cannot_be_written_to(classes):
    source = usable(classes)
    assert source[0]["x0"] is source[0]["x0"] and not source[0]["x0"].flags.writeable
    batch = next(data.pipeline(source, 4, transforms=(data.flip(1.0),)))
    assert batch["x0"].flags.writeable


def test_a_folder_is_summed_up_by_names_and_headers(folder, classes, tmp_path):
    found = data.folder_summary(folder)
    assert (found.count, found.captions, found.class_names, found.transparent) == (COUNT, True, (), 1)
    assert found.size == 48 and found.channels == 3 and (96, 72) in found.sizes
    assert data.folder_summary(classes).class_names == ("circle", "square", "triangle")
    image = drawing(TURNED)[0].convert("L")
    image.save(tmp_path / "grey.png")
    found = data.folder_summary(str(tmp_path))
    assert found.channels == 1 and found.sizes == (image.size[::-1],)
    assert data.image_folder(str(tmp_path), size=None, channels=None).shape == (found.size, found.size, 1)


def test_captions_are_as_long_as_the_longest(folder):
    source = usable(folder, tokenizer=data.byte_tokenizer())
    longest = max(map(len, source.captions))
    assert source.length == source[0]["cond"]["tokens"].shape[0] == longest
    assert usable(folder, tokenizer=data.byte_tokenizer(), length=40).length == 40


def test_what_cannot_be_used_is_remembered_while_the_files_are_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(picture_files, "REMEMBERED", 10)
    first = usable(folder)
    monkeypatch.setattr(picture_files, "_unusable", None)
    again = usable(folder)
    assert again.files == first.files and again.skipped == first.skipped and len(first.skipped) == 1
    with pytest.raises(TypeError):
        usable(folder, background="black")
    first.skipped[0].touch()
    with pytest.raises(TypeError):
        usable(folder)


# Several sizes


def test_buckets_have_about_one_area_and_suit_the_pictures():
    shapes = [(100, 100)] * 5 + [(60, 100)] * 3 + [(100, 55)] * 2
    sizes = bucket_sizes(shapes, (64, 64), 3)
    assert len(sizes) == 3 and all(side % 8 == 0 for size in sizes for side in size)
    assert all(0.8 < h * w / 64**2 < 1.2 for h, w in sizes)
    assert [sizes[n][0] / sizes[n][1] > 1 for n in nearest_bucket(shapes, sizes)[-2:]] == [True, True]
    assert bucket_sizes([(7, 7)] * 4, (64, 64), 5) == ((64, 64),)
    assert bucket_sizes(shapes, (64, 64), ((32, 64), (64, 32))) == ((32, 64), (64, 32))
    for wrong in (0, 17, ((8, 8), (8, 8)), ((0, 8),)):
        with pytest.raises(InvalidInput, match="buckets is"):
            bucket_sizes(shapes, (64, 64), wrong)


def test_each_bucket_gets_its_share_of_the_batches():
    counts = (7, 2, 12)
    schedule = BucketSchedule(np.repeat([4, 1, 9], counts))
    had = [0, 0, 0]
    for batch in range(100):
        number, before = schedule(batch)
        assert before == had[number]
        had[number] += 1
        share = np.asarray([2, 7, 12]) / 21
        assert np.abs(np.asarray(had) - share * (batch + 1)).max() <= 1
    assert [len(examples) for examples in schedule.examples] == [2, 7, 12]


def test_a_batch_has_one_size_and_the_stream_resumes_on_any_number_of_hosts(folder):
    source = usable(folder, tokenizer=data.byte_tokenizer(), buckets=3)
    options = {"seed": 3, "transforms": (data.flip(),)}
    whole = data.pipeline(source, 4, **options)
    batches = [next(whole) for _ in range(12)]
    assert len({batch["x0"].shape for batch in batches}) == len(source.sizes) == 3
    seen = {tuple(batch["cond"]["tokens"][row]) for batch in batches for row in range(4)}
    assert len(seen) > 8
    resumed = data.pipeline(source, 4, **options)
    resumed.set_state({**whole.get_state(), "examples": 20})
    assert_same(next(resumed), batches[5])
    halves = [data.pipeline(source, 4, process_index=host, process_count=2, **options) for host in range(2)]
    for batch in batches[:4]:
        parts = [next(half) for half in halves]
        np.testing.assert_array_equal(np.concatenate([part["x0"] for part in parts]), batch["x0"])
        np.testing.assert_array_equal(np.concatenate([part["index"] for part in parts]), batch["index"])
    with pytest.raises(InvalidInput, match="batch_size of the data is 8"):
        data.pipeline(source, 8, **options).set_state(whole.get_state())


def test_an_epoch_of_a_bucket_has_each_of_its_pictures_once(folder):
    source = usable(folder, buckets=((16, 24), (24, 16)))
    batches = data.pipeline(source, 1)
    for number, size in enumerate(source.sizes):
        rows = np.flatnonzero(source.bucket == number)
        seen = [
            batch["x0"][0] for batch in (next(batches) for _ in range(len(source))) if batch["x0"].shape[1:3] == size
        ]
        assert len(seen) == len(rows)
        assert {image.tobytes() for image in seen} == {source[int(row)]["x0"].tobytes() for row in rows}


def test_the_config_is_set_up_by_the_folder(tmp_path):
    config = apply_overrides(loaded("image_folder", tmp_path), ["data.on_error=skip", "data.size=8", "model.width=16"])
    config = apply_overrides(config, ["data.held_out=0.25", "model.depth=1", "model.heads=2", "data.buckets=2"])
    with pytest.warns(UserWarning, match="1 of 24 pictures"):
        experiment = prepare(config)
    assert len(experiment.held_out) == 6 and experiment.config.data.length == experiment.source.length == 17
    shown = prepare_sampling(experiment).conditions(np.arange(2))
    np.testing.assert_array_equal(shown["tokens"], experiment.held_out.cond["tokens"][:2])
    with pytest.raises(InvalidInput, match="height and width must divide by the patch, 4"):
        check_training(experiment)
    config = apply_overrides(config, ["model.patch=1", "model.positions=learned", "sampling.size=(12, 16)"])
    with pytest.warns(UserWarning, match="1 of 24 pictures"):
        experiment = prepare(config)
    assert experiment.shape == (12, 16, 3)
    with pytest.raises(InvalidInput, match="positions='learned' was made for"):
        check_training(experiment)


def test_a_config_can_name_what_is_held_out(classes):
    entry = call("data.image_folder", folder=classes, held_out=0.2, on_error="skip", **LOOK)
    with pytest.warns(UserWarning, match="skipped"):
        source = build(entry)
    assert build(call("data.held_out"), source=source) is source.held_out
