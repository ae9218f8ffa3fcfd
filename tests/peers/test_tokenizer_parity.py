"""Prompts become the same tokens as in transformers, from the same files.

Needs the peers extra: `make test-peers`.
"""

import numpy as np
import pytest

from diffusion_jax import interop
from tests.interop.vocabularies import ODD, clip_folder, t5_folder

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers


def assert_same_tokens(folder, peer, lengths):
    ours = interop.load_tokenizer(folder)
    for length in lengths:
        found = ours(ODD, max_length=length)
        expected = peer(ODD, padding="max_length", truncation=True, max_length=length, return_tensors="np")
        for i, prompt in enumerate(ODD):
            assert found.tokens[i].tolist() == expected["input_ids"][i].tolist(), prompt
        np.testing.assert_array_equal(found.mask, expected["attention_mask"] != 0)
    assert ours.max_length == peer.model_max_length
    return ours


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_clip(pad, tmp_path):
    folder = clip_folder(tmp_path / "files", pad=pad)
    peer = transformers.CLIPTokenizer.from_pretrained(folder)
    assert_same_tokens(folder, peer, (77, 8, 3))
    peer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    assert_same_tokens(tmp_path / "saved", peer, (77,))


def test_t5(tmp_path):
    folder = t5_folder(tmp_path / "files")
    peer = transformers.T5Tokenizer.from_pretrained(folder)
    assert_same_tokens(folder, peer, (120, 8, 2))
    peer.save_pretrained(tmp_path / "saved")
    assert_same_tokens(tmp_path / "saved", peer, (120,))
