"""What a run will call later is refused before its first step; a run that learned nothing is not trained."""

import pytest

from diffusion_jax import train
from diffusion_jax.command import run_command

POINTS = [
    "--config=configs/toy2d.py",
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.train.steps=3",
    "--config.train.batch_size=16",
    "--no-progress",
]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["train.sample_every=1500"],
            "train.sample_every is 1500, but no picture can be made of samples of shape (2,)",
        ),
        (["sampling.ema=averag"], "sampling.ema is 'averag', which does not exist; did you mean 'average'?"),
        (["train.validation_examples=0"], "train.validation_examples is 0, but a whole number from 1"),
        (["held_out=None"], "train.validate_every is 500, but there is nothing to validate on: held_out is None"),
        (["optimizer.learning_rate.peak=1e999"], "peak is inf, but it must be positive and finite"),
    ],
    ids=str,
)
def test_what_a_run_will_call_is_refused_before_the_first_step(tmp_path, capsys, more, words):
    options = [f"--config.{one}" for one in more]
    assert run_command(train.main, [*POINTS, *options, f"--workdir={tmp_path / 'run'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_rate_that_only_float32_cannot_hold_trains_nothing(tmp_path):
    options = ["--config.optimizer.learning_rate.peak=1e39", "--config.optimizer.learning_rate.warmup_steps=0"]
    quiet = ["--config.train.validate_every=None"]
    with pytest.raises(SystemExit, match=r"error: Nothing was learned: .* in any of 3 steps"):
        train.main([*POINTS, *options, *quiet, f"--workdir={tmp_path}"])
