"""`diffusion-jax finetune`: a run that was cut ends as one that was not, its result is read, mistakes are told."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import finetune, interop, training
from diffusion_jax.command import run_command
from diffusion_jax.commands.finetune_config import config_of, fine_tuning_config, parser, set_flags
from diffusion_jax.config import call, check_entry
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import prepare
from diffusion_jax.typing import Objective
from tests.interop.folders import dit_folder, sd_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A DiT, a Stable Diffusion, and pictures of two classes, without captions."""
    root = tmp_path_factory.mktemp("finetune")
    dit_folder(root / "dit")
    sd_folder(root / "sd")
    rng = np.random.default_rng(0)
    for i in range(4):
        file = root / "photos" / ("ant", "bee")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(file)
    return root


def command(root, workdir, *more, pretrained="dit"):
    flags = [f"--pretrained={root / pretrained}", f"--data={root / 'photos'}", f"--workdir={root / workdir}"]
    quick = ["--batch-size=2", "--config.mesh.devices=1", "--config.train.log_every=1", "--no-progress"]
    return run_command(finetune.main, [*flags, *quick, *more])


def test_a_run_that_was_cut_ends_as_one_that_was_not(root, capsys):
    lora = (
        "--lora-rank=2",
        "--min-snr=5",
        "--flip",
        "--schedule=cosine",
        "--warmup-steps=1",
        "--steps=4",
        "--checkpoint-every=2",
    )
    shown = ("--validation-prompt=bee", "--validate-every=2", "--config.validation.num_steps=2")
    assert command(root, "whole", *lora, *shown) == 0
    told = capsys.readouterr().out
    assert "4 pictures of 16 x 16" in told and "ant is 0, bee is 1" in told and "captions are encoded once" in told
    assert f"Wrote {root / 'whole' / finetune.LORA_FILE}" in told and "Sample it: diffusion-jax sample --pre" in told
    assert "factors of rank 2 beside the weights of the DiTTransformer2DModel" in told
    pictures = sorted(path.name for path in (root / "whole" / "pictures").iterdir())
    assert pictures == ["validation_0000002.png", "validation_0000004.png"]

    # As if it had been killed before its last checkpoint, and its result with it.
    shutil.copytree(root / "whole", root / "cut")
    shutil.rmtree(root / "cut" / "checkpoints" / "4")
    (root / "cut" / finetune.LORA_FILE).unlink()
    assert command(root, "cut", *lora) == 0
    cut, whole = (training.load_params(root / name) for name in ("cut", "whole"))
    jax.tree.map(np.testing.assert_array_equal, cut, whole)
    assert (root / "cut" / finetune.LORA_FILE).read_bytes() == (root / "whole" / finetune.LORA_FILE).read_bytes()

    # The base, the autoencoder and the text encoders are no part of a checkpoint.
    steps = root / "cut" / "checkpoints" / "4"
    assert set(json.loads((steps / "meta" / "metadata").read_text())["items"]) == {"params", "rest"}
    base = interop.load_pretrained(root / "dit" / "transformer")
    read = interop.load_lora(root / "cut" / finetune.LORA_FILE, base)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), read, cut)


def test_a_whole_network_is_written_as_a_pipeline(root, capsys, monkeypatch):
    learned = {}

    def fit(experiment, workdir, callbacks, progress, writer):
        params = experiment.init_params(jax.random.key(0))
        learned["average"] = jax.tree.map(lambda leaf: leaf + 0.01, params)
        return training.TrainState(4, params, learned, (), (), 0, 0)

    monkeypatch.setattr(finetune, "fit", fit)
    config = fine_tuning_config(str(root / "dit"), str(root / "photos"), classes=True)
    config.train.batch_size, config.mesh.devices = 2, 2
    config.ema, config.sampling.ema = {"average": call("training.ema.fixed", decay=0.5)}, "average"
    finetune.run(config, root / "full")
    assert "captions and pictures (nothing changes them" in capsys.readouterr().out
    written = interop.load_pipeline(root / "full" / finetune.FOLDER)
    jax.tree.map(np.testing.assert_array_equal, written.params, learned["average"])


@pytest.mark.parametrize(
    ("pretrained", "more", "message"),
    [
        ("nowhere", (), "nowhere does not exist"),
        ("sd", (), "has a caption"),
        ("dit", ("--lora-rank=2", "--lora-targets=to_qq"), "did you mean 'to_q'"),
        ("dit", ("--lora-alpha=2",), "give --lora-rank too"),
        ("dit", ("--lora-rank=2", "--full"), "give one of them"),
        ("dit", ("--size=15",), "multiples of 4"),
        ("dit", ("--caption-dropout=2",), "cond_dropout is 2"),
        ("dit", ("--random-crop=8",), "squares of --size=16 do not fit"),
        ("dit", ("--flip", "--config.encode=once"), "change the pictures"),
        ("dit", ("--lcm=4", "--min-snr=5"), "--min-snr is of training by denoising"),
        ("dit", ("--lcm=4", "--config.validation.scheduler=LCMSchedulr", "--validation-prompt=bee"), "LCMScheduler"),
        ("dit", ("--validation-prompt=be",), "did you mean 'bee'"),
    ],
)
def test_mistakes_are_told(pretrained, more, message, root, tmp_path, capsys):
    assert command(root, tmp_path / "none", *more, pretrained=pretrained) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none" / "checkpoints").exists()


def test_a_run_goes_on_beside_its_own_base_alone(root, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"pretrained": {"folder": "elsewhere", "digest": "0"}}))
    assert command(root, tmp_path, "--lora-rank=2") == 2
    assert "began from elsewhere, whose weights are not those of" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert command(root, tmp_path, "--lora-rank=2") == 2
    assert "a run of another kind" in capsys.readouterr().err


def test_flags_are_fields_of_the_config(root, capsys):
    with pytest.raises(InvalidInput, match="sample --pretrained=checkpoints/sd15 --lora="):
        prepare(fine_tuning_config("checkpoints/sd15", "photos"))
    config = fine_tuning_config("checkpoints/sd15", "photos", lora_rank=4)
    assert config.lora.rank == 4 and config.data.call == "data.captioned_folder"
    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    assert "--lora-rank" in capsys.readouterr().out
    assert run_command(finetune.main, ["--workdir=x"]) == 2
    assert "--pretrained is missing" in capsys.readouterr().err


def test_a_student_of_few_steps_is_an_objective_with_a_teacher(root):
    arguments = parser("").parse_args(
        [f"--pretrained={root / 'dit'}", f"--data={root / 'photos'}", "--workdir=x", "--lora-rank=2", "--lcm=4"]
    )
    config = config_of(arguments)
    set_flags(arguments, config)
    assert config.teacher_guidance == 4 and config.validation.num_steps == 4 and config.validation.scale == 1
    assert config.objective.call == "objectives.consistency"
    check_entry(config.objective, Objective, "config.objective")
