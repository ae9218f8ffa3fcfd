"""`diffusion-jax encode`: what the autoencoder makes of each picture, kept once, gone on with, never mixed."""

import warnings

import jax
import numpy as np
import pytest

from diffusion_jax import data, encode, interop
from diffusion_jax.command import run_command
from diffusion_jax.config import load
from diffusion_jax.config.overrides import apply_overrides
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import check_training, decoded, prepare
from tests.drawings import draw_folder
from tests.interop.folders import SIZE, sd_folder

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("encode")
    sd_folder(root / "sd")
    draw_folder(root / "captioned", COUNT)
    draw_folder(root / "classes", COUNT, classes=True)
    return root


def run(folder, pictures, output, *flags):
    command = [f"--pretrained={folder / 'sd'}", f"--data={folder / pictures}", f"--output={output}", "--on-error=skip"]
    return run_command(
        encode.main, [*command, f"--size={SIZE}", "--shard-size=8", "--batch-size=1", "--no-progress", *flags]
    )


@pytest.fixture(scope="module")
def latents(folder):
    assert run(folder, "captioned", folder / "latents") == 0
    return folder / "latents"


def pictures(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data.captioned_folder(
            str(folder / "captioned"), size=SIZE, background="white", on_error="skip", held_out=0.1
        )


def stored(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*")}


def test_each_picture_is_encoded_once_in_its_place_with_its_caption(folder, latents):
    made, shown = data.latents(str(latents)), pictures(folder)
    pretrained = interop.load_pretrained(folder / "sd" / "vae")
    told = encode.find_text_encoder(str(folder / "sd"), None)
    for part, source in ((made, shown), (made.held_out, shown.held_out)):
        assert len(part) == len(source)
        for row in (0, len(source) - 1):
            wanted = jax.jit(pretrained.network.encode)(pretrained.params, source[row]["x0"][None])[0]
            np.testing.assert_allclose(part[row]["x0"], wanted, rtol=1e-4, atol=1e-5)
            text = told.encode([source.captions[row]])
            np.testing.assert_allclose(part[row]["cond"]["context"], text["context"][0], atol=1e-5)
            np.testing.assert_array_equal(part[row]["cond"]["context_mask"], text["context_mask"][0])


def test_an_interrupted_command_goes_on_and_ends_with_the_same_bytes(folder, latents, capsys):
    before = stored(latents)
    (latents / "train" / "00001-of-00003.x0.npy").unlink()
    with pytest.raises(InvalidInput, match=r"holds 13 of 21 examples: run again what was making them"):
        data.latents(str(latents))
    path = latents / "train" / "00002-of-00003.x0.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert run(folder, "captioned", latents) == 0
    out = capsys.readouterr().out
    assert f"{path} is damaged and is made again." in out and "Wrote 2 of " in out and "were there" in out
    assert stored(latents) == before


@pytest.mark.parametrize(
    "pictures, flag, words",
    [
        ("captioned", "--size=32", r"pictures.size \(was [16, 16], is [32, 32]\)"),
        ("captioned", "--text-encoder=none", "text.family (was 'CLIPTextModel', is 'absent')"),
        ("classes", "--held-out=0.2", "class_names (was None"),
    ],
)
def test_other_latents_are_not_mixed_in(folder, latents, capsys, pictures, flag, words):
    before = stored(latents)
    assert run(folder, pictures, latents, flag) == 2
    assert words.replace("\\", "") in capsys.readouterr().err
    assert stored(latents) == before


def test_a_run_on_latents_shows_pictures(folder, latents, tmp_path, capsys):
    tiny = ["model.width=16", "model.depth=1", "model.heads=2", "train.batch_size=8"]
    experiment = prepare(apply_overrides(load(f"configs/latents.py:{latents}"), tiny))
    assert experiment.shape == (8, 8, 4)
    check_training(experiment)
    pretrained = interop.load_pretrained(folder / "sd" / "vae")
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
    wanted = jax.jit(pretrained.network.decode)(pretrained.params, x)
    np.testing.assert_allclose(decoded(experiment, x), wanted, atol=1e-4)
    other = interop.save_pretrained(
        tmp_path / "other", pretrained._replace(params=jax.tree.map(lambda leaf: 2 * leaf, pretrained.params))
    )
    experiment.config.sampling.decoder = str(other)
    with pytest.raises(InvalidInput, match="not the one that made the latents"):
        decoded(experiment, x)


def test_classes_are_those_of_the_folder(folder, tmp_path):
    assert run(folder, "classes", tmp_path / "latents", "--held-out=0") == 0
    source = data.latents(str(tmp_path / "latents"))
    assert source.class_names == ("circle", "square", "triangle") and source.held_out is None
    assert [int(source[row]["cond"]["label"]) for row in range(8)] == [0] * 8
    config = load(f"configs/latents.py:{tmp_path / 'latents'}")
    assert config.model.conditions[0]["num_classes"] == 3 and config.held_out is None
    assert config.train.validate_every is None


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--size=17", "both sides must be multiples of 2"),
        ("--size=big", "--size is 'big', but a side, or HEIGHTxWIDTH"),
        ("--data=nowhere", "'nowhere' does not exist"),
        ("--text-encoder=nowhere", "--text-encoder is 'nowhere'"),
        ("--batch-size=0", "--batch-size is 0"),
        ("--on-error=refuse", "cannot be used: '008.png'"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_written(folder, tmp_path, capsys, flag, words):
    assert run(folder, "captioned", tmp_path / "latents", flag) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "latents").exists()
