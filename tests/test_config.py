"""Configs: an entry is a constructor call, every mistake is told before anything is compiled."""

import pytest

from diffusion_jax import config as configs
from diffusion_jax.config import ConfigDict, apply_overrides, build, call
from diffusion_jax.errors import InvalidInput


def test_call_then_build_is_the_constructor():
    from diffusion_jax import solvers

    entry = call("solvers.ddim", eta=0.5)
    assert entry.to_dict() == {"call": "solvers.ddim", "eta": 0.5}
    assert build(entry).order == solvers.ddim(0.5).order


def test_defaults_appear_so_that_they_can_be_overridden():
    config = ConfigDict({"solver": call("solvers.ddim")})
    assert apply_overrides(config, ["solver.eta=0.25"]).solver.eta == 0.25
    assert config.solver.eta == 0.0, "the original is left alone"


def test_build_makes_nested_entries_and_fills_in_context():
    process = call("processes.rectified_flow")
    joint = build({"image": process, "other": 3})
    assert joint["other"] == 3
    assert hasattr(joint["image"], "corrupt")


def test_an_int_will_do_for_a_float_but_not_the_reverse():
    config = ConfigDict({"solver": call("solvers.ddim"), "steps": 10})
    assert apply_overrides(config, ["solver.eta=1"]).solver.eta == 1.0
    with pytest.raises(InvalidInput, match="expected int"):
        apply_overrides(config, ["steps=1.5"])


def test_json_round_trip(tmp_path):
    config = ConfigDict({"solver": call("solvers.ddim", eta=0.5), "shape": (1, 2), "nothing": None})
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(config))
    loaded = configs.load(str(path))
    assert loaded.solver.eta == 0.5
    assert list(loaded.shape) == [1, 2]


def test_replacing_a_call_brings_the_new_defaults():
    config = ConfigDict({"process": call("processes.rectified_flow")})
    changed = apply_overrides(config, ["process.call=processes.edm", "process.sigma_data=0.3"])
    assert changed.process.sigma_data == 0.3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: call("solvers.dimm"), "did you mean 'ddim'"),
        (lambda: call("solver.ddim"), "did you mean 'solvers'"),
        (lambda: call("solvers.ddim", eat=1.0), "did you mean 'eta'"),
        (lambda: build(ConfigDict({"call": "solvers.ddim", "eta": "high"})), "solvers.ddim.eta is 'high'"),
        (lambda: apply_overrides(ConfigDict({"steps": 3}), ["stpes=4"]), "did you mean 'steps'"),
        (lambda: apply_overrides(ConfigDict({"steps": 3}), ["steps.more=4"]), "no fields of its own"),
        (lambda: apply_overrides(ConfigDict({"steps": 3}), ["steps"]), "--config.field=value"),
        (lambda: apply_overrides(ConfigDict({"model": {"width": 3}}), ["model=4"]), "it is a group"),
        (lambda: configs.load("configs/nowhere.py"), "does not exist"),
        (lambda: configs.load("nowhere/nothing.py"), "expected an existing Python file"),
    ],
)
def test_mistakes_are_told_in_one_sentence(make, says):
    with pytest.raises(InvalidInput) as error:
        make()
    assert says in str(error.value)
    assert "\n" not in str(error.value)
