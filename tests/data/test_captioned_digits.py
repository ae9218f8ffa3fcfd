"""Digits with their names: texts round-trip through vectors and noise, pairs are true, and untrue ones are caught."""

import numpy as np
import pytest

from diffusion_jax import config, data, metrics
from diffusion_jax.data import captioned_digits as captioned
from diffusion_jax.errors import InvalidInput


@pytest.fixture(scope="module")
def source():
    return data.named_digits("test", condition=True)


@pytest.mark.parametrize("embedding_dim", [8, 16, 32])
@pytest.mark.parametrize("text_length", [5, 8])
def test_every_name_round_trips(embedding_dim, text_length):
    tokens = np.stack([captioned.encode(name, text_length) for name in captioned.NAMES])
    vectors = captioned.embed(tokens, embedding_dim)
    assert vectors.shape == (10, text_length, embedding_dim) and set(np.unique(vectors)) == {-1.0, 1.0}
    assert captioned.decode(vectors) == list(captioned.NAMES)
    np.testing.assert_array_equal(captioned.values(captioned.decode(vectors)), np.arange(10))
    tokenizer = captioned.tokenizer(text_length)
    assert [tokenizer.decode(tokenizer.encode(name)) for name in captioned.NAMES] == list(captioned.NAMES)


def test_texts_may_stay_characters(source):
    plain = data.named_digits("test", text_length=5, embedding_dim=0)
    assert plain.x0["text"].dtype == np.int32
    np.testing.assert_array_equal(plain.x0["text"], source.cond["tokens"])
    np.testing.assert_array_equal(plain.x0["image"], source.x0["image"])


def test_the_vectors_of_characters_are_far_apart_and_white():
    table = captioned.embedding_table(8)
    assert table.shape == (16, 8) and len(captioned.CHARACTERS) == 16
    np.testing.assert_array_equal(table.mean(0), 0)
    np.testing.assert_array_equal(table.T @ table / 16, np.eye(8))
    distances = (table[:, None] != table[None]).sum(-1)[~np.eye(16, dtype=bool)]
    assert distances.min() == 4


def test_decoding_survives_noise(source):
    noise = np.random.default_rng(0).standard_normal(source.x0["text"].shape)
    texts = captioned.decode(0.8 * source.x0["text"] + 0.3 * noise)
    assert np.mean(captioned.values(texts) == source.cond["label"]) == 1.0
    assert np.mean(captioned.values(captioned.decode(noise)) >= 0) < 0.01


def test_texts_that_are_no_names_are_told():
    odd = captioned.embed(np.stack([captioned.encode(t) for t in ("ze_ro", "oen", "five", "")]))
    assert captioned.decode(odd) == ["ze_ro", "oen", "five", ""]
    assert captioned.values(captioned.decode(odd)).tolist() == [-1, -1, 5, -1]


def test_pairs_are_true_and_the_verifier_catches_untrue_ones(source):
    judge = metrics.feature_network("digits").logits
    x0, label = source.x0, source.cond["label"]
    true = captioned.verify(x0["image"], x0["text"], judge, label)
    assert true["spelled"] == true["text"] == 1.0 and true["agreement"] == true["image"] > 0.97
    shuffled = np.random.default_rng(0).permutation(len(label))
    wrong = captioned.verify(x0["image"], x0["text"][shuffled], judge, label)
    assert wrong["spelled"] == 1.0 and wrong["agreement"] < 0.2 and wrong["text"] < 0.2
    assert wrong["image"] == true["image"]
    logits = judge(x0["image"])
    assert captioned.verify(x0["image"], x0["text"], logits)["agreement"] == true["agreement"]


def test_splits_share_no_image_and_texts_belong_to_the_labels(source):
    train = data.named_digits("train", condition=True)
    assert len(train) == 1402 and len(source) == 395
    assert not {x.tobytes() for x in train.x0["image"]} & {x.tobytes() for x in source.x0["image"]}
    texts = captioned.decode(train.x0["text"])
    assert texts == [train.class_names[i] for i in train.cond["label"]]
    assert [train.tokenizer.decode(row) for row in train.cond["tokens"][:50]] == texts[:50]


def test_it_is_made_from_a_config_and_goes_through_the_pipeline():
    source = config.build(config.call("data.named_digits", text_length=6))
    assert source.shape == {"image": (8, 8, 1), "text": (6, 8)}
    batch = next(data.pipeline(source, 16))
    assert {k: v.shape for k, v in batch["x0"].items()} == {"image": (16, 8, 8, 1), "text": (16, 6, 8)}
    assert "cond" not in batch and all(np.abs(v).max() <= 1 for v in batch["x0"].values())


@pytest.mark.parametrize("wrong", [{"split": "val"}, {"text_length": 4}, {"embedding_dim": 4}])
def test_impossible_worlds_are_refused(wrong):
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        data.named_digits(**wrong)


@pytest.mark.parametrize("text", ["Zero", "seventy"])
def test_texts_outside_of_the_alphabet_are_refused(text):
    with pytest.raises(InvalidInput, match=text):
        captioned.encode(text)
