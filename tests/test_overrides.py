"""Overrides: what is written on a command line makes the config that it says, or is refused in one sentence."""

import json
import shlex

import jax
import numpy as np
import pytest

from diffusion_jax import sample, train
from diffusion_jax.command import run_command, split_overrides
from diffusion_jax.config import ConfigDict, call, load
from diffusion_jax.config.literals import WrittenCall, read_value
from diffusion_jax.config.overrides import GROUPS_OF_PARTS, apply_overrides
from diffusion_jax.config_text import config_text
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import check_training, defaults, prepare, prepare_sampling
from diffusion_jax.places import ABOUT, GROUPS, entries_of, sampled_average

DIGITS = load("configs/digits_dit.py")


def at(config, path):
    for name in path.split("."):
        config = config[int(name)] if isinstance(config, list | tuple) else config[name]
    return config.to_dict() if isinstance(config, ConfigDict) else config


FLIP = call("data.flip").to_dict()
CACHED = "acceleration.cached_outputs(refresh=acceleration.every(interval=3), forecaster=acceleration.taylor(1))"


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["train.steps=1e3"], "train.steps", 1000),
        (["train.clip_norm=2e0"], "train.clip_norm", 2.0),
        (["train.snapshot_every=1.5e3"], "train.snapshot_every", 1500),
        (["optimizer.weight_decay=0"], "optimizer.weight_decay", 0.0),
        (["optimizer.learning_rate.warmup_steps=100"], "optimizer.learning_rate.warmup_steps", 100),
        (["optimizer.learning_rate=1e-4"], "optimizer.learning_rate", 1e-4),
        (
            ["optimizer.learning_rate=1e-4", "optimizer.learning_rate.call=training.optimizers.constant"],
            "optimizer.learning_rate.value",
            1e-4,
        ),
        (["ema={}"], "ema", {}),
        (["sampling.transformations={}"], "sampling.transformations", {}),
        (["sampling.transformations.guidance=None"], "sampling.transformations.guidance", None),
        (["train.transforms.flip.call=data.flip"], "train.transforms.flip", FLIP),
        (["train.transforms.flip=data.flip"], "train.transforms.flip", FLIP),
        (["train.transforms={'flip': data.flip()}"], "train.transforms", {"flip": FLIP}),
        (["train.transforms.flip=data.flip(0.25)"], "train.transforms.flip.probability", 0.25),
        (["sampling.solver=solvers.ddim(eta=1)"], "sampling.solver", {"call": "solvers.ddim", "eta": 1}),
        (["sampling.solver=solvers.ddim"], "sampling.solver", {"call": "solvers.ddim", "eta": 0.0}),
        (
            ["sampling.condition=None", "sampling.condition.call=data.cycled_labels(num_classes=3)"],
            "sampling.condition.num_classes",
            3,
        ),
        (
            ["sampling.condition.call=data.conditions_of", "sampling.condition.source.call=data.digits"],
            "sampling.condition.source.size",
            8,
        ),
        (
            [f"sampling.acceleration={CACHED}"],
            "sampling.acceleration.forecaster",
            {"call": "acceleration.taylor", "order": 1},
        ),
        (
            ["sampling.acceleration.preset=foca", "sampling.acceleration.interval=4"],
            "sampling.acceleration.interval",
            4,
        ),
        (["model.conditions=(models.label(7), models.pooled())"], "model.conditions.0.num_classes", 7),
        (["model.conditions.0=models.label(num_classes=7)"], "model.conditions.0.num_classes", 7),
        (
            ["optimizer.call=training.optimizers.alternating", "optimizer.parts.a=training.optimizers.sgd"],
            "optimizer.parts.a.momentum",
            None,
        ),
        (["objective.null={'label': 3}"], "objective.null", {"label": 3}),
        (["data.split=10"], "data.split", "10"),
        (["optimizer=optax:sgd(learning_rate=0.1)"], "optimizer.call", "optax:sgd"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_an_override_that_makes_sense_is_taken(overrides, path, value):
    found = at(apply_overrides(DIGITS, overrides), path)
    assert found == value and isinstance(found, type(value))
    assert isinstance(found, bool) == isinstance(value, bool) and isinstance(found, float) == isinstance(value, float)


def test_what_is_taken_can_be_made():
    """Of those whose parts lie outside of the place that they were made for."""
    for text in (
        f"sampling.acceleration={CACHED}",
        "sampling.transformations={}",
        "sampling.transformations.guidance=None",
    ):
        assert prepare_sampling(prepare(apply_overrides(DIGITS, [text]))).denoiser
    with pytest.raises(InvalidInput, match="did you mean 'interval'"):
        wrong = ["sampling.acceleration.preset=foca", "sampling.acceleration.intervall=4"]
        prepare_sampling(prepare(apply_overrides(DIGITS, wrong)))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sampling.slover.call=solvers.ddim", "did you mean 'solver'"),
        ("sampling.solver=solvers.dimm", "did you mean 'ddim'"),
        ("sampling.solver=solvers.ddim(eat=1)", "did you mean 'eta'"),
        ("sampling.solver=solvers.ddim(1, 2)", "it takes eta"),
        ("sampling.solver=solvers.ddim(eta=", "a call reads"),
        ("sampling.solver=solvers.ddim(**{})", "a call reads"),
        ("sampling.solver=solvers.ddim(eta=1 + 1)", "a call reads"),
        ("sampling.solver=ddim", "put a call in its place"),
        ("train.transforms.flip=3", "is empty; what is added to it is a call"),
        ("ema.avrage=None", "did you mean 'average'"),
        ("ema.second.decay=0.5", "--config.ema.second.call=NAME"),
        ("train.steps=1e300", "expected int"),
        ("train.steps=50.5", "expected int"),
        ("data.split=None", "expected a str"),
        ("optimizer.b1=high", "expected a float"),
        ("objective.null.lable=3", "did you mean 'label'"),
        ("sampling.transformations={'a.b': denoisers.guided()}", "names must be those of fields"),
        ("seed=solvers.ddim()", "expected int"),
        ("model.conditions.5=models.label(3)", "one of the 1 entries"),
        ("optimizer.call=optax.sgd", "'package.module:name'"),
    ],
)  # fmt: skip
def test_what_makes_none_is_told_with_what_would(override, says):
    with pytest.raises(InvalidInput) as error:
        apply_overrides(DIGITS, [override])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000),
        ("-2E2", -200),
        ("1e-3", 0.001),
        ("1.0", 1.0),
        ("1e300", 1e300),
        ("True", True),
        ("none", None),
        ("S/2", "S/2"),
        ("{1, 2}", "{1, 2}"),
        ("b'x'", "b'x'"),
        ("1 + 1", "1 + 1"),
        ("__import__('os')", "__import__('os')"),
        ("a:b(1)", WrittenCall("a:b", (1,), {})),
        (
            "{'x': p.q:f(g='a:b(c', h=[m.n()])}",
            {"x": WrittenCall("p.q:f", (), {"g": "a:b(c", "h": [WrittenCall("m.n", (), {})]})},
        ),
        ("(" * 3000, "(" * 3000),
        ("a\0b", "a\0b"),
    ],
    ids=range(16),
)
def test_text_is_parsed_and_never_evaluated(text, value):
    read = read_value(text)
    assert read == value and type(read) is type(value)


def test_an_override_is_one_argument_or_two():
    argv = ["--config", "a.py", "--config.train.steps", "50", "--x", "--config.seed=-1", "--config.seed", "-1", "b"]
    assert split_overrides(argv) == (["train.steps=50", "seed=-1", "seed=-1"], ["--config", "a.py", "--x", "b"])
    for wrong in (["--config.seed"], ["--config.seed", "--workdir"]):
        with pytest.raises(InvalidInput, match=r"--config\.seed=VALUE"):
            split_overrides(wrong)


@pytest.mark.parametrize("name", ["digits_dit", "toy2d", "shapes_text_dit"])
def test_the_printed_config_is_the_overrides_that_make_it(name):
    config = load(f"configs/{name}.py")
    lines = [text.removeprefix("--config.") for text in shlex.split(config_text(config), comments=True)]
    blank = apply_overrides(
        config, ["optimizer=None", "objective=None", "sampling.solver=None", "seed=7", "train.steps=1"]
    )
    assert apply_overrides(blank, lines) == config


def test_a_config_is_printed_for_a_file_and_for_a_run_and_nothing_else_is_needed(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        run_command(train.main, ["--print-config", "--config=configs/digits_dit.py", "--config.train.steps", "7"])
    printed = capsys.readouterr().out
    assert left.value.code == 0
    assert "--config.train.steps=7 " in printed and "int: batches to train on" in printed
    assert "# int | None: None is as many as train.steps" in printed and "int: pixels of background" in printed
    (tmp_path / "config.json").write_text(json.dumps(DIGITS.to_dict()))
    with pytest.raises(SystemExit):
        run_command(sample.main, [f"--workdir={tmp_path}", "--print-config", "--config.ema={}"])
    assert "sampling.ema has no effect" in capsys.readouterr().out
    assert run_command(sample.main, [f"--workdir={tmp_path}", "--print-config", "--config.sed=1"]) == 2


def test_what_a_preset_takes_is_printed_with_its_values():
    printed = config_text(apply_overrides(DIGITS, ["sampling.acceleration.preset=foca", "model.patch=1"]))
    assert "# sampling.acceleration also takes: interval=5, warmup=3, step=1.0\n" in printed
    assert "# model also takes: mlp_ratio, " in printed


def test_every_field_says_what_it_is_for():
    config = defaults(steps=1, batch_size=1)
    fields = [*config.keys(), *(f"{group}.{name}" for group in ("train", "sampling") for name in config[group])]
    assert not {*fields} - {*ABOUT} and {*GROUPS_OF_PARTS} == {*GROUPS}


def test_a_schedule_has_the_length_of_the_run():
    rates = {}
    for steps in (40, 400):
        rate = prepare(apply_overrides(DIGITS, [f"train.steps={steps}"])).optimizer.learning_rate
        rates[steps] = [float(rate(count)) for count in (0, steps // 20 - 1, steps // 20, steps)]
        assert rates[steps] == pytest.approx([2e-3 / (steps // 20), 2e-3, 2e-3, 0.0], abs=1e-9)
    explicit = ["optimizer.learning_rate.total_steps=80", "train.steps=40"]
    assert float(prepare(apply_overrides(DIGITS, explicit)).optimizer.learning_rate(40)) > 1e-3
    with pytest.raises(InvalidInput, match="larger than warmup_steps"):
        prepare(apply_overrides(DIGITS, ["train.steps=40", "optimizer.learning_rate.warmup_steps=100"]))


def test_no_average_and_no_entry_are_what_they_say():
    assert sampled_average(DIGITS) == "average"
    assert sampled_average(apply_overrides(DIGITS, ["ema={}"])) is None
    assert sampled_average(apply_overrides(DIGITS, ["ema.average=None"])) is None
    both = ["train.transforms.a.call=data.flip", "train.transforms.b.call=data.flip", "train.transforms.a=None"]
    assert [*entries_of("train.transforms", apply_overrides(DIGITS, both))] == ["b"]


def test_classes_that_were_not_trained_are_refused():
    more = ["model.conditions.0.num_classes=20"]
    labels = prepare_sampling(prepare(apply_overrides(DIGITS, more))).conditions(np.arange(12))["label"]
    assert labels.max() == 9, "those of the data"
    beyond = apply_overrides(DIGITS, [*more, "sampling.condition.num_classes=20"])
    with pytest.raises(InvalidInput, match="the data have classes 0 to 9"):
        prepare_sampling(prepare(beyond)).conditions(np.arange(12))
    other = apply_overrides(DIGITS, [*more, "sampling.transformations.guidance.null={'label': 20}"])
    with pytest.raises(InvalidInput, match="10 was trained as the null class"):
        prepare_sampling(prepare(other))


EDGES = "timesteps.interval_clusters(distance=timesteps.log_snr_distance(parts=20), clusters=4)"
TASKS = (
    f"edges={EDGES}, objective=objectives.denoising(draw=timesteps.by_cluster(edges={EDGES}), cond_dropout=0.1, "
    "null={'label': 10})"
)
AROUND = {
    "projected": f"objectives.multitask(combiner=objectives.projected(), {TASKS})",
    "bargained": f"objectives.multitask(combiner=objectives.bargained(), {TASKS})",
    "uncertainty": f"objectives.uncertainty_weighted({TASKS})",
}


@pytest.mark.parametrize("name", AROUND)
def test_an_objective_around_another_is_trained_validated_and_sampled_as_that_one(name):
    more = [
        "train.batch_size=20",
        "model.depth=1",
        "model.conditions.0.num_classes=20",
    ]
    config = apply_overrides(DIGITS, [*more, f"objective={AROUND[name]}"])
    experiment = prepare(config)
    check_training(experiment)
    key, batch = jax.random.key(0), experiment.example(20)
    params = jax.eval_shape(experiment.init_params, key)
    told = {name: value for name, value in batch.items() if name != "cond"}

    def missed(objective):
        state = jax.eval_shape(objective.init, key, params, batch)
        with pytest.raises(InvalidInput) as error:
            jax.eval_shape(objective.loss, params, state, told, key)
        return str(error.value)

    # Only in training a condition is dropped, so only there it is missed before the network is asked.
    assert "cond_dropout" in missed(experiment.objective) and "cond_dropout" not in missed(experiment.validation)
    other = apply_overrides(config, ["sampling.transformations.guidance.null={'label': 20}"])
    with pytest.raises(InvalidInput, match="10 was trained as the null class"):
        prepare_sampling(prepare(other))
