"""Words with embeddings of their own: their vectors stand where their tokens are, and nothing else is changed."""

import json

import imageio.v3 as imageio
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax import interop, models, pictures, sample
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop import prompts
from diffusion_jax.interop.textual_inversion import WordEmbedding
from tests.interop.folders import drawn, sd_folder
from tests.interop.vocabularies import clip_folder

SIZE = (16, 16)
WIDTHS = (12, 10)
rng = np.random.default_rng(0)
VECTORS = tuple(rng.normal(size=(3, width)).astype(np.float32) for width in WIDTHS)


def text_encoder(folder, width, **fields):
    size = len(json.loads((folder / "vocab.json").read_text()))
    text = models.clip_text(
        "vit_l", vocab_size=size, width=width, depth=3, heads=2, mlp_width=24, projection=6, **fields
    )
    encoder = drawn("CLIPTextModelWithProjection", text, width)
    return prompts.text_encoder(encoder, interop.load_tokenizer(folder), 77, masked=False)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """With both encoders of SDXL, the second of which tells its end token as old configs do."""
    folder = clip_folder(tmp_path_factory.mktemp("clip"))
    size = len(json.loads((folder / "vocab.json").read_text()))
    encoders = [text_encoder(folder, WIDTHS[0], eos=size - 1), text_encoder(folder, WIDTHS[1], eos=2)]
    return interop.Pipeline(*[None] * len(interop.Pipeline._fields))._replace(
        prompter=prompts.double_clip_prompts(encoders, True)
    )


def hidden(encoder, tokens, rows):
    """What the encoder says of tokens, of which those of `rows` have these embeddings."""
    embedding = np.array(encoder.pretrained.params["embed"]["embedding"])
    spare = [i for i in range(len(embedding)) if i not in tokens][: len(rows)]
    embedding[spare] = list(rows.values())
    known = dict(zip(rows, spare, strict=True))
    ids = np.array([[known.get(token, token) for token in tokens]])
    params = {**encoder.pretrained.params, "embed": {"embedding": embedding}}
    return encoder.pretrained.network.apply(params, ids)


def test_a_word_of_several_vectors(pipeline, tmp_path):
    tensors = dict(zip(("clip_l", "clip_g"), VECTORS, strict=True))
    save_file(tensors, tmp_path / "toy.safetensors")
    before = jax.tree.map(np.array, [encoder.pretrained.params for encoder in pipeline.prompter.encoders])
    taught = interop.with_embeddings(pipeline, tmp_path / "toy.safetensors", word="<toy>")
    found = taught.prompter.main(["a <toy> of a cat"], SIZE)
    states, pooled = [], None
    for old, new, vectors in zip(pipeline.prompter.encoders, taught.prompter.encoders, VECTORS, strict=True):
        size = old.tokenizer.vocab_size
        plain = old.tokenizer.encode("a of a cat")
        ids = new.tokenizer.encode("a <toy> of a cat")
        assert ids == [*plain[:2], size, size + 1, size + 2, *plain[2:]]
        tokens = new.tokenizer(["a <toy> of a cat"], max_length=77).tokens[0].tolist()
        answer = hidden(old, tokens, {size + i: vector for i, vector in enumerate(vectors)})
        states.append(answer.hidden_states[-2])
        # The end of the prompt, not the highest id, which is now the word's.
        end = len(ids) - 1
        module = old.pretrained.network.module.clone(eos=tokens[end])
        last = models.encoders.encoder(module)
        pooled = (old, last, tokens, vectors, size)
        np.testing.assert_array_equal(new.tokenizer.encode("a cat"), old.tokenizer.encode("a cat"))
    np.testing.assert_allclose(found["context"], np.concatenate(states, axis=-1), atol=1e-5)
    old, last, tokens, vectors, size = pooled
    changed = old._replace(pretrained=old.pretrained._replace(network=last))
    expected = hidden(changed, tokens, {size + i: vector for i, vector in enumerate(vectors)}).pooled
    np.testing.assert_allclose(found["pooled"], expected, atol=1e-5)
    # Other prompts, and the pipeline that was given, are what they were.
    for name, value in pipeline.prompter.main(["a cat"], SIZE).items():
        np.testing.assert_allclose(taught.prompter.main(["a cat"], SIZE)[name], value, atol=1e-6)
    after = [encoder.pretrained.params for encoder in pipeline.prompter.encoders]
    jax.tree.map(np.testing.assert_array_equal, after, before)
    # Out as it came in.
    word = interop.embedding_of(taught, "<toy>")
    file = interop.save_embeddings(tmp_path / "again.safetensors", word)
    for name, value in tensors.items():
        np.testing.assert_array_equal(load_file(file)[name], value)
    assert interop.load_embeddings(file)[0].word == "<toy>"


def test_words_weigh_and_stand_beside_each_other(pipeline):
    words = [WordEmbedding(name, VECTORS) for name in ("<one>", "<two>")]
    taught = interop.with_embeddings(pipeline, words)
    encoder = taught.prompter.encoders[0]
    size = pipeline.prompter.encoders[0].tokenizer.vocab_size
    chunk = encoder.tokenizer.chunked([[("<two> ", 1.3), ("<one>", 1.0)]], 77)
    assert chunk.tokens[0, 0, 1:7].tolist() == [size + 3, size + 4, size + 5, size, size + 1, size + 2]
    np.testing.assert_allclose(chunk.weights[0, 0, 1:7], [1.3] * 3 + [1.0] * 3, rtol=1e-6)
    with pytest.raises(InvalidInput, match="word is '<one>', but the tokenizer has it already"):
        interop.with_embeddings(taught, words[:1])


SPELLED = {
    "diffusers": ({"<toy>": VECTORS[0]}, "x", ("<toy>", 3)),
    "one vector": ({"<toy>": VECTORS[0][0]}, "x", ("<toy>", 1)),
    "one vector a name": ({"<toy>": VECTORS[0][0], "<toy>_1": VECTORS[0][1]}, "x", ("<toy>", 2)),
    "web UI": ({"emb_params": VECTORS[0]}, "easynegative", ("easynegative", 3)),
    "web UI, older": ({"*": VECTORS[0].astype(np.float16)}, "bad-hands", ("bad-hands", 3)),
}


@pytest.mark.parametrize("spelling", SPELLED)
def test_files_of_one_encoder(spelling, tmp_path):
    tensors, stem, (word, count) = SPELLED[spelling]
    save_file(tensors, tmp_path / f"{stem}.safetensors")
    (found,) = interop.load_embeddings(tmp_path / f"{stem}.safetensors")
    assert found.word == word
    (vectors,) = found.vectors
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, VECTORS[0][:count], atol=1e-3 if "older" in spelling else 0)


def test_a_pipeline_of_one_encoder_makes_images_of_the_word(tmp_path):
    """As the words in whose place it stands; a folder of diffusers, in and out."""
    plain = interop.load_pipeline(sd_folder(tmp_path / "sd"))
    (encoder,) = plain.prompter.encoders
    ids = encoder.tokenizer.encode("red cube")[1:-1]
    rows = np.asarray(encoder.pretrained.params["embed"]["embedding"])[ids]
    (tmp_path / "toy").mkdir()
    interop.save_embeddings(tmp_path / "toy" / "learned_embeds.safetensors", WordEmbedding("<toy>", (rows,)))
    taught = interop.with_embeddings(plain, tmp_path / "toy")
    key = jax.random.key(0)
    found, expected = (
        interop.generate(pipe, key, [f"a {word} on a table"], num_steps=2)
        for pipe, word in ((taught, "<toy>"), (plain, "red cube"))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    command = [f"--pretrained={tmp_path / 'sd'}", "--prompt=a <toy> on a table", "--steps=2"]
    sample.main([*command, f"--embedding={tmp_path / 'toy'}", f"--output={tmp_path / 'a'}"])
    np.testing.assert_array_equal(imageio.imread(tmp_path / "a" / "images" / "00000.png"), pictures.to_uint8(found)[0])


def refused(tmp_path, tensors, **options):
    save_file(tensors, tmp_path / "x.safetensors")
    return interop.load_embeddings(tmp_path / "x.safetensors", **options)


MISTAKES = {
    "a matrix": ({"<a>": np.ones((2, 3, 4), "f")}, {}, r"<a> is \[2, 3, 4\], but vectors of a word are"),
    "nothing": ({"<a>": np.ones((0, 4), "f")}, {}, r"<a> is \[0, 4\]"),
    "NaN": ({"<a>": np.full(4, np.nan, "f")}, {}, "<a> holds numbers that are not finite"),
    "whole numbers": ({"<a>": np.ones(4, np.int32)}, {}, "<a> has dtype I32"),
    "several words": ({"<a>": np.ones(4, "f"), "<b>": np.ones(4, "f")}, {"word": "<c>"}, "holds several: <a>, <b>"),
    "other counts": ({"clip_l": np.ones((2, 4), "f"), "clip_g": np.ones((1, 4), "f")}, {}, r"holds \[2, 1\] vectors"),
    "another encoder": ({"clip_l": np.ones(4, "f"), "t5xxl": np.ones(4, "f")}, {}, "holds t5xxl beside clip_l"),
    "no word": ({"<a>": np.ones(4, "f")}, {"word": " "}, "word is ' ', but a word"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, tmp_path):
    tensors, options, message = MISTAKES[case]
    with pytest.raises(InvalidInput, match=message):
        refused(tmp_path, tensors, **options)


def test_pickles_other_widths_and_other_pipelines(pipeline, tmp_path):
    for name in ("x.pt", "y.bin", "learned_embeds.bin"):
        (tmp_path / name).write_bytes(b"\x80\x04")
    for path in (tmp_path / "x.pt", tmp_path / "y.bin", tmp_path):
        with pytest.raises(InvalidInput, match="it is a pickle, which can run code"):
            interop.load_embeddings(path)
    with pytest.raises(InvalidInput, match=r"has vectors \[3, 12\], but the text encoders .* width of 12 and 10"):
        interop.with_embeddings(pipeline, [WordEmbedding("<a>", VECTORS[:1])])
    labels = pipeline._replace(prompter=prompts.class_prompts(3))
    with pytest.raises(InvalidInput, match="this pipeline has no encoder of it"):
        interop.with_embeddings(labels, [WordEmbedding("<a>", VECTORS)])
    with pytest.raises(InvalidInput, match="word is '<a>', but the pipeline has no such word"):
        interop.embedding_of(pipeline, "<a>")
    for arguments, message in (
        ((tmp_path / "x.pt", WordEmbedding("<a>", VECTORS)), "the name of a .safetensors file"),
        ((tmp_path / "x.safetensors", *[WordEmbedding("<a>", VECTORS)] * 2), "or one word for two"),
        ((tmp_path / "x.safetensors", *[WordEmbedding("<a>", VECTORS[:1])] * 2), "each word may be there once"),
    ):
        with pytest.raises(InvalidInput, match=message):
            interop.save_embeddings(*arguments)
