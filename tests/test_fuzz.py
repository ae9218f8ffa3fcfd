"""Changed configs and damaged files are read right, or refused in one sentence: a small part of `benchmarks.fuzz`."""

import collections

import pytest

from benchmarks import fuzz, fuzz_cases


def tally(cases, folder, seconds):
    counts, wrong = collections.Counter(), []
    for i, case in enumerate(cases):
        at = folder / f"case{i}"
        at.mkdir()
        became, told = fuzz.outcome(case.run, at, seconds)
        counts[became] += 1
        if became not in fuzz.GOOD:
            wrong.append((became, case.kind, told, case.about))
    assert not wrong, wrong[:5]
    return counts


@pytest.mark.filterwarnings("ignore")
def test_a_changed_config_is_right_or_refused_in_one_sentence(tmp_path):
    counts = tally(fuzz_cases.config_cases(150, 1, ("toy2d", "digits_dit"), trace=False), tmp_path, 10)
    assert counts[fuzz.RIGHT] > 5 and counts[fuzz.REFUSED] > 50, "the changes are not all of one kind"


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_or_refused_in_one_sentence(tmp_path):
    counts = tally(fuzz_cases.file_cases(200, 1, fuzz_cases.CHEAP, tmp_path), tmp_path, 10)
    assert counts[fuzz.RIGHT] > 5 and counts[fuzz.REFUSED] > 50, "the damages are not all of one kind"


def test_what_is_neither_is_counted_as_what_it_is(tmp_path):
    def raises(error):
        def run(folder):
            raise error

        return run

    def waits(folder):
        while True:
            pass

    from diffusion_jax.errors import InvalidInput

    found = {
        "right": fuzz.outcome(lambda folder: None, tmp_path),
        "refused": fuzz.outcome(raises(InvalidInput("x is 1, but 2 was needed.")), tmp_path),
        "unclear": fuzz.outcome(raises(InvalidInput("two\nlines")), tmp_path),
        "traceback": fuzz.outcome(raises(KeyError("x")), tmp_path),
        "memory": fuzz.outcome(raises(MemoryError()), tmp_path),
        "hang": fuzz.outcome(waits, tmp_path, 0.05),
    }
    assert {name: became for name, (became, _) in found.items()} == {name: name for name in found}
    assert "all" in fuzz.table({"a": collections.Counter(right=2)})
