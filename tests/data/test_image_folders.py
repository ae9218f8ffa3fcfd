"""Folders of pictures: classes and captions are those that a person sees there, and what is not read is told."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, models
from diffusion_jax.config import build, call
from diffusion_jax.errors import InvalidInput


def picture(path, value=9, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)
    return path


@pytest.fixture
def classes(tmp_path):
    for number, name in enumerate(("cat", "dog")):
        picture(tmp_path / name / "0.png", 100 * number)
    return tmp_path


def quiet(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make()


def test_what_systems_leave_behind_is_no_class_and_no_picture(classes):
    picture(classes / ".ipynb_checkpoints" / "0-checkpoint.png")
    picture(classes / "__MACOSX" / "cat" / "0.png")
    picture(classes / "cat" / "@eaDir" / "thumb.jpg")
    (classes / "cat" / "._0.png").write_bytes(b"\x00\x05\x16\x07")
    (classes / "cat" / "Thumbs.db").write_bytes(b"")
    (classes / ".DS_Store").write_bytes(b"")
    source = quiet(lambda: data.image_folder(str(classes), size=8))
    assert source.class_names == ("cat", "dog") and source.labels == (0, 1) and len(source) == 2
    data.check_finite(source)


def test_what_is_not_read_is_told(classes):
    for name in ("clip.mov", "notes.txt", "raw.dng", "more.txt"):
        (classes / "cat" / name).write_text("")
    with pytest.warns(UserWarning, match=r"4 files .* left out.*'cat/clip.mov', .* and 1 more"):
        source = data.image_folder(str(classes), size=8)
    assert len(source) == 2 and len(source.left_out) == 4


def test_an_empty_class_keeps_its_number(classes):
    (classes / "bird").mkdir()
    with pytest.warns(UserWarning, match="'bird' .*no picture"):
        source = data.image_folder(str(classes), size=8)
    assert source.class_names == ("bird", "cat", "dog") and source.labels == (1, 2) and source.num_classes == 3


def test_class_names_decide_the_numbers(classes):
    source = data.image_folder(str(classes), size=8, class_names=("dog", "cat"))
    assert source.labels == (1, 0) and [int(source[i]["cond"]["label"]) for i in range(2)] == [1, 0]
    with pytest.raises(InvalidInput, match="'dog', which is not one of class_names; did you mean 'dogs'"):
        data.image_folder(str(classes), class_names=("cat", "dogs"))
    with pytest.raises(InvalidInput, match="once"):
        data.image_folder(str(classes), class_names=("cat", "dog", "cat"))
    with pytest.raises(InvalidInput, match="no subfolder"):
        data.image_folder(str(classes / "cat"), class_names=("cat",))


def test_linked_classes_are_read_and_circles_end(classes, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    picture(elsewhere / "0.png", 50)
    (classes / "fox").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(classes)
    source = data.image_folder(str(classes), size=8)
    assert source.class_names == ("cat", "dog", "fox") and source.labels == (0, 1, 2)


def test_hidden_colours_are_never_learned(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (16, 16, 4)).astype(np.uint8)
    rgba[..., 3] = 0
    rgba[4:12, 4:12] = (255, 0, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "cutout.png")
    with pytest.raises(InvalidInput, match=r"cutout.png.*background='white'"):
        data.image_folder(str(tmp_path), size=16)[0]
    expected = np.full((16, 16, 3), 1.0)
    expected[4:12, 4:12] = (1, -1, -1)
    source = data.image_folder(str(tmp_path), size=16, background="white", weigh_alpha=True)
    np.testing.assert_array_equal(source[0]["x0"], expected)
    np.testing.assert_array_equal(source[0]["weight"], rgba[..., 3] / 255)


def test_a_file_that_vanishes_is_named(classes):
    source = data.image_folder(str(classes), size=8)
    batches = data.pipeline(source, 2, shuffle=False, num_threads=0)
    next(batches)
    (classes / "dog" / "0.png").unlink()
    with pytest.raises(InvalidInput, match=r"dog/0.png.*does not exist"):
        next(batches)


# Captions


@pytest.fixture
def pictures(tmp_path):
    for number in range(3):
        picture(tmp_path / f"{number}.png", 100 * number)
    return tmp_path


TEXTS = ("a red cube", "two cats", 'Ünïcode, \u2028 and "quotes"')


def written(folder, form, texts=TEXTS):
    if form == "txt":
        for number, text in enumerate(texts):
            (folder / f"{number}.txt").write_text(f"\ufeff{text}\n" if number else text, encoding="utf-8")
    elif form == "metadata.jsonl":
        rows = [json.dumps({"file_name": f"{i}.png", "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
        (folder / form).write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    else:
        rows = [f'{i}.png,"{text.replace(chr(34), chr(34) * 2)}"' for i, text in enumerate(texts)]
        (folder / form).write_text("\n".join(["file_name,text", *rows]), encoding="utf-8")


@pytest.mark.parametrize("form", ["txt", "metadata.jsonl", "metadata.csv", "captions.csv"])
def test_captions_are_read_from_what_users_have(pictures, form):
    written(pictures, form)
    source = quiet(lambda: data.captioned_folder(str(pictures), size=8, tokenizer=data.byte_tokenizer()))
    assert source.captions == TEXTS and source.vocab_size == 256
    batch = next(data.pipeline(source, 3, shuffle=False))
    for row, text in enumerate(TEXTS):
        tokens, mask = batch["cond"]["tokens"][row], batch["cond"]["tokens_mask"][row]
        assert tokens.dtype == np.int32 and bytes(tokens[mask].tolist()).decode() == text
        np.testing.assert_allclose(batch["x0"][row], 100 * row / 127.5 - 1, atol=1e-6)


def test_tables_speak_of_the_folder_that_they_are_in(tmp_path):
    for part in ("a", "b"):
        picture(tmp_path / part / "deep" / "0.png")
        (tmp_path / part / "metadata.jsonl").write_text(json.dumps({"file_name": "deep/0.png", "text": part}))
    assert data.captioned_folder(str(tmp_path)).captions == ("a", "b")


def test_missing_captions_are_told(pictures):
    written(pictures, "txt", TEXTS[:1])
    with pytest.raises(InvalidInput, match=r"2 of 3 pictures.*'1.png', '2.png'"):
        data.captioned_folder(str(pictures))
    assert data.captioned_folder(str(pictures), without_caption="drop").captions == TEXTS[:1]
    assert data.captioned_folder(str(pictures), without_caption="empty").captions == (TEXTS[0], "", "")
    with pytest.raises(InvalidInput, match="did you mean 'drop'"):
        data.captioned_folder(str(pictures), without_caption="dropped")
    with pytest.raises(InvalidInput, match="No picture"):
        data.captioned_folder(str(pictures), captions="metadata.csv")


def test_two_captions_are_told(pictures):
    written(pictures, "txt")
    written(pictures, "metadata.jsonl")
    assert data.captioned_folder(str(pictures)).captions == TEXTS
    written(pictures, "metadata.jsonl", ("a blue cube", *TEXTS[1:]))
    with pytest.raises(InvalidInput, match=r"0.png' has two captions in '0.txt' and in 'metadata.jsonl'"):
        data.captioned_folder(str(pictures))
    assert data.captioned_folder(str(pictures), captions="metadata.jsonl").captions[0] == "a blue cube"


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("metadata.jsonl", '{"file_name": "9.png", "text": "x"}', "'9.png', which is no picture"),
        ("metadata.jsonl", '{"file_name": "../0.png", "text": "x"}', "outside of its folder"),
        ("metadata.jsonl", '{"file_name": "0.png", "caption": "x"}', "line 1, has no text in the column 'text'"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": 3}', "line 1"),
        ("metadata.jsonl", "\n[]", "line 2"),
        ("metadata.jsonl", "nonsense", "not JSON"),
        ("captions.csv", "0.png,x", "columns file_name and text"),
        ("captions.csv", 'file_name,text\n0.png,"x', "no CSV"),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(pictures, name, content, part):
    (pictures / name).write_text(content)
    with pytest.raises(InvalidInput, match=part):
        data.captioned_folder(str(pictures), without_caption="empty")


def test_long_captions_are_cut_and_told(pictures):
    written(pictures, "txt")
    with pytest.warns(UserWarning, match="2 of 3 captions .* more than 8 tokens"):
        source = data.captioned_folder(str(pictures), tokenizer=data.byte_tokenizer(), length=8)
    assert bytes(source[0]["cond"]["tokens"].tolist()) == b"a red cu" and source[0]["cond"]["tokens_mask"].all()


def test_captions_are_encoded_once(pictures):
    written(pictures, "txt", ("b", "a", "b"))
    asked = []

    def encode(texts):
        asked.append(texts)
        return {"context": np.array([[[ord(text)]] for text in texts], np.float32)}

    source = data.encoded_captions(data.captioned_folder(str(pictures), size=8), encode, batch=4)
    assert asked == [["a", "b", "b", "b"]]
    batch = next(data.pipeline(source, 3, shuffle=False))
    np.testing.assert_array_equal(batch["cond"]["context"][:, 0, 0], [98, 97, 98])
    models.check_values((models.context(channels=1),), source.cond, data=True)
    with pytest.raises(InvalidInput, match="context"):
        models.check_values((models.context(channels=2),), source.cond, data=True)


def test_captioned_folders_are_an_entry_of_a_config(pictures):
    written(pictures, "captions.csv")
    tokenizer = call("data.byte_tokenizer")
    source = build(call("data.captioned_folder", folder=str(pictures), size=8, tokenizer=tokenizer, length=32))
    assert source.captions == TEXTS and source[1]["cond"]["tokens"].shape == (32,)
