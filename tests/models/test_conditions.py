"""Conditions as values: a kind of one's own enters every network that has the entry, and no network knows of it."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.config import load
from diffusion_jax.config.overrides import apply_overrides
from diffusion_jax.denoisers.conditions import null_condition
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import prepare
from diffusion_jax.models.layers import ConditionEncoder
from diffusion_jax.models.layers.conditioning import check_condition
from tests.models.shared import T, changed, compiled, drawn_params, image, labels, tiny_dit


@dataclasses.dataclass(frozen=True)
class Own(models.ConditionStream):
    """Five numbers that enter somewhere; timed: times t, so that they say nothing at t = 0."""

    entry: str
    timed: bool = False

    @property
    def name(self):
        return self.entry + "_timed" * self.timed

    @property
    def keys(self):
        return (models.CondKey(self.name, ("B", 5)),)

    @property
    def enters(self):
        return (self.entry,)

    def embed(self, cond, place):
        depth = place.depth if self.entry == "layers" else 1
        y = nn.DenseGeneral((depth, place.width), name=self.name)(cond[self.name])
        if self.timed:
            t = place.t.reshape(len(y), -1).mean(axis=1) / 1000
            y = y * t[:, None, None]
        if self.entry in ("context", "tokens"):
            return {self.entry: models.Attended(y)}
        if self.entry == "layers":
            return {"layers": jnp.moveaxis(y, 1, 0)}
        if self.entry == "channels":
            y = y[:, 0, :2].reshape(len(y), *(1,) * (len(place.shape) - 2), 2)
            return {"channels": jnp.broadcast_to(y, (*place.shape[:-1], 2))}
        return {"vector": y[:, 0]}


WORDS = np.array([[1, 2, 4], [3, 0, 2]], np.int32)
SMALL = {"width": 16, "depth": 2, "heads": 2}
NETWORKS = {
    "dit": (functools.partial(models.dit, **SMALL), image((2, 4, 6, 3))),
    "video_dit": (functools.partial(models.video_dit, **SMALL), image((2, 2, 4, 4, 1))),
    "joint_transformer": (
        functools.partial(models.joint_transformer, {"image": (2, 2), "words": 5}, registers=1, skips=True, **SMALL),
        {"image": image((2, 4, 4, 1)), "words": WORDS},
    ),
    "text_transformer": (functools.partial(models.text_transformer, 5, **SMALL), WORDS),
    "mlp": (functools.partial(models.mlp, width=16, depth=2), image((2, 4))),
    "unet": (
        functools.partial(models.unet, channels=8, multipliers=(1,), num_residual=1, attention=(1,), groups=4, heads=2),
        image((2, 4, 4, 1)),
    ),
}
ENTRIES = {
    "dit": ("vector", "context", "tokens", "channels", "layers"),
    "video_dit": ("vector", "context", "channels", "layers"),
    "joint_transformer": ("vector", "context", "tokens", "layers"),
    "text_transformer": ("vector", "context", "tokens", "layers"),
    "mlp": ("vector", "channels", "layers"),
    "unet": ("vector", "context", "channels"),
}


def streams(name):
    return tuple(Own(entry, timed) for entry in ENTRIES[name] for timed in (False, True))


@functools.cache
def case(name):
    """A network with all its entries in use: its program, an x and a condition."""
    make, x = NETWORKS[name]
    network = make(conditions=streams(name))
    cond = {stream.name: np.asarray(image((2, 5), seed)) for seed, stream in enumerate(streams(name))}
    params = drawn_params(network, x, T, cond)

    def apply(t, cond):
        output = network.apply(params, x, t, cond)[0]
        return jnp.concatenate([leaf.reshape(2, -1) for leaf in jax.tree.leaves(output)], axis=1)

    return compiled(apply), x, cond


@pytest.mark.parametrize(("name", "entry"), [(name, entry) for name in NETWORKS for entry in ENTRIES[name]])
def test_a_condition_of_ones_own_enters_where_it_says(name, entry):
    apply, _, cond = case(name)
    start, zero = apply(T, cond), np.zeros(2, np.float32)
    for timed in (False, True):
        key = Own(entry, timed).name
        other = {**cond, key: changed(cond[key], 0, cond[key][0] + 3.0)}
        change = np.abs(apply(T, other) - start).max(axis=1)
        assert change[0] > 1e-4 and change[1] == 0.0, "it is the sample's own"
        change = np.abs(apply(zero, other) - apply(zero, cond)).max(axis=1)
        assert (change[0] > 1e-4) == (not timed) and change[1] == 0.0


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_without_an_entry_says_so_when_it_is_made(name):
    make, _ = NETWORKS[name]
    for entry in ("vector", "context", "tokens", "channels", "layers", "residuals"):
        if entry not in ENTRIES[name]:
            with pytest.raises(InvalidInput, match=rf"conditions\[1\] .*{entry}.*; {name} takes vector"):
                make(conditions=(models.label(3), Own(entry)))


@pytest.mark.parametrize("name, prefix", [("dit", (2, 4, 6)), ("text_transformer", (2, 3))])
def test_beside_tokens_that_join_equal_times_are_one_time(name, prefix):
    apply, _, cond = case(name)
    wide = np.broadcast_to(np.asarray(T).reshape(2, *(1,) * (len(prefix) - 1)), prefix)
    np.testing.assert_allclose(apply(wide, cond), apply(T, cond), atol=2e-5)


@dataclasses.dataclass(frozen=True)
class Joining(models.ConditionStream):
    """Tokens as they are, behind a mask."""

    keys = (models.CondKey("more", ("B", "M", 16)), models.CondKey("more_mask", ("B", "M"), jnp.generic, optional=True))
    enters = ("tokens",)

    def embed(self, cond, place):
        return {"tokens": models.Attended(cond["more"], cond.get("more_mask"))}


def test_tokens_behind_the_mask_are_not_there():
    network, plain, x = tiny_dit(conditions=(Joining(),)), tiny_dit(conditions=()), image()
    cond = {"more": np.asarray(image((2, 3, 16))), "more_mask": np.array([[1, 0, 0], [0, 0, 0]], bool)}
    params = drawn_params(network, x, T, cond)
    apply = compiled(lambda cond: network.apply(params, x, T, cond)[0])
    start = apply(cond)
    np.testing.assert_array_equal(apply({**cond, "more": changed(cond["more"], np.s_[:, 1:], 9.0)}), start)
    alone = compiled(plain.apply)(params, x, T)[0]
    np.testing.assert_allclose(start[1], alone[1], atol=1e-5)
    assert np.abs(start[0] - alone[0]).max() > 1e-3
    null = models.empty_condition(network.module.conditions, cond)
    np.testing.assert_allclose(apply(null), alone, atol=1e-5)


def test_a_network_with_conditions_by_layer_and_in_front_is_cut_like_any_other():
    apply, x, cond = case("dit")
    network = NETWORKS["dit"][0](conditions=streams("dit"))
    params, parts = drawn_params(network, x, T, cond), models.staged(network)

    def whole(cond):
        h = parts.body(params, parts.head(params, x, T, cond), x, T, cond)
        return parts.tail(params, h, x, T, cond)[0].reshape(2, -1)

    np.testing.assert_allclose(compiled(whole)(cond), apply(T, cond), atol=1e-5)


def test_sequences_stand_one_after_the_other_behind_one_learned_token():
    x, cond = image(), {"context": image((2, 4, 9)), "tokens": WORDS}
    encoder = ConditionEncoder(16, (models.context("mlp"), models.text(5, depth=1)))
    params = jax.eval_shape(encoder.init, jax.random.key(0), T, cond, x.shape)
    told = jax.eval_shape(encoder.apply, params, T, cond, x.shape)
    assert told.context.shape == (2, 1 + 4 + 3, 16) and told.context_mask.shape == (2, 8)
    assert params["params"]["null_token"].shape == (16,)


def test_networks_with_equal_conditions_are_equal():
    make = functools.partial(models.mlp, 16, 2)
    one, same = (make(conditions=(models.label(3), Own("layers"))).module for _ in range(2))
    assert one == same and hash(one) == hash(same)
    assert one != make(conditions=(models.label(4), Own("layers"))).module


def test_a_condition_that_embeds_nothing_is_told():
    network = models.mlp(16, 2, conditions=(models.ConditionStream(),))
    with pytest.raises(InvalidInput, match="ConditionStream has no embed"):
        network.init(jax.random.key(0), image((2, 4)), T)


@pytest.mark.parametrize(
    ("stream", "cond", "told"),
    [
        (models.label(3), {"label": np.array([0, 4])}, "label'] is 4, but .* 0 to 2, and 3 for none"),
        (models.label(3), {"label": np.array([-1, 0])}, "label'] is -1"),
        (models.label(3), {"label": np.array([0.0, 1.0])}, "dtype integer"),
        (models.label(3), {"label": np.array([0, 1, 2])}, r"int64\[3\]', but shape \[2\]"),
        (models.label(3), {}, "needs the condition 'label'"),
        (models.label(3), {"label": np.array([0, 1]), "labels": 1}, "did you mean 'label'"),
        (models.context(channels=6), {"context": np.zeros((2, 4, 5))}, r"shape \[2, 4, 6\]"),
        (models.context(), {"context": np.zeros((2, 4, 5)), "context_mask": np.ones((2, 3))}, r"shape \[2, 4\]"),
        (models.concat(), {"concat": np.zeros((2, 4, 5, 1))}, r"shape \[2, 4, 4, C\]"),
        (models.pooled(1, 9, 2), {"pooled": np.zeros((2, 5)), "time_ids": np.zeros((2, 3))}, "3 time ids of 2"),
        (models.sizes(), {"size": np.zeros((2, 3)), "aspect": np.zeros(2)}, r"cond\['size'\]"),
    ],
)
def test_values_that_do_not_fit_are_told_in_one_sentence(stream, cond, told):
    with pytest.raises(InvalidInput, match=told.replace("']", r"'\]")) as error:
        check_condition((stream,), cond, {"B": 2, "*x": (2, 4, 4)})
    assert "\n" not in str(error.value)


def test_labels_are_looked_at_where_they_are_known():
    network, x = models.mlp(16, 1, conditions=(models.label(3),)), image((2, 4))
    params = drawn_params(network, x, T, labels(0, 1))
    with pytest.raises(InvalidInput, match="0 to 2"):
        network.apply(params, x, T, labels(0, 5))
    # Data to train on, before anything is compiled.
    config = apply_overrides(load("configs/digits_dit.py"), ["model.conditions.0.num_classes=7"])
    with pytest.raises(InvalidInput, match="0 to 6"):
        prepare(config)


def test_nulls_of_guidance_come_from_the_conditions():
    conditions = (models.label(3), models.sizes(), Own("vector"))
    cond = {**labels(0, 2), "size": np.ones((2, 2)), "aspect": np.ones(2), "vector": np.ones((2, 5), np.float32)}
    null = functools.partial(models.empty_condition, conditions)
    expected = {"label": np.array([3, 3]), "size": cond["size"], "aspect": cond["aspect"], "vector": np.zeros((2, 5))}
    chex.assert_trees_all_equal(null(cond), expected)
    assert null(None) is None
    chex.assert_trees_all_equal(null_condition(cond, null), expected)


def test_the_scale_of_guidance_joins_the_sinusoids_of_the_time():
    """1000 (scale - 1) at frequencies from 1 to 1/10000, sines first, through a linear layer."""
    encoder = ConditionEncoder(8, (models.guidance_scale(6),), time_features=4)
    t, scale = jnp.asarray([3.0, 500.0]), jnp.asarray([1.0, 7.5])
    made = encoder.init(jax.random.key(0), t, {"guidance_scale": scale}, (2, 2, 2, 1))["params"]
    params = jax.tree.map(lambda leaf: 10 * leaf + 0.1, made)
    found = encoder.apply({"params": params}, t, {"guidance_scale": scale}, (2, 2, 2, 1)).vector

    angles = 1000 * (np.asarray(scale)[:, None] - 1) * 10.0 ** np.array([0.0, -2.0, -4.0])
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    times = np.asarray(t)[:, None] * 10.0 ** np.array([0.0, -2.0])
    y = np.concatenate([np.cos(times), np.sin(times)], axis=-1) + waves @ np.asarray(params["guidance"]["kernel"])
    y = y @ np.asarray(params["time"]["up"]["kernel"]) + np.asarray(params["time"]["up"]["bias"])
    y = y / (1 + np.exp(-y))
    y = y @ np.asarray(params["time"]["down"]["kernel"]) + np.asarray(params["time"]["down"]["bias"])
    np.testing.assert_allclose(found, y, rtol=2e-4, atol=2e-4)


def test_a_network_that_is_told_the_scale_is_unconditional_at_no_other():
    stream = models.guidance_scale(4)
    cond = {"guidance_scale": jnp.asarray([1.0, 3.0])}
    chex.assert_trees_all_equal(models.empty_condition((stream,), cond), cond)
    for features in (0, 2, 5):
        with pytest.raises(InvalidInput, match=f"features is {features}"):
            models.guidance_scale(features)


@pytest.mark.parametrize(("step", "prefix"), [(False, (2,)), (True, (2,)), (True, (2, 4, 4))])
def test_a_network_is_told_the_time_that_it_jumps_to(step, prefix):
    """One target a sample or a patch, as the time; told the length alone, equal lengths are one answer at equal t."""
    network = tiny_dit(conditions=(models.target_time(step),), patch=2)
    x, t = image((2, 4, 4, 2)), jnp.full(prefix, 600.0)
    params = drawn_params(network, x, t, {"target_time": t})

    def ask(t, target):
        return compiled(network.apply)(params, x, t, {"target_time": target})[0]

    near, far = ask(t, t - 1), ask(t, t - 500)
    assert np.abs(near - far).max() > 1e-3
    only_first = ask(t, (t - 1).at[0].add(-499))
    np.testing.assert_allclose(only_first[0], far[0], atol=1e-5)
    np.testing.assert_allclose(only_first[1], near[1], atol=1e-5)
    # What is embedded is the target, or the length of the jump.
    other = tiny_dit(conditions=(models.target_time(not step),), patch=2)
    np.testing.assert_allclose(compiled(other.apply)(params, x, t, {"target_time": t - (t - 1)})[0], near, atol=1e-5)
    with pytest.raises(InvalidInput, match="cond\\['target_time'\\]"):
        network.apply(params, x, t, {"target_time": jnp.zeros(3)})
