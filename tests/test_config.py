"""Configs: an entry is a constructor call, every mistake is told before anything is compiled."""

from types import FunctionType

import pytest

from diffusion_jax import experiment
from diffusion_jax.config import ConfigDict, build, call, parts
from diffusion_jax.config import calls as configs
from diffusion_jax.config.overrides import apply_overrides
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


def test_calls_within_a_tuple_are_plain_data_and_overridden_by_their_number(tmp_path):
    from diffusion_jax import models

    conditions = (call("models.label", num_classes=3), call("models.pooled"))
    config = ConfigDict({"model": call("models.mlp", conditions=conditions)})
    changed = apply_overrides(config, ["model.conditions.0.num_classes=7"])
    assert build(changed.model).module.conditions == (models.label(7), models.pooled())
    assert build(config.model).module.conditions[0] == models.label(3), "the original is left alone"
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(changed))
    again = apply_overrides(configs.load(str(path)), ["model.conditions.1.layers=2"])
    assert build(again.model).module.conditions == (models.label(7), models.pooled(2))


def test_replacing_a_call_brings_the_new_defaults():
    config = ConfigDict({"process": call("processes.rectified_flow")})
    changed = apply_overrides(config, ["process.call=processes.edm", "process.sigma_data=0.3"])
    assert changed.process.sigma_data == 0.3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: call("solvers.dimm"), "did you mean 'ddim'"),
        (lambda: call("solvers..ddim"), "the file of call 'solvers..ddim' is ''"),
        (lambda: call("solver.ddim"), "did you mean 'solvers'"),
        (lambda: call("solvers.ddim", eat=1.0), "did you mean 'eta'"),
        (lambda: build(ConfigDict({"call": "solvers.ddim", "eta": "high"})), "solvers.ddim.eta is 'high'"),
        (lambda: apply_overrides(ConfigDict({"steps": 3}), ["stpes=4"]), "did you mean 'steps'"),
        (lambda: apply_overrides(ConfigDict({"steps": 3}), ["steps.more=4"]), "no fields of its own"),
        (lambda: apply_overrides(ConfigDict({"steps": 3}), ["steps"]), "--config.field=value"),
        (lambda: apply_overrides(ConfigDict({"model": {"width": 3}}), ["model=4"]), "it is a group"),
        (
            lambda: apply_overrides(ConfigDict({"parts": ({"call": "models.label"},)}), ["parts.1.call=x"]),
            "one of the 1 entries",
        ),
        (lambda: apply_overrides(ConfigDict({"parts": ({"width": 3},)}), ["parts.0.wdith=4"]), "did you mean 'width'"),
        (lambda: build(call("models.dit", num_classes=3)), "field of dit is 'num_classes'"),
        (lambda: configs.load("configs/nowhere.py"), "does not exist"),
        (lambda: configs.load("nowhere/nothing.py"), "expected an existing Python file"),
    ],
)
def test_mistakes_are_told_in_one_sentence(make, says):
    with pytest.raises(InvalidInput) as error:
        make()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "data.write_array_record",
        "data.write_latents",
        "data.latent_shards.write_latents",
        "acceleration.save_calibration",
        "distributed.initialize",
        "training.logging.JsonLines",
        "training.logging.PictureFolder",
        "training.logging.TensorBoard",
        "training.Checkpointer",
        "training.checkpoint.Checkpointer",
        "training.save_params",
        "training.export_params",
        "training.write_config",
        "training.train",
        "interop.save_pretrained",
        "interop.files.TensorWriter",
        "interop.load_pretrained",
        "recipes.study",
        "stages.stage",
        "os.remove",
        "builtins.eval",
        "config.load",
        "..os.remove",
        "",
        None,
        5,
        {"call": "data.digits"},
    ],
    ids=str,
)
def test_what_writes_or_acts_cannot_be_called_from_a_config(name, tmp_path):
    """Wherever it stands: in an entry of its own, as an argument, and deep within lists and groups."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    entry = {"call": name, "path": str(victim), "examples": [], "name": "x", "config": 1, "workdir": str(victim)}
    for place in (entry, {"call": "data.unconditional", "source": entry}, [{"a": (entry,)}]):
        with pytest.raises(InvalidInput):
            build(place)
    assert victim.read_text() == "mine" and list(tmp_path.iterdir()) == [victim]


def test_a_data_set_that_brings_its_own_code_is_refused():
    with pytest.raises(InvalidInput, match="run code of theirs"):
        build(call("data.tfds", name="huggingface:someone__something"))


def test_no_constructor_that_a_config_can_call_is_there_to_do_something():
    """Those that make a part return one: what returns nothing, a path or a number was written to act or to measure."""
    for place in parts.CONFIGURABLE:
        module = __import__(f"diffusion_jax.{place}", fromlist=["x"])
        for name in parts.public_names(module):
            function = getattr(module, name)
            made = parts.made_by(function) if isinstance(function, FunctionType | type) else None
            if made in parts.NO_PARTS:
                with pytest.raises(InvalidInput):
                    parts.constructor(f"{place}.{name}")
    assert not [place for place in parts.CONFIGURABLE if place.startswith(("interop", "recipes", "training.l"))]


def digits(**changes):
    config = configs.load("configs/digits_dit.py")
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = config
        for name in parents:
            node = node[name]
        with node.ignore_type():
            node[last] = value
    return config


WRONG_KINDS = [
    (
        {"model": call("solvers.ddim")},
        "config.model is the call 'solvers.ddim', which makes a Solver, but a Network",
        "dit",
    ),
    (
        {"data": call("models.mlp")},
        "config.data is the call 'models.mlp', which makes a Network, but a Source",
        "data.",
    ),
    ({"held_out": call("data.unconditional", source={"name": "digits"})}, "config.held_out.source is {", "data."),
    ({"objective__draw": call("timesteps.linspace")}, "config.objective.draw is the call", "timesteps.mode"),
    (
        {"optimizer__learning_rate": call("solvers.ddim")},
        "config.optimizer.learning_rate is the call",
        "optimizers.cosine",
    ),
    (
        {"ema__average": call("training.optimizers.sgd")},
        "makes an Optimizer, but an Ema is needed",
        "training.ema.power",
    ),
    ({"metrics__images__judge": call("models.mlp")}, "config.metrics.images.judge is", "metrics.feature_network"),
    ({"sampling__grid": call("solvers.ddim")}, "makes a Solver, but an array is needed", "timesteps.karras"),
    ({"sampling__solver": call("timesteps.linspace")}, "makes an array, but a Solver is needed", "solvers.ddim"),
    ({"sampling__condition": call("training.optimizers.cosine")}, "config.sampling.condition", "data.cycled_labels"),
    ({"sampling__transformations__guidance": call("models.mlp")}, "but a Denoiser is needed", "denoisers.guided"),
    (
        {"train__transforms": {"one": call("data.cycled_labels", num_classes=3)}},
        "config.train.transforms.one",
        "data.flip",
    ),
    ({"mesh": call("data.digits")}, "an ArraySource, but a Mesh is needed", "distributed.make_mesh"),
    ({"process": call("timesteps.uniform")}, "a TimestepDraw, but a Process is needed", "'processes.uniform'"),
    (
        {"process": {"call": "processes.JointProcess", "processes": {"a": call("solvers.ddim")}}},
        "processes.a is",
        "edm",
    ),
    ({"model": 5}, "config.model is 5, but the call of a constructor is needed", "models.dit"),
    ({"model": None}, "config.model is None", "models.dit"),
    ({"model": [1]}, "config.model is [1]", "models.dit"),
    ({"process": {"a": 5}}, "config.process is {'a': 5}", "processes.edm"),
    ({"optimizer__learning_rate": True}, "config.optimizer.learning_rate is True", "a float"),
    ({"optimizer__learning_rate": "fast"}, "config.optimizer.learning_rate is 'fast'", "a float"),
    ({"model__width": [1]}, "dit.width is [1]", "an int"),
    ({"model__width": float("nan")}, "config.model.width is nan", "number"),
    ({"model__width": 10**30}, "config.model.width is 1000", "64 bits"),
    ({"model__depth": 10**13}, "dit.depth is 10000000000000", "at most 4096"),
    ({"model__width": 2**40}, "dit.width is 1099511627776", "at most 16777216"),
    ({"data__split": None}, "config.data.split is None", "a str"),
    ({"train": 5}, "config.train is 5", "group"),
    ({"train__steps": None}, "config.train.steps is None", "whole number"),
    ({"train__batch_size": True}, "config.train.batch_size is True", "whole number"),
    ({"train__clip_norm": "no"}, "config.train.clip_norm is 'no'", "positive"),
    ({"sampling__transformations": call("denoisers.guided")}, "config.sampling.transformations is", "group"),
    ({"sampling__ema": "avrage"}, "config.sampling.ema is 'avrage'", "did you mean 'average'"),
    ({"sampling__picture_columns": -1}, "config.sampling.picture_columns is -1", "from 1 to"),
    ({"seed": "zero"}, "config.seed is 'zero'", "whole number"),
    ({"seed": -1}, "config.seed is -1", "whole number"),
]


@pytest.mark.parametrize(("changes", "says", "hint"), WRONG_KINDS, ids=[str(i) for i in range(len(WRONG_KINDS))])
def test_what_is_of_a_wrong_kind_is_told_with_its_place_and_what_is_right_there(changes, says, hint):
    with pytest.raises(InvalidInput) as error:
        experiment.prepare_sampling(experiment.prepare(digits(**changes)))
    text = str(error.value)
    assert says in text and hint in text
    assert "\n" not in text


def test_a_wrong_kind_anywhere_is_told_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(configs, "_built", lambda *args: pytest.fail("something was built"))
    for changes, *_ in WRONG_KINDS[:14]:
        with pytest.raises(InvalidInput):
            experiment.prepare(digits(**changes))


def test_a_part_of_ones_own_needs_nothing_but_the_annotation_of_what_it_returns(monkeypatch):
    """What a constructor makes is read off its annotations; without any, off what it has made."""
    from diffusion_jax import solvers
    from diffusion_jax.typing import Network, Solver

    def told(eta: float = 0.5) -> Solver:
        return solvers.ddim(eta)

    def untold(eta=0.5):
        return solvers.ddim(eta)

    own = {"mine.told": told, "mine.untold": untold}
    monkeypatch.setattr(configs, "constructor", lambda name: own[name])
    for name in own:
        assert build({"call": name, "eta": 0.25}, Solver, "config.solver").order == 1
        with pytest.raises(InvalidInput, match=r"config\.model is"):
            build({"call": name}, Network, "config.model")


def test_what_a_constructor_cannot_work_with_is_one_sentence_with_its_cause():
    def broken(size: int = 1):
        return [0][size]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "constructor", lambda name: broken)
        with pytest.raises(InvalidInput, match=r"config\.x: mine cannot be made .*IndexError") as error:
            build({"call": "mine", "size": 3}, object, "config.x")
    assert isinstance(error.value.__cause__, IndexError)


@pytest.mark.parametrize("text", ['{"a.b": 1}', "[1]", '{"x": ' + "[" * 1000 + "]" * 1000 + "}", "null", '"x"'])
def test_a_stored_config_that_is_none_is_told(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"config\.json"):
        configs.load(str(tmp_path / "config.json"))
