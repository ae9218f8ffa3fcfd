"""Over budget is what takes more than its share: a file, or one system's smoke run."""

import json

from tests import budget

SMOKE = "tests/recipes/test_smoke.py::test_runs_at_a_few_steps"


def test_files_are_counted_whole_and_smoke_runs_one_by_one():
    assert budget.item_of("tests/models/test_dit.py::test_shapes[1]") == "tests/models/test_dit.py"
    assert budget.item_of(f"{SMOKE}[uwm]") == f"{SMOKE}[uwm]"


def test_what_is_over_its_budget_is_named_the_dearest_first():
    spent = {"tests/a.py": 19.0, "tests/b.py": 21.0, f"{SMOKE}[uwm]": 6.5, f"{SMOKE}[sdp]": 5.5, "tests/c.py": 30.0}
    sentences = budget.over(spent)
    assert [sentence.split()[0] for sentence in sentences] == ["tests/c.py", "tests/b.py", f"{SMOKE}[uwm]"]
    assert sentences[2].endswith("takes 6.5 s of processor time, over its budget of 6 s.")


def test_the_lint_reads_the_last_run_and_leaves_out_files_that_are_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget, "RECORD", tmp_path / "seconds.json")
    assert budget.main() == 0
    budget.RECORD.write_text(json.dumps({"tests/test_budget.py": 1.0, "tests/gone.py": 99.0}))
    assert budget.main() == 0
    budget.RECORD.write_text(json.dumps({"tests/test_budget.py": budget.BUDGET * budget.NOISE - 0.1}))
    assert budget.main() == 0
    budget.RECORD.write_text(json.dumps({"tests/test_budget.py": 99.0}))
    assert budget.main() == 1
    assert "tests/test_budget.py takes 99.0 s" in capsys.readouterr().err
