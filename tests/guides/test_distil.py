"""The page on distillation: its code runs on a run that the command wrote, its command is understood."""

import re
import shlex

from diffusion_jax import train
from diffusion_jax.commands.finetune_config import parser
from diffusion_jax.students import METHODS
from tests.guides.running import DOCS, run
from tests.test_commands import TRAIN

TEXT = (DOCS / "distil.md").read_text()


def test_distil(tmp_path, monkeypatch):
    train.main([*TRAIN, f"--workdir={tmp_path / 'out' / 'digits'}"])
    monkeypatch.chdir(tmp_path)
    smaller = {
        "steps = 1000": "steps = 2",
        "run.held_out)": "run.held_out, steps=5)",
        "np.arange(200": "np.arange(16",
        "in (1, 2, 4)": "in (2,)",
        "in (1, 2, 4, 8, 50)": "in (2,)",
        "(0, 5, 10, 15, 20)": "(0, 1, 2)",
        "timesteps.linspace(20)": "timesteps.linspace(2)",
        "count=4096, batch_size=256": "count=16, batch_size=16",
        "range(512)": "range(8)",
        'print("student", ': "answers.append(",
        'print("teacher", ': "answers.append(",
        "judge = ": "answers = []\njudge = ",
    }
    names = run("distil.md", smaller)
    # Guidance makes two evaluations of a step.
    assert [evaluations for evaluations, _ in names["answers"]] == [2, 4]
    assert names["runs"][0]["states"].shape == (3, *names["run"].shape)
    assert names["learning"].source is names["runs"]


def test_the_page_names_every_method_and_flags_that_exist():
    assert all(f"`{method}`" in TEXT for method in METHODS)
    (command,) = re.findall(r"^diffusion-jax finetune (.*)$", TEXT.replace("\\\n", " "), re.MULTILINE)
    assert parser("").parse_args(shlex.split(command)).lcm == 7.5
