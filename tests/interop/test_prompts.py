"""Prompts in chunks, with weights, by fewer layers of CLIP: by arithmetic on the encoders' own answers; and labels."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import interop, models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop import prompts
from diffusion_jax.interop.prompt_weights import weighted, weighted_parts
from tests.interop.folders import drawn
from tests.interop.vocabularies import clip_folder, t5_folder

SIZE = (16, 16)
SHORT = "a red cube"
LONG = "value of the name " * 40 + "on a beach"


def read(**fields):
    return prompts.PLAIN._replace(**fields)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = clip_folder(tmp_path_factory.mktemp("clip"))
    size = len(json.loads((folder / "vocab.json").read_text()))
    text = models.clip_text(
        "vit_l", vocab_size=size, width=12, depth=3, heads=2, eos=size - 1, mlp_width=24, projection=6
    )
    pretrained = drawn("CLIPTextModelWithProjection", text, 2)
    return prompts.text_encoder(pretrained, interop.load_tokenizer(folder), 77, masked=False)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
                ("sky", 1.4641), (".", 1.1),
            ],
        ),
        ("", [("", 1.0)]),
        ("()", [("", 1.0)]),
        ("((word))", [("word", 1.21)]),
        ("[word]", [("word", 1 / 1.1)]),
        ("[[word]", [("word", 1 / 1.21)]),
        ("(word:1.3)", [("word", 1.3)]),
        ("(word: -.5 )", [("word", -0.5)]),
        ("(word:0)", [("word", 0.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:nan) :2) )", [("a:nan", 1.1), (" :2) )", 1.0)]),
        ("(a[b) c]", [("a", 1.1), ("b c]", 1.0)]),
        (r"a\b \\ c\:", [(r"a\b \ c\:", 1.0)]),
        ("e\u0301 (🐈:2)", [("e\u0301 ", 1.0), ("🐈", 2.0)]),
    ],
)  # fmt: skip
def test_brackets_weigh(prompt, expected):
    found = weighted_parts(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_deep_brackets_are_bounded():
    assert 0 <= weighted_parts("[" * 50_000 + "x" + ")" * 50_000)[0][1] < 1e-300
    with pytest.raises(InvalidInput, match=r"must lie in -1000 \.\. 1000"):
        weighted_parts("(" * 50_000 + "x")
    with pytest.raises(InvalidInput, match="must lie in"):
        weighted_parts("(x:" + "9" * 400 + ")")


def test_weights_of_one_change_nothing_bit_for_bit(encoder):
    expected = encoder.encode([SHORT, ""], prompts.PLAIN)
    for rule in ("a1111", "comfyui"):
        for text in (SHORT, "a (red:1) cube", r"a red cube"):
            found = encoder.encode([text, ""], read(weighting=rule))
            np.testing.assert_array_equal(found.hidden, expected.hidden)
            np.testing.assert_array_equal(found.pooled, expected.pooled)
    # One row of a batch has weights, the other has none.
    other = encoder.encode(["a (red:1.5) cube", ""], read(weighting="a1111"))
    np.testing.assert_array_equal(other.hidden[1], expected.hidden[1])


def test_a_weight_is_that_of_its_tokens_alone(encoder):
    z, empty = (np.asarray(encoder.encode([text], prompts.PLAIN).hidden[0]) for text in (SHORT, ""))
    count = {text: len(encoder.tokenizer.encode(text)) - 2 for text in ("a", "red", "cube")}
    weights = np.ones((77, 1), np.float32)
    weights[1 + count["a"] :][: count["red"]] = 1.5
    found = encoder.encode(["a (red:1.5) cube"], read(weighting="comfyui")).hidden[0]
    np.testing.assert_allclose(found, empty + weights * (z - empty), atol=1e-5)
    found = encoder.encode(["a (red:1.5) cube"], read(weighting="a1111")).hidden[0]
    np.testing.assert_allclose(found, weights * z * z.mean() / (weights * z).mean(), atol=1e-5)
    assert np.abs(found - z).max() > 0.01


def test_a_mean_of_zero_is_no_division():
    z = jnp.asarray([[[1.0], [-1.0]]])
    assert np.isfinite(weighted("a1111", z, jnp.asarray([[2.0, 2.0]]), z[0])).all()


def test_a_long_prompt_is_its_chunks_one_behind_the_other(encoder):
    tokenizer = encoder.tokenizer
    ids = tokenizer.encode(LONG)
    start, content, end = ids[:1], ids[1:-1], ids[-1:]
    assert encoder.chunks([LONG, SHORT], prompts.PLAIN) == -(-len(content) // 75) == 3
    found = encoder.encode([LONG, SHORT], read(chunks=3))
    assert found.hidden.shape == (2, 3 * 77, 12) and found.mask.shape == (2, 3 * 77)
    params, network = encoder.pretrained.params, encoder.pretrained.network
    pad = [tokenizer.pad]
    rows = [start + content[at : at + 75] + end for at in range(0, len(content), 75)]
    rows = np.asarray([row + pad * (77 - len(row)) for row in rows], np.int32)
    expected = network.apply(params, jnp.asarray(rows), None)
    np.testing.assert_allclose(found.hidden[0], expected.hidden.reshape(3 * 77, 12), atol=2e-5)
    np.testing.assert_allclose(found.pooled[0], expected.pooled[0], atol=2e-5)
    empty = encoder.encode([""], prompts.PLAIN).hidden[0]
    for at in (77, 2 * 77):
        np.testing.assert_allclose(found.hidden[1, at : at + 77], empty, atol=2e-5)


def test_what_has_no_place_is_named(encoder):
    with pytest.warns(UserWarning, match=r"room for 75 tokens.*on a beach'\. chunks='auto'") as caught:
        encoder.encode([LONG, LONG], prompts.PLAIN)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="room for 150 tokens.*on a beach"):
        encoder.encode([LONG], read(chunks=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([SHORT, " ".join(["a"] * 75)], prompts.PLAIN)
        encoder.encode([LONG], read(chunks=3))


def test_layers_left_out(encoder):
    module, params = encoder.pretrained.network, encoder.pretrained.params
    tokens = jnp.asarray(encoder.tokenizer([SHORT], 77).tokens)
    states = module.apply(params, tokens, None).hidden_states
    single, double = prompts.clip_prompts(encoder), prompts.double_clip_prompts([encoder, encoder], True)
    for skipped in (0, 1, 2):
        found = single.main([SHORT], SIZE, read(clip_skip=skipped))["context"]
        np.testing.assert_allclose(found, module.final_norm(params, states[-1 - skipped]), atol=1e-5)
    for skipped in (0, 1):
        found = double.main([SHORT], SIZE, read(clip_skip=skipped))["context"]
        np.testing.assert_allclose(found, jnp.concatenate([states[-2 - skipped]] * 2, -1), atol=1e-5)
    # As in diffusers: what is not asked for is read to the end.
    for prompter in (single, double):
        np.testing.assert_array_equal(
            prompter.null([SHORT], SIZE, read(clip_skip=1))["context"], prompter.null([SHORT], SIZE)["context"]
        )
    for prompter, most in ((single, 2), (double, 1)):
        for skipped in (-1, most + 1, 1.0, True, "1"):
            with pytest.raises(InvalidInput, match=f"clip_skip is .*0 .. {most} is needed"):
                prompter.main([SHORT], SIZE, read(clip_skip=skipped))


def test_both_encoders_read_chunks_and_weights(encoder):
    prompter = prompts.double_clip_prompts([encoder, encoder], zero_empty=True)
    reading = read(weighting="comfyui", chunks=prompter.chunks([f"({LONG}:1.2)"], read(weighting="comfyui")))
    main, null = (side([f"({LONG}:1.2)", None][i : i + 1], SIZE, reading) for i, side in enumerate(prompter[:2]))
    assert main["context"].shape == null["context"].shape == (1, 3 * 77, 24)
    assert not np.asarray(null["context"]).any() and not np.asarray(null["pooled"]).any()
    np.testing.assert_array_equal(main["context"][..., :12], main["context"][..., 12:])


def test_t5_reads_one_chunk_without_weights(tmp_path):
    network = models.t5_encoder("small", vocab_size=500, width=12, heads=2, head_dim=4, mlp_width=24)
    pretrained = drawn("T5EncoderModel", network, 1)
    encoder = prompts.text_encoder(pretrained, interop.load_tokenizer(t5_folder(tmp_path)), 20, masked=True)
    prompter = prompts.t5_prompts(encoder, sized=False)
    assert prompter.chunks([LONG], prompts.PLAIN) == 1
    with pytest.warns(UserWarning, match="room for 19 tokens.*on a beach'\\.$"):
        prompter.main([LONG], SIZE)
    for fields in ({"chunks": 2}, {"weighting": "a1111"}, {"clip_skip": 1}):
        with pytest.raises(InvalidInput, match="are of CLIP"):
            prompter.main([SHORT], SIZE, read(**fields))


NAMES = {"0": "ant, emmet", "1": "crane", "2": "bee", "3": "crane, jib"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (2, 2), ("2", 2), (" 2 ", 2), (np.int64(1), 1), ("bee", 2), (" emmet", 0), ("ant, emmet", 0), ("jib", 3),
        ("\N{ARABIC-INDIC DIGIT TWO}", 2),
        (5, "label is 5, but the network knows the classes 0 to 4"), ("-1", "label is -1"), ("99", "label is 99"),
        ("\N{SUPERSCRIPT TWO}", "no class of the network is called so"), ("1.0", "no class"), ("9" * 5000, "no class"),
        (1.0, "number or the name of a class"), (True, "number or the name"), (None, "number or the name"),
        ("be", "did you mean 'bee'"), ("crane", "it names the classes 1, 3: give the number"), ("", "no class"),
    ],
)  # fmt: skip
def test_classes_by_number_and_name(prompt, expected):
    prompter = prompts.class_prompts(5, NAMES)
    if isinstance(expected, int):
        assert prompter.main([prompt], SIZE)["label"].tolist() == [expected]
    else:
        with pytest.raises(InvalidInput, match=expected):
            prompter.main([prompt], SIZE)


@pytest.mark.parametrize("names", [["ant"], {"x": "ant"}, {"0": 3}, "ant"])
def test_names_of_classes_of_another_kind_are_told(names):
    with pytest.raises(InvalidInput, match="id2label"):
        prompts.class_prompts(5, names)
