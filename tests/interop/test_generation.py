"""What may be asked of a pipeline, in every form that is right, or one sentence; and what comes of it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import interop, models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop import generation, image_inputs, requests
from tests.interop.folders import SIZE, drawn, sd_folder

KEY = jax.random.key(0)
CALL = {"num_steps": 3, "scale": 1.0, "size": (SIZE, SIZE)}
RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
PICTURE = BYTES.astype(np.float32) / 127.5 - 1
MASK = np.zeros((SIZE, SIZE), bool)
MASK[4:12, 2:10] = True


def differ(images, others):
    """Of one program, so that nothing but what was asked makes a difference."""
    return (images != others).any()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return interop.load_pipeline(sd_folder(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def ask(pipeline):
    return lambda prompts="two cats", **options: np.asarray(
        interop.generate(pipeline, KEY, prompts, **{**CALL, **options})
    )


@pytest.fixture(scope="module")
def cats(ask):
    return ask()


@pytest.mark.parametrize("prompts", [["two cats"], ("two cats",), np.array(["two cats"]), iter(["two cats"])])
def test_one_prompt_is_a_list_of_one(ask, cats, prompts):
    assert cats.shape == (1, SIZE, SIZE, 3)
    np.testing.assert_array_equal(ask(prompts), cats)


@pytest.mark.parametrize("scale", [0, 0.5, np.float32(0.0), jnp.float32(1.0), ml_dtypes.bfloat16(1.0)])
def test_a_scale_of_one_or_less_is_the_prompt_alone(ask, cats, scale):
    np.testing.assert_array_equal(ask(scale=scale), cats)
    assert differ(ask("a house", scale=0.0), cats)


def test_a_negative_prompt_without_guidance_is_told(ask, cats):
    with pytest.warns(UserWarning, match="negative= changes nothing: there is no guidance with scale=0.5"):
        np.testing.assert_array_equal(ask(scale=0.5, negative="ugly"), cats)


def test_several_images_of_a_prompt(ask):
    each = ask(["a", "b"], images_per_prompt=2, scale=2.0, negative=["c", None])
    same = ask(["a", "a", "b", "b"], scale=2.0, negative=["c", "c", None, None])
    np.testing.assert_array_equal(each, same)
    assert differ(each[0], each[1])


IMAGE = {"image": PICTURE}
MISTAKES = {
    **{
        f"prompts {prompts!r}": ({"prompts": prompts}, expected)
        for prompts, expected in [
            (None, "prompts is None, but a text"),
            (b"a", "prompts is b'a'"),
            ({"a"}, "prompts is {'a'}"),
            ({"a": 1}, "prompts is {'a': 1}"),
            (1.5, "prompts is 1.5"),
            (True, "prompts is True"),
            ([], "at least one is needed"),
            ("", None),
            ([None], r"prompts\[0\] is None"),
            (["a", b"b"], r"prompts\[1\] is b'b'"),
            ([["a"]], r"prompts\[0\] is \['a'\]"),
            ([True], r"prompts\[0\] is True"),
            (3, "prompt is 3, but a text is needed"),
            ([3], "prompt is 3, but a text is needed"),
            ("\ud800", "surrogate"),
        ]
        if expected
    },
    "negatives": ({"negative": ["a", "b"]}, "one for all or one for each of the 1 prompts"),
    "no negatives": ({"negative": []}, "one for all or one for each"),
    "a negative number": ({"negative": 3}, "negative is 3"),
    "negatives of numbers": ({"negative": [3]}, r"negative\[0\] is 3"),
    **{f"scale {value!r}": ({"scale": value}, "scale is") for value in (np.nan, -1, "3", True, np.inf, [3.0], 10**400)},
    **{f"rescale {value!r}": ({"rescale": value}, "rescale is") for value in (np.nan, -1, 2, "1")},
    **{
        f"steps {value!r}": ({"num_steps": value}, "num_steps is")
        for value in (0, -1, 2.0, True, "4", 1001, 10**9, np.nan)
    },
    **{
        f"strength {value!r}": ({**IMAGE, "strength": value}, r"strength is .*, but it must be in \(0, 1\]")
        for value in (0, -0.5, 1.5, np.nan, "1", True)
    },
    "strength alone": ({"strength": 0.5}, "image= was not given"),
    "mask alone": ({"mask": MASK}, "image= was not given"),
    "fit alone": ({"fit": "crop"}, "image= was not given"),
    **{
        f"size {value!r}": ({"size": value}, expected)
        for value, expected in [
            ((15, 16), "multiples of 2, such as 16 x 16"),
            ((0, 16), r"size\[0\] is 0"),
            ((16.0, 16), r"size\[0\] is 16.0"),
            ((16,), "height and width are needed"),
            ("16x16", "height and width are needed"),
            ((16, 10**9), r"size\[1\] is 1000000000"),
            ((16, True), r"size\[1\] is True"),
        ]
    },
    "image of another size": ({**IMAGE, "size": (8, 8)}, "the image is 16 x 16: fit='crop' or fit='stretch'"),
    "image of no size": ({"image": PICTURE[:15], "size": None}, "multiples of 2"),
    "fit of another kind": ({**IMAGE, "size": (8, 8), "fit": "crops"}, "did you mean 'crop'"),
    "images too many": ({"image": np.stack([PICTURE] * 3)}, "the number of images is 3"),
    "image in 0..1": ({"image": BYTES / 255.0}, r"look like values in \[0, 1\]"),
    "image first": ({"image": np.moveaxis(PICTURE, -1, 0)}, "channels last"),
    "image flat": ({"image": PICTURE[..., 0]}, "one picture"),
    "image NaN": ({"image": np.full((SIZE, SIZE, 3), np.nan)}, "not finite"),
    "images of two sizes": ({"image": [PICTURE, PICTURE[:8]]}, "the sizes of image"),
    "image of words": ({"image": [["a", "b"], ["c"]]}, "image is"),
    "image nowhere": ({"image": "/nowhere.png"}, "/nowhere.png"),
    "mask of another shape": ({**IMAGE, "mask": np.ones((4, 4), bool)}, r"mask.shape is \(4, 4\)"),
    "mask beyond": ({**IMAGE, "mask": np.full((SIZE, SIZE), 1.5)}, "the range of mask"),
    "mask NaN": ({**IMAGE, "mask": np.full((SIZE, SIZE), np.nan)}, "the range of mask"),
    "mask of tokens": ({**IMAGE, "mask": np.full((SIZE, SIZE), 7)}, "an array of int64"),
    "mask coloured": ({**IMAGE, "mask": Image.fromarray(BYTES)}, "coloured"),
    "masks too many": ({**IMAGE, "mask": np.stack([MASK] * 3)}, "the number of masks is 3"),
    "noise's shape": ({"noise": np.zeros((1, 2, 2, 4))}, "noise.shape"),
    "noise of bytes": ({"noise": np.zeros((1, 8, 8, 4), np.uint8)}, "noise.dtype"),
    "noise NaN": ({"noise": np.full((1, 8, 8, 4), np.nan)}, "not finite"),
    "noise ragged": ({"noise": [[1], [1, 2]]}, "noise"),
    "cond": ({"cond": [1]}, "a dict of names and arrays"),
    "index too long": ({"index": [0, 1]}, "1 whole numbers are needed"),
    "index of floats": ({"index": [0.0]}, "1 whole numbers are needed"),
    "index negative": ({"index": [-1]}, "indices lie in"),
    **{f"chunks {v!r}": ({"chunks": v}, "chunks is") for v in (0, -1, 1.0, "all", None, 65, True)},
    "too many chunks": ({"chunks": "auto", "prompts": "word " * 10_000}, "64 are the most: shorten it"),
    "weighting": ({"weighting": "a111"}, "did you mean 'a1111'"),
    "weighting of another kind": ({"weighting": ["a1111"]}, "weighting is"),
    "clip_skip": ({"clip_skip": 7}, "clip_skip is 7, but a number of layers in 0 .. 1"),
    **{f"images {v!r}": ({"images_per_prompt": v}, "images_per_prompt is") for v in (0, -1, 1.0, True, None)},
    **{
        f"key {name}": ({"key": key}, "one typed key is needed")
        for name, key in [
            ("int", 0),
            ("old", jax.random.PRNGKey(0)),
            ("several", jax.random.split(KEY, 2)),
            ("None", None),
        ]
    },
    "refiner": ({"refiner": "folder"}, "a pipeline of load_pipeline"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_sentence(name, pipeline):
    options, message = MISTAKES[name]
    options = {"key": KEY, "prompts": "a", **CALL, **options}
    with pytest.raises(InvalidInput, match=message) as error:
        interop.generate(pipeline, options.pop("key"), options.pop("prompts"), **options)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_a_picture_is_the_same_in_every_form(ask, tmp_path):
    Image.fromarray(BYTES).save(tmp_path / "picture.png")
    forms = {
        "floats": PICTURE,
        "bytes": BYTES,
        "16 bits": BYTES.astype(np.uint16) * 257,
        "doubles": PICTURE.astype(np.float64),
        "JAX": jnp.asarray(PICTURE),
        "Pillow": Image.fromarray(BYTES),
        "file": tmp_path / "picture.png",
        "opaque": np.concatenate([BYTES, np.full((SIZE, SIZE, 1), 255, np.uint8)], -1),
    }
    for name, form in forms.items():
        np.testing.assert_allclose(image_inputs.read_images(form)[0], PICTURE, atol=1e-6, err_msg=name)
    both = image_inputs.read_images([Image.fromarray(BYTES), BYTES[::-1]])
    np.testing.assert_allclose(both, np.stack([PICTURE, PICTURE[::-1]]), atol=1e-6)
    np.testing.assert_array_equal(image_inputs.read_images(np.stack([BYTES, BYTES[::-1]])), both)
    grey = image_inputs.read_images(PICTURE[..., :1])
    np.testing.assert_array_equal(grey[0], np.repeat(PICTURE[..., :1], 3, -1))
    # One of several may well be bright alone.
    assert image_inputs.read_images(np.stack([PICTURE, abs(PICTURE)])).min() < 0
    expected = ask(image=PICTURE, strength=0.5)
    np.testing.assert_allclose(ask(image=Image.fromarray(BYTES), strength=0.5, size=None), expected, atol=1e-5)
    np.testing.assert_allclose(ask(image=BYTES[None], strength=0.5), expected, atol=1e-5)


def test_a_mask_is_the_same_in_every_form(tmp_path):
    grey = (MASK * 255).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "mask.png")
    forms = {
        "bool": MASK,
        "bytes": grey,
        "bits": MASK.astype(np.uint8),
        "numbers": MASK.astype(np.int64),
        "floats": MASK.astype(np.float64),
        "channel": MASK[..., None],
        "batch": MASK[None],
        "Pillow": Image.fromarray(grey),
        "colour": Image.fromarray(np.dstack([grey] * 3)),
        "file": tmp_path / "mask.png",
        "list": [MASK],
    }
    for name, form in forms.items():
        np.testing.assert_array_equal(image_inputs.read_masks(form, MASK.shape), MASK[None], err_msg=name)
    soft = image_inputs.read_masks(Image.fromarray(grey // 255 * 102), MASK.shape)
    np.testing.assert_allclose(soft[0], MASK * 0.4, atol=1e-6)


def test_what_is_cropped_and_stretched():
    wide = np.arange(6 * 12 * 3, dtype=np.float32).reshape(1, 6, 12, 3) / 200 - 0.5
    np.testing.assert_array_equal(image_inputs.fitted(wide, (6, 6), "crop"), wide[:, :, 3:9])
    np.testing.assert_array_equal(image_inputs.fitted(wide, (6, 12), "crop"), wide)
    assert image_inputs.fitted(wide, (4, 4), "stretch").shape == (1, 4, 4, 3)
    halves = np.repeat(np.repeat(np.eye(2, dtype=np.float32), 8, 0), 8, 1)[None]
    np.testing.assert_array_equal(image_inputs.fitted_masks(halves, (4, 4), "stretch")[0], halves[0, 2::4, 2::4])
    assert set(np.unique(image_inputs.fitted_masks(halves, (5, 5), "crop"))) == {0.0, 1.0}
    assert 0.5 in np.round(image_inputs.fitted_masks(halves * 0.5, (5, 5), "crop"), 3)
    assert requests.next_smaller((30, 47), 8) == (24, 40) and requests.next_smaller((3, 9), 8) == (8, 8)


def test_a_picture_that_fits_is_asked_for(ask):
    larger = np.concatenate([PICTURE[:, :4], PICTURE, PICTURE[:, :4]], axis=1)
    expected = ask(image=PICTURE, strength=0.5)
    np.testing.assert_allclose(ask(image=larger, strength=0.5, fit="crop"), expected, atol=1e-5)
    assert ask(image=larger[:15], strength=0.5, fit="stretch", size=None).shape == (1, 14, 24, 3)


def test_a_soft_mask_lies_between_keeping_and_painting(ask):
    hard = ask(image=PICTURE, mask=MASK)
    np.testing.assert_array_equal(ask(image=PICTURE, mask=MASK.astype(np.float32)), hard)
    kept, painted = (ask(image=PICTURE, mask=np.full_like(MASK, value)) for value in (False, True))
    # The time falls to 2/3, 1/3 and 0: what is released at 1/2 is free in the last step, at 0.01 in none.
    distance = [
        np.abs(ask(image=PICTURE, mask=np.full(MASK.shape, value)) - kept).mean() for value in (0.0, 0.01, 0.5, 1.0)
    ]
    assert distance[0] == 0 and distance[0] < distance[1] < distance[2] < distance[3]
    np.testing.assert_array_equal(ask(image=PICTURE, mask=np.ones(MASK.shape)), painted)


def test_chunks_and_weights_reach_the_network(pipeline, ask, cats):
    program = generation.sampling_program([pipeline])
    long, other = "value of the name " * 30 + "beach", "name of the value " * 30
    first = ask(long, chunks="auto", scale=2.0)
    before = program._cache_size()
    assert differ(ask(other, chunks="auto", scale=2.0, negative="x"), first)
    np.testing.assert_array_equal(ask(long, chunks=2, scale=2.0), first)
    assert program._cache_size() == before
    # A long negative prompt brings the other side to its length.
    assert ask("a", negative=long, chunks="auto", scale=2.0).shape == first.shape
    assert program._cache_size() == before
    np.testing.assert_array_equal(ask(weighting="a1111", chunks="auto"), cats)
    assert differ(ask("two (cats:1.5)", weighting="comfyui"), cats)
    assert differ(ask(clip_skip=1), cats)


def test_a_refiner_takes_over(pipeline, ask, cats):
    params = drawn("UNet2DConditionModel", pipeline.network.network, 9).params
    refiner = pipeline._replace(params=params)
    alone = np.asarray(interop.generate(refiner, KEY, "two cats", **CALL))
    both = {time: ask(refiner=refiner, handover=time) for time in (0.0, 0.3, 0.5, 1.0)}
    np.testing.assert_allclose(both[0.0], cats, atol=1e-5)
    np.testing.assert_allclose(both[1.0], alone, atol=1e-5)
    moved = [np.abs(both[time] - cats).max() for time in (0.0, 0.3, 0.5, 1.0)]
    assert moved[0] < 1e-5 < moved[1] < moved[2] < moved[3]
    np.testing.assert_allclose(ask(refiner=pipeline, handover=0.5), cats, atol=1e-5)
    program = generation.sampling_program([pipeline, refiner])
    before = program._cache_size()
    ask("a house", refiner=refiner, handover=0.7)
    assert program._cache_size() == before
    for change, message in (
        ({"refiner": pipeline._replace(channels=3)}, "the refiner's channels"),
        ({"refiner": refiner, "handover": 1.5}, "handover is 1.5"),
        ({"refiner": refiner, "handover": np.nan}, "handover is nan"),
        ({"refiner": pipeline._replace(inpaints=True)}, "takes no refiner"),
    ):
        with pytest.raises(InvalidInput, match=message):
            ask(**change)


def test_a_network_of_distilled_guidance_is_told_the_scale(tmp_path):
    conditions = (models.context("none", 12), models.guidance_scale(8))
    pipeline = interop.load_pipeline(sd_folder(tmp_path, conditions=conditions))

    def ask(scale, **options):
        return np.asarray(interop.generate(pipeline, KEY, "two cats", **{**CALL, "scale": scale}, **options))

    weak = ask(1.0)
    program = generation.sampling_program([pipeline])
    assert program._cache_size() == 1 and differ(ask(8.0), weak)
    with pytest.warns(UserWarning, match="negative= changes nothing"):
        np.testing.assert_array_equal(ask(1.0, negative="ugly"), weak)
    # One program, which asks the network once a step.
    assert program._cache_size() == 1
