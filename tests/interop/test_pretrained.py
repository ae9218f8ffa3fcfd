"""The core of interop on a made-up layout: what is saved is loaded, and errors name what is wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax import distributed, interop, models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.files import TensorFiles
from diffusion_jax.interop.tables import CONV, POINTWISE, StoredTensor, slots, their_shapes
from diffusion_jax.models import by_path
from tests.interop.foreign import FIELDS, FOREIGN

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(pretrained, tmp_path):
    return interop.save_pretrained(tmp_path / "saved", pretrained)


def edited(folder, change):
    """The folder with its tensors changed by `change(dict)`."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)
    return folder


def assert_equal(ours, theirs):
    assert by_path(ours).keys() == by_path(theirs).keys()
    for path, leaf in by_path(ours).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(by_path(theirs)[path]), err_msg=path)


def test_what_is_saved_is_loaded(folder, pretrained):
    loaded = interop.load_pretrained(folder)
    assert_equal(loaded.params, pretrained.params)
    assert loaded.network.module == pretrained.network.module
    assert loaded.family == "Foreign"


def test_their_file_has_their_names_and_layouts(folder, pretrained):
    tensors = load_file(folder / FILE)
    block = pretrained.params["blocks"]["block"]
    attention = block["attention"]["attention"]
    joined = np.concatenate([np.asarray(attention[name]["kernel"][1]).T for name in "qkv"])
    np.testing.assert_array_equal(tensors["layer.1.qkv.weight"], joined)
    np.testing.assert_array_equal(tensors["layer.2.time.0.bias"], pretrained.params["condition"]["time"]["up"]["bias"])
    assert tensors["head.weight"].shape == (2 * 16 + 12, 16)


def test_shards_and_their_index(pretrained, tmp_path):
    root = interop.save_pretrained(tmp_path, pretrained, max_shard_bytes=8000)
    index = json.loads((root / f"{FILE}.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(root.glob("*.safetensors"))) > 2
    assert_equal(interop.load_pretrained(root).params, pretrained.params)


@pytest.mark.parametrize("axes", [{"fsdp": 4, "data": 2}, {"tensor": 2, "fsdp": 4}])
def test_on_a_mesh_each_device_holds_its_part(folder, pretrained, axes):
    mesh = distributed.make_mesh(**axes)
    rules = distributed.Rules(fsdp_min_size=0)
    loaded = interop.load_pretrained(folder, mesh=mesh, rules=rules)
    assert_equal(loaded.params, pretrained.params)
    places = distributed.shardings(loaded.params, mesh, rules)
    assert all(leaf.sharding == place for leaf, place in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(places)))
    kernel = loaded.params["blocks"]["block"]["mlp"]["feed_forward"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size < kernel.size


def test_only_the_wanted_slices_are_read(folder):
    """One process of four, each with a quarter of every split tensor, reads a quarter of it."""
    network = models.text_transformer(**FIELDS)
    shapes = {path: leaf.shape for path, leaf in by_path(FOREIGN.shapes(network)).items()}
    place = slots(FOREIGN.table(network.module), shapes)["blocks/block/attention/attention/k/kernel"]
    files, read = TensorFiles(folder), []

    def spy(name, index):
        read.append(files.read(name, index))
        return read[-1]

    whole = place.fill(files.read, (slice(None),) * 3, np.float32)
    part = place.fill(spy, (slice(None), slice(None), slice(4, 8)), np.float32)
    np.testing.assert_array_equal(part, whole[:, :, 4:8])
    assert sum(value.size for value in read) == part.size


def test_weights_are_cast_on_the_way(pretrained, tmp_path):
    root = interop.save_pretrained(tmp_path, pretrained, dtype=jnp.bfloat16)
    loaded = interop.load_pretrained(root)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), pretrained.params)
    assert_equal(loaded.params, rounded)
    halves = interop.load_pretrained(root, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(halves.params)} == {jnp.dtype(jnp.bfloat16)}


def test_fields_may_be_overridden(folder):
    assert interop.load_pretrained(folder, remat="full", dtype="bfloat16").network.module.remat == "full"


@pytest.mark.parametrize(
    ("layout", "ours", "theirs", "sizes"),
    [
        (CONV, (3, 5, 7, 11), (11, 7, 3, 5), ()),
        (POINTWISE, (1, 1, 7, 11), (11, 7), ()),
        ("o i p q -> (p q i) o", (2 * 3 * 4, 5), (5, 4, 2, 3), (("p", 2), ("q", 3))),
        ("1 n d -> n d", (6, 5), (1, 6, 5), ()),
    ],
)
def test_a_layout_is_read_in_both_directions(layout, ours, theirs, sizes):
    place = slots({"w": StoredTensor("w", layout, sizes=sizes)}, {"w": ours})["w"]
    assert their_shapes({"w": place}) == {"w": theirs}
    value = np.arange(np.prod(theirs)).reshape(theirs)
    np.testing.assert_array_equal(place.theirs(place.ours(value)), value)
    index = tuple(slice(0, -(-size // 2)) for size in ours)
    part = place.fill(lambda name, where: value[where], index, np.int64)
    np.testing.assert_array_equal(part, place.ours(value)[index])


def rejected(folder, **options):
    with pytest.raises(InvalidInput) as error:
        interop.load_pretrained(folder, **options)
    message = str(error.value)
    assert message.count("\n") == 0
    return message


def test_wrong_tensors_are_listed_together(folder):
    def change(tensors):
        tensors["layer.0.outt.weight"] = tensors.pop("layer.0.out.weight")
        tensors["layer.1.up.bias"] = np.zeros(3, np.float32)

    message = rejected(edited(folder, change))
    assert "1 missing: layer.0.out.weight ('layer.0.outt.weight' is near" in message
    assert "1 unexpected: layer.0.outt.weight" in message
    assert "layer.1.up.bias is [3] instead of [64]" in message


def test_what_carries_no_weights_is_ignored(folder, pretrained):
    edited(folder, lambda tensors: tensors.update({"text.position_ids": np.arange(4)}))
    assert_equal(interop.load_pretrained(folder).params, pretrained.params)


def test_copies_must_be_equal(folder):
    edited(folder, lambda tensors: tensors.update({"layer.1.time.0.bias": np.ones(16, np.float32)}))
    assert "layer.0.time.0.bias and layer.1.time.0.bias differ" in rejected(folder)


def test_integers_are_no_weights(folder):
    edited(folder, lambda tensors: tensors.update({"time.2.bias": np.zeros(16, np.int64)}))
    assert "time.2.bias has dtype I64" in rejected(folder)


def test_a_file_cut_short(folder):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[: len(data) // 2])
    assert f"{FILE} is damaged or cut short" in rejected(folder)


def test_a_missing_shard(pretrained, tmp_path):
    root = interop.save_pretrained(tmp_path, pretrained, max_shard_bytes=8000)
    gone = sorted(root.glob("*-of-*.safetensors"))[1]
    gone.unlink()
    assert f"names the shard {gone.name}, but" in rejected(root)


def test_pickles_are_never_opened(folder):
    (folder / FILE).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "it is a pickle" in rejected(folder)


def test_only_variants(folder, pretrained):
    (folder / FILE).rename(folder / FILE.replace(".safe", ".fp16.safe"))
    assert "give variant='fp16'" in rejected(folder)
    assert_equal(interop.load_pretrained(folder, variant="fp16").params, pretrained.params)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"_class_name": "Foreignn"}, "did you mean 'Foreign'"),
        ({}, "give family="),
        ({"_class_name": "Foreign", **FIELDS, "act": "relu"}, "act='relu', but only 'gelu' can be loaded"),
        ({"_class_name": "Foreign", **FIELDS, "width": 32}, "misshapen"),
    ],
)
def test_another_config(folder, config, expected):
    (folder / "config.json").write_text(json.dumps(config))
    assert expected in rejected(folder)


def test_no_folder(tmp_path):
    assert "does not exist" in rejected(tmp_path / "nowhere")
    assert "has no diffusion_pytorch_model.safetensors" in rejected(tmp_path, family="Foreign")


def test_parameters_of_another_network_are_not_saved(pretrained, tmp_path):
    params = {**pretrained.params, "final": {"kernel": jnp.zeros((2, 2))}}
    with pytest.raises(InvalidInput, match=r"misfits: .*final/bias"):
        interop.save_pretrained(tmp_path, pretrained._replace(params=params))


def test_a_repo_id_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "as a repo id it could not be fetched" in rejected("owner/name")
