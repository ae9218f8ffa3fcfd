"""Three stages are the network, and what is left out is really left out."""

import jax
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.adapters import lora
from diffusion_jax.errors import InvalidInput
from tests.models.shared import compiled, drawn_params, image, labels

CASES = {
    "dit": (lambda: models.dit(width=16, depth=3, heads=2, conditions=(models.label(3),)), (2, 4, 4, 1)),
    "dit_per_block": (
        lambda: models.dit(width=16, depth=3, heads=2, conditions=(models.label(3),), embeddings="per_block"),
        (2, 4, 4, 1),
    ),
    "video": (lambda: models.video_dit(width=16, depth=4, heads=2, conditions=(models.label(3),)), (2, 3, 4, 4, 1)),
    "mlp": (lambda: models.mlp(width=16, depth=3, conditions=(models.label(3),)), (2, 5)),
    "unet": (lambda: models.unet(channels=8, groups=4, attention=(0, 0), conditions=(models.label(3),)), (2, 4, 4, 1)),
}


def drawn(name):
    make, shape = CASES[name]
    network = make()
    x, t, cond = image(shape), jax.device_put(np.array([0.3, 0.7], np.float32)), labels(0, 2)
    return network, drawn_params(network, x, t, cond), x, t, cond


def in_stages(stages, params, x, t, cond):
    z = stages.body(params, stages.head(params, x, t, cond), x, t, cond)
    return stages.tail(params, z, x, t, cond)[0]


@pytest.mark.parametrize("name", CASES)
def test_stages_one_after_the_other_are_the_network(name):
    network, params, *inputs = drawn(name)
    stages = models.staged(network)
    whole = jax.jit(network.apply)(params, *inputs)[0]
    np.testing.assert_allclose(jax.jit(lambda p: in_stages(stages, p, *inputs))(params), whole, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_head_is_blind_to_what_comes_later_and_the_tail_to_what_came_before(name):
    network, params, x, t, cond = drawn(name)
    stages = models.staged(network)

    @jax.jit
    def gradients(params):
        moved = jax.grad(lambda p: stages.head(p, x, t, cond).sum())(params)
        z = stages.body(params, stages.head(params, x, t, cond), x, t, cond)
        return moved, jax.grad(lambda p: stages.tail(p, z, x, t, cond)[0].sum())(params)

    moved, inner = gradients(params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(moved["conv_out" if name == "unet" else "final"]))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(inner["mid_0" if name == "unet" else "blocks"]))


def test_adapters_within_blocks_stay_in_force():
    network, params, *inputs = drawn("dit")
    adapted = lora(network, rank=2)
    tree = {"params": params, "lora": drawn_params(adapted.network, *inputs)["lora"]}
    whole = compiled(adapted.network.apply)(tree, *inputs)[0]
    assert np.abs(whole - compiled(network.apply)(params, *inputs)[0]).max() > 1e-3
    found = compiled(lambda tree: in_stages(models.staged(adapted.network), tree, *inputs))(tree)
    np.testing.assert_allclose(found, whole, atol=2e-6)


def test_bad_cuts_are_told():
    network = CASES["dit"][0]()
    with pytest.raises(InvalidInput, match=r"head is 4.*3 blocks"):
        models.staged(network, head=4)
    _, params, *inputs = drawn("dit")
    for wrong, message in [
        ({"depth": 5}, "anatomy.depth is 5, but there are 3 blocks"),
        ({"stack": "condition"}, "anatomy.stack is 'condition'"),
        ({"stack": "layers"}, "select='layers' selects no module"),
        ({"stack": ""}, "staged needs anatomy.stack"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            jax.eval_shape(
                models.staged(network._replace(anatomy=network.anatomy._replace(**wrong))).head, params, *inputs
            )
    with pytest.raises(InvalidInput, match="first residual block"):
        models.staged(CASES["unet"][0](), head=2)
