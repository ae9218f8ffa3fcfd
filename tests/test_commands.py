"""The command lines, end to end on a tiny model: train, resume, sample, go on after an interruption, evaluate."""

import json
import shlex
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, evaluate, models, sample, shards, train
from diffusion_jax.__main__ import COMMANDS, dispatch
from diffusion_jax.__main__ import main as console_main
from diffusion_jax.command import run_command
from diffusion_jax.commands import image_files, run_conditions
from diffusion_jax.commands.finetune_config import fine_tuning_config
from diffusion_jax.config import load
from diffusion_jax.metrics import judges

CONFIG = "digits_dit"
TRAIN = [
    f"--config=configs/{CONFIG}.py",
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.model.heads=2",
    "--config.train.steps=4",
    "--config.train.batch_size=16",
    "--config.train.log_every=2",
    "--config.train.validate_every=4",
    "--config.train.validation_examples=16",
    "--config.train.sample_every=4",
    "--config.train.checkpoint_every=2",
    "--config.sampling.grid.steps=4",
    "--config.sampling.batch_size=16",
    "--config.sampling.picture_columns=4",
    "--no-progress",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train.main([*TRAIN, f"--workdir={folder}"])
    return folder


def draw(workdir, output, *more):
    sample.main([f"--workdir={workdir}", f"--output={output}", "--num-samples=40", "--shard-size=24", *more])
    return shards.read_samples(output)


@pytest.fixture(scope="module")
def drawn(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    draw(workdir, folder)
    return folder


def test_training_leaves_what_it_promises(workdir):
    assert {
        *("checkpoints", "config.json", "loss.png", "loss_by_time.png", "metrics.jsonl", "pictures"),
        *("report.html", "run.json"),
    } <= {p.name for p in workdir.iterdir()}
    run = json.loads((workdir / "run.json").read_text())
    assert run["summary"]["steps"].startswith("4, that is") and run["command"].startswith(
        "diffusion-jax train --config="
    )
    assert load(str(workdir / "config.json")).model.width == 16
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in records if "skipped" in record] == [0, 0]


def test_a_finished_run_is_not_trained_again(workdir, capsys):
    log = (workdir / "metrics.jsonl").read_text()
    train.main([*TRAIN, f"--workdir={workdir}"])
    out = capsys.readouterr().out
    assert "Trained 4 steps" in out and "holds step 4 of 4, nothing is left to do" in out and "Compiling" not in out
    assert (workdir / "metrics.jsonl").read_text() == log


def test_shards_that_are_there_are_kept_and_the_rest_is_drawn(workdir, tmp_path, capsys):
    whole = draw(workdir, tmp_path / "a", "--save-trajectory", "--save-predictions")
    assert whole["x"].shape == (40, 8, 8, 1) and np.isfinite(whole["x"]).all()
    np.testing.assert_array_equal(whole["index"], np.arange(40))
    np.testing.assert_array_equal(whole["cond.label"], np.arange(40) % 10)
    pictures = {"samples.png", "denoising.png", "predictions.png"}
    assert pictures <= {path.name for path in (tmp_path / "a").iterdir()}
    assert not pictures & {path.name for path in workdir.iterdir()}, "the workdir is left alone where --output is given"

    first, second = sorted((tmp_path / "a").glob("*.npz"))
    kept = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:100])
    again = draw(workdir, tmp_path / "a")
    assert "1 of 2 shards drawn, 1 were there" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == kept
    np.testing.assert_array_equal(again["x"], whole["x"])


def test_a_sample_does_not_depend_on_the_batch_or_the_mesh(workdir, tmp_path):
    whole = draw(workdir, tmp_path / "a")
    other = draw(workdir, tmp_path / "b", "--config.sampling.batch_size=8", "--config.mesh.fsdp=4")
    np.testing.assert_allclose(other["x"], whole["x"], rtol=1e-5, atol=1e-5)


def test_images_say_what_made_them_and_can_be_repeated_from_that(workdir, tmp_path, capsys):
    """Seeds, classes and number of steps are flags; image i of a seed is the same whatever else is drawn."""
    asked = [f"--workdir={workdir}", "--class=3,7", "--num-samples=4", "--steps=3", "--solver=ddim", "--scale=2"]
    sample.main([*asked, "--seeds=5,6", f"--output={tmp_path / 'a'}"])
    stored = shards.read_samples(tmp_path / "a")
    np.testing.assert_array_equal(stored["cond.label"], [3, 7, 3, 7] * 2)
    picture = tmp_path / "a" / "images" / "00005.png"
    made = image_files.read_settings(picture)
    assert {"class": "7", "seed": 6, "index": 1, "steps": 3, "scale": 2.0}.items() <= made.items()
    text = Image.open(picture).info["parameters"]
    assert text.startswith("Steps: 3, Sampler: ddim, CFG scale: 2.0, Seed: 6, Size: 8x8")
    told = json.loads((tmp_path / "a" / "generated.json").read_text())
    assert [one["seed"] for one in told["images"]] == [5] * 4 + [6] * 4 and told["steps"] == 3

    sample.main([*asked, "--seed=6", f"--output={tmp_path / 'b'}"])
    np.testing.assert_allclose(shards.read_samples(tmp_path / "b")["x"], stored["x"][4:], atol=1e-5)
    sample.main([f"--like={picture}", f"--output={tmp_path / 'c'}"])
    again = np.asarray(Image.open(tmp_path / "c" / "images" / "00000.png"), int)
    assert np.abs(again - np.asarray(Image.open(picture), int)).max() <= 1
    assert not list((tmp_path / "c").glob("*.npz"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--class=11"], "the network knows the classes 0 to 9"),
        (["--prompt=a cat"], "does not read tokens of captions: use --class"),
        (["--class=1", "--prompt=a"], "both given"),
        (["--seeds=1,1"], "--seeds is '1,1'"),
        (["--lora=style.safetensors"], "--lora is for a pretrained checkpoint (--pretrained)"),
        (["--pretrained=folder"], "--workdir and --pretrained were both given"),
        (["--solver=ddmi"], "did you mean 'ddpm'"),
        (["--num-samples=2", "--images-per-prompt=2"], "leave one of them out"),
        (["--index=1000"], "--index is '1000'"),
    ],
    ids=str,
)
def test_what_cannot_be_sampled_is_told_in_one_sentence(workdir, tmp_path, capsys, more, words):
    assert run_command(sample.main, [f"--workdir={workdir}", f"--output={tmp_path}", *more]) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_is_asked_by_the_words_of_its_captions():
    source = data.captioned_digits.named_digits("test", embedding_dim=0, condition=True)
    tokens = run_conditions.caption_tokens([models.text(vocab_size=source.vocab_size)], source, ["six", "two"])
    assert list(tokens) == ["tokens"] and [source.tokenizer.decode(row) for row in tokens["tokens"]] == ["six", "two"]


def test_another_set_is_not_mixed_in(workdir, tmp_path, capsys):
    draw(workdir, tmp_path / "a")
    argv = [f"--workdir={workdir}", f"--output={tmp_path / 'a'}", "--num-samples=16", "--shard-size=16"]
    assert run_command(sample.main, argv) == 2
    assert "holds another set of samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed=1"], "seed (was 0, is 1)"),
        (["--config.sampling.grid.steps=3"], "sampling.grid.steps (was 4, is 3)"),
        (["--config.sampling.ema=None"], "parameters (was "),
        (["--step=2"], "The parameters are those of another checkpoint"),
        (["--num-samples=36"], "index (was [24, 40], is [24, 36])"),
    ],
    ids=str,
)
def test_samples_of_another_seed_checkpoint_or_sampling_are_not_taken_for_these(workdir, drawn, capsys, more, words):
    argv = [f"--workdir={workdir}", f"--output={drawn}", "--num-samples=40", "--shard-size=24", *more]
    before = {path: path.read_bytes() for path in drawn.rglob("*") if path.is_file()}
    assert run_command(sample.main, argv) == 2
    told = capsys.readouterr().err
    assert "holds other samples than those asked for" in told and words in told
    assert {path: path.read_bytes() for path in drawn.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_network_is_told_before_anything_is_compiled(workdir, tmp_path, capsys):
    argv = [f"--workdir={workdir}", f"--output={tmp_path}", "--config.model.width=32", "--num-samples=2"]
    assert run_command(sample.main, argv) == 2
    assert "the checkpoint is not of the network of this config" in capsys.readouterr().err


def test_a_mixture_of_samples_is_neither_exported_nor_evaluated(workdir, drawn, tmp_path, capsys):
    first, second = sorted(drawn.glob("*.npz"))
    (tmp_path / first.name).write_bytes(first.read_bytes())
    shard = shards.read_shard(second)
    other = json.loads(str(shard["identity"])) | {"seed": 1}
    shards.write_shard(tmp_path / second.name, shard | {"identity": np.asarray(json.dumps(other))})
    assert run_command(evaluate.main, [f"--workdir={workdir}", f"--samples={tmp_path}"]) == 2
    assert "seed (was 1, is 0)" in capsys.readouterr().err
    argv = [f"--workdir={workdir}", f"--output={tmp_path}", "--num-samples=40", "--shard-size=24"]
    assert run_command(sample.main, [*argv, "--format=arrayrecord"]) == 2
    assert "seed (was 1, is 0)" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("model.width=32", "model.width (was 16, is 32)"),
        ("seed=1", "seed (was 0, is 1)"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was_and_names_the_fields(workdir, capsys, field, words):
    stored = (workdir / "config.json").read_text()
    assert run_command(train.main, [*TRAIN, f"--workdir={workdir}", f"--config.{field}"]) == 2
    assert words in capsys.readouterr().err
    assert (workdir / "config.json").read_text() == stored


def test_fewer_steps_than_a_run_has_made_are_told(workdir, capsys):
    train.main([*TRAIN, f"--workdir={workdir}", "--config.train.steps=2"])
    assert "Nothing to do: the run is at step 4, and 2 were asked for." in capsys.readouterr().out


def test_array_record_holds_the_same_samples(workdir, tmp_path, capsys):
    """Also once a shard whose identity is damaged was drawn again; pictures and costs of other samples are removed."""
    whole = draw(workdir, tmp_path / "a")
    for stale in ("denoising.png", "shown.json"):
        (tmp_path / "a" / stale).write_text('{"seed": 7}')
    for stale in ("sampling.json", "samples.array_record"):
        (tmp_path / "a" / stale).write_text("{}")
    first = sorted((tmp_path / "a").glob("*.npz"))[0]
    np.savez(first, **shards.read_shard(first) | {"identity": np.asarray("{")})
    draw(workdir, tmp_path / "a", "--format=arrayrecord")
    assert "samples-00000-of-00002.npz is damaged and is drawn again" in capsys.readouterr().out
    assert not (tmp_path / "a" / "denoising.png").exists()
    cost = json.loads((tmp_path / "a" / "sampling.json").read_text())
    assert cost["identity"] == json.loads((tmp_path / "a" / "shown.json").read_text()) and cost["seed"] == 0
    source = data.array_record(str(tmp_path / "a" / "samples.array_record"))
    assert len(source) == 40
    np.testing.assert_array_equal(source[7]["x0"], whole["x"][7])


def test_evaluate_writes_the_metrics(workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path))
    monkeypatch.setitem(judges.STEPS, "digits", 40)
    draw(workdir, workdir / "samples")
    evaluate.main([f"--workdir={workdir}"])
    values = json.loads((workdir / "metrics.json").read_text())
    assert values["num_samples"] == 40 and values["samples"]["seed"] == 0
    assert values["nfe"] == 8, "four steps under guidance"
    assert values["frechet_distance"] > 3 * values["frechet_distance_real_split"], "four steps of training do not do"
    assert 0 <= values["class_accuracy"] <= 1


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "recipes"])
def test_help_helps(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        dispatch([command, "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert "--workdir" in text
    assert len(text.splitlines()) > 8


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_flag_is_told_in_one_sentence_by_the_name_of_the_command(command, capsys):
    needed = {"encode": ["--pretrained=x", "--data=x", "--output=x"], "sample": ["--pretrained=x"]}
    needed |= {name: ["--workdir=x"] for name in ("train", "finetune", "report", "evaluate")}
    needed = needed.get(command, [])
    assert run_command(dispatch, [command, *needed, "--hepl"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --hepl is no flag of `diffusion-jax {command}`; did you mean --help?")
    assert told.count("\n") == 1


def test_a_field_of_the_config_that_is_given_as_a_flag_is_told_with_its_place(tmp_path, capsys):
    command = ["train", "--config=digits_dit", f"--workdir={tmp_path}"]
    batch = "--config.sampling.batch_size or --config.train.batch_size"
    for flag, place in (("--steps=5", "--config.train.steps=5"), ("--batch-size", batch)):
        assert run_command(dispatch, [*command, flag]) == 2
        assert f"did you mean {place}? " in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_what_to_type_next_can_be_typed_where_the_path_has_spaces(workdir, tmp_path, capsys):
    folder = tmp_path / "my run"
    shutil.copytree(workdir, folder)
    train.main([*TRAIN, f"--workdir={folder}"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Samples: ")]
    assert shlex.split(line)[1:] == ["diffusion-jax", "sample", f"--workdir={folder}"]


def test_a_run_without_a_checkpoint_yet_is_not_called_damaged(workdir, tmp_path, capsys):
    shutil.copy(workdir / "config.json", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert run_command(dispatch, ["sample", f"--workdir={tmp_path}", "--num-samples=1"]) == 2
    told = capsys.readouterr().err
    assert "has no checkpoint yet" in told and "damaged" not in told


def test_what_the_system_refuses_is_told_by_its_path_and_reason(tmp_path, capsys):
    assert run_command(lambda argv: (tmp_path / "no" / "file").read_bytes()) == 3
    assert capsys.readouterr().err == f"error: {tmp_path / 'no' / 'file'}: No such file or directory.\n"


@pytest.fixture
def interruptible():
    """Shells start what runs in the background with interruptions ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_within_a_finaliser_is_not_lost(capsys):
    class Finalised:
        def __del__(self):
            raise KeyboardInterrupt

    def main(argv):
        Finalised()
        time.sleep(1)
        print("went on")

    assert run_command(main) == 130
    told = capsys.readouterr()
    assert told.err == "Interrupted.\n" and "went on" not in told.out


def test_an_interruption_while_jax_is_imported_leaves_no_traceback(monkeypatch, capsys):
    class Importing:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "diffusion_jax.command", Importing())
    with pytest.raises(SystemExit) as left:
        console_main()
    assert left.value.code == 130 and capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_run_that_fine_tuned_is_told_where_its_result_is(command, tmp_path, capsys):
    (tmp_path / "config.json").write_text(fine_tuning_config("sd15", "photos", lora_rank=2).to_json_best_effort())
    assert run_command(dispatch, [command, f"--workdir={tmp_path}"]) == 2
    assert "This run fine-tuned sd15: sample its result by" in capsys.readouterr().err


def test_the_door_lists_the_commands(capsys):
    dispatch(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "sample", "evaluate", "recipes"))
