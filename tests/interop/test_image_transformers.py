"""DiT and PixArt folders that are written here are read here; what a layout cannot hold is refused in one sentence."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import interop, models
from diffusion_jax.errors import InvalidInput

KNOWN = {"width": 12, "depth": 2, "heads": 2, "in_channels": 3, "base_size": 4}
CASES = {
    "DiTTransformer2DModel": models.dit(**KNOWN, conditions=(models.label(3),), frequency_shift=1.0, mlp_norm_eps=1e-5),
    "DiTTransformer2DModel, per block": models.dit(
        **KNOWN,
        conditions=(models.label(3),),
        frequency_shift=1.0,
        embeddings="per_block",
        learn_sigma=True,
        qkv_bias=False,
    ),
    "PixArtTransformer2DModel": models.pixart(
        **KNOWN, conditions=(models.context("mlp", 5), models.sizes()), interpolation_scale=2.0
    ),
    "PixArtTransformer2DModel, raw": models.pixart(
        **KNOWN, conditions=(models.context("none", 5),), learn_sigma=False, norm_eps=1e-5, mlp_norm_eps=1e-5
    ),
    "dit_original": models.dit(**KNOWN, conditions=(models.label(3),), learn_sigma=True, mlp_ratio=2.0),
    "dit_original, learned": models.dit(**KNOWN, conditions=(models.label(3),), positions="learned"),
}


def pretrained(network, family):
    rng = np.random.default_rng(0)
    shapes = interop.FAMILIES[family].shapes(network)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    return interop.Pretrained(network, params, family, {})


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_loaded(name, tmp_path):
    saved = pretrained(CASES[name], name.split(",")[0])
    loaded = interop.load_pretrained(interop.save_pretrained(tmp_path, saved))
    assert loaded.network.module == saved.network.module
    chex.assert_trees_all_equal(loaded.params, saved.params)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("DiTTransformer2DModel", {"frequency_shift": 0.0}, "frequency_shift is 0.0, but a DiTTransformer2DModel has"),
        ("DiTTransformer2DModel", {"qk_norm": True}, "qk_norm is True"),
        ("DiTTransformer2DModel", {"in_channels": 0}, "in_channels is 0"),
        ("DiTTransformer2DModel", {"base_size": 0}, "base_size is 0"),
        ("dit_original", {"frequency_shift": 1.0}, "frequency_shift is 1.0, but a dit_original has"),
        ("dit_original", {"embeddings": "per_block"}, "embeddings is 'per_block'"),
        ("dit_original", {"conditions": (models.label(3), models.pooled(1, 4))}, "a dit_original has Label only"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_before_anything_is_written(family, fields, message, tmp_path):
    shift = 1.0 if family == "DiTTransformer2DModel" else 0.0
    network = models.dit(**{**KNOWN, "conditions": (models.label(3),), "frequency_shift": shift, **fields})
    with pytest.raises(InvalidInput, match=message):
        interop.save_pretrained(tmp_path / "none", pretrained(network, family))
    assert not (tmp_path / "none").exists()


def test_copies_that_differ_are_refused_when_they_are_told_to_be_one(tmp_path):
    name = "DiTTransformer2DModel, per block"
    folder = interop.save_pretrained(tmp_path, pretrained(CASES[name], "DiTTransformer2DModel"))
    assert interop.load_pretrained(folder).network.module.embeddings == "per_block"
    with pytest.raises(InvalidInput, match=r"differ, but here they are one tensor"):
        interop.load_pretrained(folder, embeddings="shared")


def test_a_state_dict_of_another_width_needs_its_heads(tmp_path):
    saved = pretrained(CASES["dit_original"], "dit_original")
    folder = interop.save_pretrained(tmp_path, saved)
    (folder / "config.json").unlink()
    file = folder / "diffusion_pytorch_model.safetensors"
    with pytest.raises(InvalidInput, match="known for 384, 768, 1024, 1152 only: give heads="):
        interop.load_pretrained(file, family="dit_original")
    assert interop.load_pretrained(file, family="dit_original", heads=2).network.module == saved.network.module
