"""The system of CONTRIBUTING.md is one that runs: its method, its laws, its config and its study."""

import re
from pathlib import Path

from diffusion_jax.recipes.report import reported


def test_its_system_is_complete(tmp_path):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    laws = [law for name, law in names.items() if name.startswith("test_")]
    assert len(laws) == 2
    for law in laws:
        law()
    report = reported(names["study"], "taylorseer", names["get_config"]("smoke"), tmp_path, "", smoke=True)
    error, evaluations = report.verdicts
    assert error.against[0] > 0 and evaluations.ours == evaluations.against == (2.0,)
    whole = names["get_config"]()
    assert not set(whole.seed_numbers) & set(whole.tuned_on)
