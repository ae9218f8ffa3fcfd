"""Which number is which class, or token: data, held-out data and the network agree before anything is trained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, experiment, models, objectives, processes, timesteps
from diffusion_jax.config import call
from diffusion_jax.errors import InvalidInput
from diffusion_jax.training import optimizers


@pytest.fixture
def folders(tmp_path):
    """Three classes to train on, of which the held-out data lack the first."""
    for part, names in (("train", ("bird", "cat", "dog")), ("test", ("cat", "dog"))):
        for number, name in enumerate(names):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(np.full((4, 4, 3), 60 * number, np.uint8)).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def configured(train, held_out, num_classes=3):
    config = experiment.defaults(steps=2, batch_size=4)
    config.data, config.held_out = train, held_out
    config.model = call("models.mlp", width=8, depth=1, conditions=(call("models.label", num_classes=num_classes),))
    config.process = call("processes.rectified_flow")
    config.objective = call("objectives.denoising")
    config.optimizer = call("training.optimizers.adamw")
    config.train.validate_every = None
    return config


def images(folder, **fields):
    return call("data.image_folder", folder=str(folder), size=4, **fields)


def test_held_out_data_are_numbered_as_the_data_to_train_on(folders):
    made = experiment.prepare(configured(images(folders / "train"), images(folders / "test")))
    assert made.source.labels == (0, 0, 1, 1, 2, 2) and made.held_out.labels == (1, 1, 2, 2)
    # What is stored says so too, also once a class has come.
    stored = json.loads(json.dumps(made.config.to_dict()))
    assert stored["data"]["class_names"] == stored["held_out"]["class_names"] == ["bird", "cat", "dog"]


def test_classes_that_cannot_agree_are_refused(folders):
    given = images(folders / "test", class_names=("cat", "dog"))
    with pytest.raises(InvalidInput, match="'bird' and 'cat' have one number"):
        experiment.prepare(configured(images(folders / "train"), given))
    with pytest.raises(InvalidInput, match=r"classes of data is 3, but the network knows 2, 0 to 1"):
        experiment.prepare(configured(images(folders / "train"), images(folders / "test"), num_classes=2))
    with pytest.raises(InvalidInput, match="'bird', which is not one of class_names"):
        experiment.prepare(configured(images(folders / "test"), images(folders / "train")))


def test_a_run_is_not_resumed_with_other_classes(folders):
    state = data.pipeline(data.image_folder(str(folders / "test"), size=4), 2).get_state()
    assert json.loads(json.dumps(state)) == state
    renamed = data.image_folder(str(folders / "test"), size=4, class_names=("dog", "cat"))
    with pytest.raises(InvalidInput, match=r"class_names of the data is \['dog', 'cat'\]"):
        data.pipeline(renamed, 2).set_state(state)


class Own:
    """A source of a user's own, which does not say how many classes it has."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"x0": np.zeros(3, np.float32), "cond": {"label": np.int32(self.labels[index])}}


@pytest.mark.parametrize("wrong", [3, 4, -1])
def test_a_label_of_no_class_ends_a_run_in_a_sentence(wrong, tmp_path):
    """Labels 1 .. N among them: N is the null class of the network, and never that of data."""
    config = configured(call("data.digits"), call("data.digits"))
    source = Own([0, 1, 2, 0, 1, 2, 0, wrong])
    made = experiment.prepare(config, source=source, held_out=Own([0]))
    config.train.batch_size = 8
    with pytest.raises(InvalidInput, match=rf"cond\['label'\] is {wrong}, but the network knows the classes 0 to 2\."):
        experiment.fit(made._replace(config=config), progress=False)
    # In memory all labels are known at once.
    whole = data.ArraySource(np.zeros((8, 3), np.float32), {"label": np.asarray(source.labels)})
    with pytest.raises(InvalidInput, match=f"is {wrong}, but"):
        experiment.prepare(config, source=whole, held_out=Own([0]))


@pytest.mark.parametrize(
    ("tokens", "part"),
    [
        (np.full((4, 6), 5), "a token of x0 is 5, but the process knows 5, 0 to 4"),
        (np.full((4, 6), -1), "a token of x0 is -1"),
        (np.zeros((4, 6), np.uint16), "unsigned integers in files are read as pixels"),
        (np.zeros((4, 6), np.float32), "int32 tokens"),
    ],
    ids=["mask", "-1", "pixels", "floats"],
)
def test_tokens_are_those_of_the_process(tokens, part):
    network = models.text_transformer(5, width=32, depth=1, heads=2)
    process = processes.absorbing(5)
    loss = objectives.masked(network, process, timesteps.uniform())
    made = experiment.Experiment(
        experiment.defaults(2, 4), data.ArraySource(tokens), None, network, process, loss, loss, optimizers.adamw(),
        None, (6,), ()
    )  # fmt: skip
    with pytest.raises(InvalidInput, match=part):
        made.check_batch(made.example(4))


def test_numbers_outside_of_a_table_never_stand_for_others():
    """Refused where they are known; a compiled program gives NaN, not the null class, its last row."""
    conditions = (models.label(3), models.text(4, depth=1, heads=2))
    network = models.dit("S/2", width=32, depth=1, heads=2, in_channels=1, conditions=conditions)
    x, t = jnp.ones((1, 4, 4, 1)), jnp.zeros(1)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = network.init(jax.random.key(0), x, t, {"label": tokens[:, 0], "tokens": tokens})
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    answer = jax.jit(lambda label, token: network.apply(params, x, t, {"label": label, "tokens": token})[0])
    known = [np.asarray(answer(jnp.full(1, n), tokens)) for n in range(4)]
    assert all(np.isfinite(one).all() for one in known) and len({one.tobytes() for one in known}) == 4
    for wrong in (4, 5, -1, -4, 2**31 - 1, -(2**31)):
        label = jnp.full(1, wrong, jnp.int32)
        assert np.isnan(answer(label, tokens)).all()
        assert np.isnan(answer(jnp.zeros(1, jnp.int32), tokens + wrong)).all()
        for cond in ({"label": label, "tokens": tokens}, {"label": tokens[:, 0], "tokens": tokens + wrong}):
            with pytest.raises(InvalidInput, match=f"is {wrong}"):
                network.apply(params, x, t, cond)


def test_the_null_class_fits_whatever_type_labels_have():
    network = models.mlp(8, 1, conditions=(models.label(1000),))
    null = models.empty_condition(network.module.conditions, {"label": np.zeros(2, np.uint8)})
    np.testing.assert_array_equal(null["label"], [1000, 1000])


@pytest.mark.parametrize(
    ("num_classes", "null", "right"), [(10, 10, 1), (12, 10, 1), (12, 9, 0), (10, 11, 0), (10, -1, 0)]
)
def test_the_null_class_is_no_class_of_the_data(num_classes, null, right):
    config = configured(call("data.digits"), call("data.digits"), num_classes)
    config.objective = call("objectives.denoising", cond_dropout=0.1, null={"label": null})
    guided = configured(call("data.digits"), call("data.digits"), num_classes)
    guided.sampling.solver = call("solvers.ddim")
    guided.sampling.grid = call("timesteps.linspace", steps=2)
    guided.sampling.transformations.guided = call("denoisers.guided", null={"label": null}, scale=2.0)
    if right:
        experiment.prepare(config)
        experiment.prepare_sampling(experiment.prepare(guided))
        return
    for make in (lambda: experiment.prepare(config), lambda: experiment.prepare_sampling(experiment.prepare(guided))):
        with pytest.raises(InvalidInput, match=rf"null\['label'\] is {null}, but .* the null class is {num_classes}"):
            make()


def test_samples_are_of_classes_that_the_network_knows():
    config = configured(call("data.digits"), call("data.digits"), num_classes=10)
    config.sampling.solver = call("solvers.ddim")
    config.sampling.grid = call("timesteps.linspace", steps=2)
    for count, known in ((10, True), (11, False)):
        config.sampling.condition = call("data.cycled_labels", num_classes=count)
        conditions = experiment.prepare_sampling(experiment.prepare(config)).conditions
        if known:
            assert set(conditions(np.arange(20))["label"]) == set(range(10))
            continue
        with pytest.raises(InvalidInput, match=r"is 10, but the network knows the classes 0 to 9\."):
            conditions(np.arange(20))
