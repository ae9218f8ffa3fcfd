"""The study of CONTRIBUTING.md is one that runs."""

import re
from pathlib import Path

from diffusion_jax.baselines import tiny_digit_transformer
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.recipes.report import reported


def test_its_study_runs(tmp_path):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    grids = {name: call("timesteps.linspace", steps=steps) for name, steps in (("grid", 4), ("coarse", 2))}
    config = ConfigDict(
        {"seed_numbers": (0,), "tuned_on": (), "base": tiny_digit_transformer(0), "interval": 2, "count": 4}
    )
    config.update(grids)
    report = reported(names["study"], "taylorseer", config, tmp_path, "", smoke=True)
    (found,) = report.verdicts
    assert found.verdict == "undecided" and found.against[0] > 0
