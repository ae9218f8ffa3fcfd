"""`python -m diffusion_jax.sample --pretrained`: every flag, what is told, what is never overwritten."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import sample
from diffusion_jax.command import run_command, size_in_pixels
from diffusion_jax.commands import generate
from diffusion_jax.errors import InvalidInput
from tests.interop.folders import SIZE, sd_folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return sd_folder(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "start.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)).save(path)
    return path


def pngs(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").glob("*.png")}


def test_it_writes_pictures_and_what_made_them_and_overwrites_no_others(sd, start, tmp_path, capsys):
    output = tmp_path / "a"
    command = [
        f"--pretrained={sd}", "--prompt=a cat", "--prompt=a dog", "--images-per-prompt=2", "--steps=2",
        f"--size={SIZE}x{SIZE}", "--solver=ddim", f"--image={start}", "--strength=0.5", f"--output={output}",
    ]  # fmt: skip
    assert run_command(sample.main, command) == 0
    assert (
        f"start.png is 30 x 40; it is cropped in the middle and resized to {SIZE} x {SIZE}" in capsys.readouterr().out
    )
    first = pngs(output)
    assert sorted(first) == [f"{i:05d}.png" for i in range(4)]
    assert Image.open(output / "images" / "00000.png").size == (SIZE, SIZE)
    told = json.loads((output / "generated.json").read_text())
    assert [image["prompt"] for image in told["images"]] == ["a cat", "a cat", "a dog", "a dog"]
    assert told["size"] == [SIZE, SIZE] and told["solver"] == "ddim"

    for other, words in ((["--seed=1"], "made with another seed"), (["--strength=1"], "another strength"), ([], None)):
        assert run_command(sample.main, [*command, *other]) == (0 if words is None else 2)
        assert words is None or words in capsys.readouterr().err
        assert pngs(output) == first
    Image.new("RGB", (SIZE, SIZE)).save(output / "images" / "00001.png")
    assert run_command(sample.main, command) == 2
    assert "00001.png does not say what made it: empty" in capsys.readouterr().err
    (output / "images" / "00001.png").write_bytes(b"\x89PNG")
    assert run_command(sample.main, command) == 0
    assert pngs(output) == first


def test_every_flag_reaches_the_network(sd, start, tmp_path, capsys):
    mask = tmp_path / "mask.png"
    Image.fromarray(np.full((15, 20), 102, np.uint8)).save(mask)
    command = [
        f"--pretrained={sd}", f"--refiner={sd}", "--handover=0.3", "--prompt=" + "value of the name " * 30 + "beach",
        "--negative=(ugly:1.2)", "--weighting=a1111", "--clip-skip=1", "--rescale=0.5", "--scale=2", "--steps=2",
        f"--image={start}", f"--mask={mask}", "--fit=stretch",
    ]  # fmt: skip
    assert run_command(sample.main, [*command, f"--output={tmp_path / 'cut'}"]) == 0
    out, err = capsys.readouterr()
    assert "mask.png is 15 x 20; it is stretched to 30 x 40" in out
    assert "start.png" not in out.replace(str(tmp_path), "")
    assert (
        err.startswith("warning: tokenizer has room for 75 tokens")
        and "beach" in err
        and len(set(err.splitlines())) == 1
    )
    assert run_command(sample.main, [*command, "--chunks=auto", f"--output={tmp_path / 'whole'}"]) == 0
    assert "room for" not in capsys.readouterr().err
    assert Image.open(tmp_path / "whole" / "images" / "00000.png").size == (40, 30)
    assert pngs(tmp_path / "whole") != {}


def test_the_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        sample.main(["--pretrained=x", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for flag in ("chunks", "weighting", "clip-skip", "fit", "refiner", "handover", "rescale", "mask", "background"):
        assert f"--{flag}" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt is missing"),
        (["--prompt=a"], "/nowhere does not exist"),
        (["--prompt=a", "--mask=m.png"], "--image was not given"),
        (["--prompt=a", "--image=/nowhere.png"], "/nowhere.png"),
        (["--prompt=a", "--images-per-prompt=0"], "it must be at least 1"),
        (["--prompt=a", "--size=512,512"], "HEIGHTxWIDTH"),
        (["--prompt=a", "--size=\N{SUPERSCRIPT TWO}x512"], "HEIGHTxWIDTH"),
        (["--prompt=a", "--chunks=many"], "'auto' or a number"),
        (["--prompt=a", "--seed=-1"], "--seed is -1"),
        (["--prompt=a", "--lora=style.safetensors:nan"], "its weight must be a finite number"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert run_command(sample.main, ["--pretrained=/nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale=nan"], "scale is nan"),
        (["--steps=0"], "--steps is 0"),
        (["--clip-skip=9"], "clip_skip is 9"),
        (["--solver=eulr"], "did you mean"),
        (["--solver=with_history"], "solver"),
        (["--size=15x16"], "multiples of 2, such as 16 x 16"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments, message, sd, tmp_path, capsys):
    assert run_command(sample.main, [f"--pretrained={sd}", "--prompt=a", f"--output={tmp_path}", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_written_in_one_argument():
    assert generate.parse_lora("style.safetensors:0.5") == ("style.safetensors", 0.5)
    assert generate.parse_lora("C:/style.safetensors") == ("C:/style.safetensors", 1.0)
    assert size_in_pixels("512x768") == (512, 768) and size_in_pixels("512") == (512, 512)
    with pytest.raises(InvalidInput, match="HEIGHTxWIDTH"):
        size_in_pixels("512x")
