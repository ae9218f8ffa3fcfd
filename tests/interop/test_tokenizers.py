"""Tokenizers from the files of a checkpoint: their pieces against the packages that trained them, and bad files."""

import json
import shutil

import numpy as np
import pytest
import tokenizers

from diffusion_jax import interop
from diffusion_jax.errors import InvalidInput

pytest.importorskip("sentencepiece")

import sentencepiece

from tests.interop.vocabularies import ODD, clip_folder, t5_folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return t5_folder(tmp_path_factory.mktemp("t5"))


def changed(folder, tmp_path, name, change):
    """A copy of the folder, one of its files rewritten (removed where the change is None)."""
    copy = tmp_path / "changed"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    if change is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(change((copy / name).read_bytes() if (copy / name).exists() else b""))
    return copy


def test_clip_adds_both_ends_and_pads(clip):
    tokenizer = interop.load_tokenizer(clip)
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert (tokenizer.end, tokenizer.pad, tokenizer.max_length) == (end, end, 77)
    tokens, mask = tokenizer(["The value", "", "word " * 100])
    assert tokens.shape == mask.shape == (3, 77) and tokens.dtype == np.int32 and mask.dtype == bool
    assert (tokens[:, 0] == start).all()
    assert tokens[1].tolist() == [start] + [end] * 76 and mask[1].sum() == 2
    assert mask[2].all() and tokens[2, -1] == end and tokens[2, -2] != end
    assert tokenizer(["The  VALUE\n"]).tokens.tolist() == tokens[:1].tolist()


def test_words_end_and_letters_are_bytes(clip):
    vocab = json.loads((clip / "vocab.json").read_text())
    names = {number: name for name, number in vocab.items()}
    tokenizer = interop.load_tokenizer(clip)
    for prompt, expected in (("a 1", ["a</w>", "1</w>"]), ("10", ["1</w>", "0</w>"]), ("🐈", None)):
        pieces = [names[i] for i in tokenizer.encode(prompt)[1:-1]]
        assert expected is None or pieces == expected
        assert "".join(pieces).count("</w>") == len(pieces) if expected else pieces[-1].endswith("</w>")


def test_the_special_tokens_map_decides_in_older_folders(clip, tmp_path):
    def change(data):
        return json.dumps({**json.loads(data), "pad_token": "!"}).encode()

    tokenizer = interop.load_tokenizer(changed(clip, tmp_path, "special_tokens_map.json", change))
    assert tokenizer.pad == 0
    assert tokenizer(["hi"], max_length=9).tokens[0, -1] == 0
    # The padding token is one wherever it stands, as it is for the encoders that were published with it.
    assert 0 in tokenizer.encode("hi!")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "identity"},
        {"remove_extra_whitespaces": False},
        {"add_dummy_prefix": False, "normalization_rule_name": "nmt_nfkc_cf"},
        {"byte_fallback": True, "vocab_size": 600},
        {"user_defined_symbols": ["cat"]},
    ],
    ids=lambda options: " ".join(options) or "as T5",
)
def test_unigram_pieces_are_those_of_sentencepiece(options, tmp_path):
    folder = t5_folder(tmp_path, extra_ids=0, **options)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokenizer = interop.load_tokenizer(folder)
    assert tokenizer.vocab_size == reference.vocab_size()
    for prompt in ODD:
        # Special tokens are text to sentencepiece, and are read as tokens here. A carriage return and the line feed
        # behind it are two spaces to sentencepiece and one to `tokenizers`, which shows where spaces are kept.
        if "</s>" not in prompt and ("\r" not in prompt or "remove_extra_whitespaces" not in options):
            assert tokenizer.encode(prompt) == [*reference.encode(prompt), 1], prompt


def test_t5_ends_and_pads(t5):
    tokenizer = interop.load_tokenizer(t5)
    assert (tokenizer.end, tokenizer.pad, tokenizer.max_length, tokenizer.vocab_size) == (1, 0, 512, 500)
    tokens, mask = tokenizer(["the value", "", "word " * 100], max_length=6)
    assert tokens[1].tolist() == [1, 0, 0, 0, 0, 0] and mask[1].tolist() == [True] + [False] * 5
    assert tokens[2, -1] == 1 and mask[2].all()
    assert tokenizer.encode("<extra_id_0><extra_id_99>")[:2] == [499, 400]


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_one_json_file_says_the_same(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    tokenizer = interop.load_tokenizer(folder)
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    end = {"clip": "<|endoftext|>", "t5": "</s>"}[name]
    pad = {"clip": "<|endoftext|>", "t5": "<pad>"}[name]
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": end, "pad_token": {"content": pad}}))
    again = interop.load_tokenizer(tmp_path)
    for found, expected in zip(again(ODD, 20), tokenizer(ODD, 20)):
        np.testing.assert_array_equal(found, expected)


def test_what_a_json_file_fixes_of_lengths_is_undone(clip, tmp_path):
    backend = tokenizers.Tokenizer.from_str(interop.load_tokenizer(clip).backend.to_str())
    backend.enable_truncation(5)
    backend.enable_padding(pad_token="!", pad_id=0, length=7)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = interop.load_tokenizer(tmp_path)
    assert tokenizer.pad == 0
    assert tokenizer(["one two three four five"], 12).mask.sum() > 7


def rejected(call, *args, **options):
    with pytest.raises(InvalidInput) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "file", "change", "expected"),
    [
        ("clip", "merges.txt", None, "has no tokenizer.json, no vocab.json with merges.txt, and no spiece.model"),
        ("clip", "merges.txt", lambda data: data + b"zz qqq\n", "'zz qqq', but two parts of a token of vocab.json"),
        ("clip", "vocab.json", lambda data: data[:100], "is not JSON"),
        ("clip", "vocab.json", lambda data: b"[1]", "holds a JSON list"),
        ("clip", "vocab.json", lambda data: data.replace(b"startoftext", b"start"), "lacks the bos_token"),
        ("clip", "tokenizer.json", lambda data: b'{"model": 3}', "is damaged or no tokenizer's file"),
        ("clip", "tokenizer_config.json", lambda data: b'{"tokenizer_class": "Qwen2Tokenizer"}', "of a Qwen2Tokenizer"),
        (
            "t5",
            "spiece.model",
            lambda data: data[: len(data) // 2],
            "is damaged or no tokenizer's file: it is cut short",
        ),
        ("t5", "spiece.model", lambda data: b"", "it has no unknown piece"),
        ("t5", "spiece.model", lambda data: b"version https://git-lfs", "is damaged or no tokenizer's file"),
    ],
)
def test_missing_and_damaged_files(name, file, change, expected, request, tmp_path):
    folder = changed(request.getfixturevalue(name), tmp_path, file, change)
    message = rejected(interop.load_tokenizer, folder)
    assert expected in message and str(folder) in message


def test_other_kinds_of_models(tmp_path):
    assert "only unigram models" in rejected(interop.load_tokenizer, t5_folder(tmp_path, model_type="bpe"))


def test_bad_calls(clip, tmp_path):
    tokenizer = interop.load_tokenizer(clip)
    assert "a list of strings" in rejected(tokenizer, "a cat")
    assert "a list of strings" in rejected(tokenizer, ["a cat", 3])
    assert "at least 2" in rejected(tokenizer, ["a cat"], max_length=1)
    config = json.dumps({"model_max_length": 1e30}).encode()
    unlimited = interop.load_tokenizer(changed(clip, tmp_path, "tokenizer_config.json", lambda data: config))
    assert "one must be given" in rejected(unlimited, ["a cat"])
    assert "does not exist" in rejected(interop.load_tokenizer, tmp_path / "nowhere")


def test_what_is_cut_is_named(clip, t5):
    for folder, count in ((clip, 20), (t5, 20)):
        tokenizer = interop.load_tokenizer(folder)
        with pytest.warns(UserWarning, match=f"{folder.name} has room for .*'value on a beach'.$") as caught:
            prompt = "value " * count
            length = len(tokenizer.encode(prompt))
            tokenizer([prompt + "value on a beach", "short", prompt + "value on a beach"], max_length=length)
        assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"'unbrokenstring.* \.\.\. .*spaces'"):
        interop.load_tokenizer(clip)(["unbrokenstringwithoutanyspaces" * 100])
    with pytest.warns(UserWarning, match="a prompt has 90; its end is left out"):
        interop.load_tokenizer(clip)(["a" + " b" * 89])


def test_chunks_have_ends_of_their_own(clip):
    tokenizer = interop.load_tokenizer(clip)
    start, *content, end = tokenizer.encode("one two three four five six")
    room = 3
    tokens, mask, weights = tokenizer.chunked([[("one two ", 1.0), ("three four five six", 2.0)]], room + 2, 9)
    used = -(-len(content) // room)
    assert tokenizer.count_chunks([[("one two three four five six", 1.0)], [("", 1.0)]], room + 2) == used < 9
    for number in range(9):
        inner = content[number * room : (number + 1) * room]
        expected = [start, *inner, end, *[tokenizer.pad] * (room - len(inner))]
        assert tokens[0, number].tolist() == expected and mask[0, number].sum() == len(inner) + 2
    heavy = len(tokenizer.encode("three four five six")) - 2
    assert (weights == 2).sum() == heavy and (weights[~mask] == 1).all()
    for text in ODD:
        np.testing.assert_array_equal(
            tokenizer.chunked([[(text, 1.0)]], 20, 1, "").tokens[:, 0], tokenizer([text], 20).tokens
        )


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_fields_of_any_type_are_read_or_refused_in_one_sentence(name, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(name), tmp_path / "odd")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    fields = ("model_max_length", "tokenizer_class", "pad_token", "eos_token", "extra_ids")
    odd = (None, True, 5, -1, 10**13, 1e30, "", "x", [1], {"content": 5}, {"content": "<|endoftext|>", "lstrip": 1}, {})
    refused = 0
    for field in fields:
        for value in odd:
            file.write_text(json.dumps({**config, field: value}))
            try:
                interop.load_tokenizer(folder)
            except InvalidInput as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused >= 20
