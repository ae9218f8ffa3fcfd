"""Pusa: what is given in each task, adaptations that begin as the base, and the published size of the adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.config import build, load
from diffusion_jax.recipes import pusa
from diffusion_jax.recipes.study import Study, table
from diffusion_jax.stages import Stage, stage_key

CONFIG = "configs/recipes/pusa.py"


def test_a_task_gives_one_frame_or_none():
    given = pusa.given_frames(12, 8)
    assert {task: frames.sum(1).tolist() for task, frames in given.items()} == {
        task: [int(task != "label")] * 12 for task in pusa.TASKS
    }
    assert given["first"][:, 0].all() and given["last"][:, -1].all()
    assert not given["middle"][:, [0, -1]].any() and (given["middle"].sum(0)[1:-1] == 2).all()


def keys(change=None):
    """The keys of the stages with a field of the config changed."""
    config = load(CONFIG)
    if change is not None:
        config.update_from_flattened_dict(change)

    def made(name, key):
        return Stage(name, key, None, None, 0.0, False)

    base = made("base", stage_key(config.base))
    own = made("own", stage_key(config.own, base, make=pusa.own_samples))
    arms = {name: stage_key(arm, base, own, prepare=pusa.adapted) for name, arm in config.arms.items()}
    return {"base": base.key, "own": own.key, **arms}


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"clips": 7, "grid.grid.steps": 3, "scale": 2.0}, set()),
        ({"arms.VTA.train.steps": 3}, {"VTA"}),
        ({"own.count": 64}, {"own", *load(CONFIG).arms}),
        ({"own.grid.grid.steps": 3}, {"own", *load(CONFIG).arms}),
        ({"base.seed": 1}, {"base", "own", *load(CONFIG).arms}),
    ],
)
def test_a_stage_depends_on_what_it_reads_and_on_its_parents_alone(change, changed):
    before, after = keys(), keys(change)
    assert {name for name in before if before[name] != after[name]} == changed
    assert len(set(before.values())) == len(before)


@pytest.mark.usefixtures("one_device")
def test_every_adaptation_begins_as_the_base_and_given_frames_do_not_move(tmp_path):
    """The smoke run has no arm of channels."""
    config = load(f"{CONFIG}:smoke")
    whole, small = load(CONFIG).arms[pusa.CONCAT].to_dict(), config.arms.VTA.to_dict()
    conditions, select = whole["model"]["conditions"], whole["lora"]["select"]
    small["model"], small["lora"] = {**small["model"], "conditions": conditions}, {**small["lora"], "select": select}
    config.arms[pusa.CONCAT] = {**small, "objective": whole["objective"]}
    s = Study(config, (0,), tmp_path, True, {})
    base = s.stage("base", config.base)
    own = s.stage("own samples", config.own, base, make=pusa.own_samples)
    assert own.value["x0"].shape == (8, *base.trained.shape) and sorted(own.value["label"]) == sorted([0, 1, 2, 3] * 2)
    factors = {name: {0: s.stage(name, arm, base, own, prepare=pusa.adapted)} for name, arm in config.arms.items()}
    known = np.random.default_rng(0).standard_normal((4, *base.trained.shape)).astype(np.float32)
    given = pusa.given_frames(4, 8)
    arms = pusa.adapted_arms(s, base, factors, own.value["label"][:4], known, given)(0)
    fresh = arms[f"{pusa.CONCAT}, first"]
    begun = jax.tree.map(jnp.zeros_like, fresh.params["lora"])
    chosen = {name: arms[name] for name in ("base, label", "VTA, middle", f"{pusa.CONCAT}, first")}
    chosen["unchanged"] = fresh._replace(params={**fresh.params, "lora": begun})
    x = table(chosen, (0,), {}, shape=base.trained.shape, count=4).samples
    np.testing.assert_array_equal(x["VTA, middle"][given["middle"]], known[given["middle"]])
    np.testing.assert_allclose(x["unchanged"], x["base, label"], atol=1e-4)
    assert fresh.cond["concat"].shape[-1] == known.shape[-1] + 1


def test_the_published_settings_make_an_adapter_of_a_large_network():
    config = load(f"{CONFIG}:paper")
    base = build(config.model)
    adapted = build(config.lora, network=base)
    x, cond = jnp.zeros((1, 2, 4, 4, 16)), {"context": jnp.zeros((1, 3, 4096))}
    params = jax.eval_shape(base.init, jax.random.key(0), x, jnp.zeros(1), cond)
    factors = jax.eval_shape(adapted.init, jax.random.key(0), params, x, jnp.zeros(1), cond)
    whole, part = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, factors))
    assert whole > 14e9
    # Rank 512 of q, k, v, o (twice: also towards the text) and of both matrices of the feed-forward layer, 40 blocks.
    assert part == 40 * 512 * (8 * 2 * 5120 + 2 * (5120 + 13824))
    objective = build(config.objective, network=adapted.network, process=build(config.process))
    batch = {"x0": jnp.zeros((500, 2, 1, 1, 1)), "index": jnp.arange(500)}
    t = objective.prepare((), batch, jax.random.key(1))["t"]
    assert t.shape == (500, 2)
    assert float(jnp.median(t)) == pytest.approx(5 / 6, abs=0.02)
    assert build(config.grid).shape == (11,)
