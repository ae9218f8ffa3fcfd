"""Checkpoints give back every bit on any mesh, notice damage, and refuse another run's state."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import distributed, training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.training import ema, optimizers, storage
from diffusion_jax.training.data_position import as_json, from_json
from diffusion_jax.typing import Objective

from .problems import equal, init_params

TRACKS = {"fixed": ema.fixed(0.9), "power": ema.power(0.1)}
POSITION = {"bytes": b"\x00\xff", "tuple": (1, [2.5, None]), "array": np.arange(3), 7: "text"}


def make(hidden=16, tracks=TRACKS, seed=0):
    objective = Objective(
        lambda key, params, batch: {
            "key": key,
            "empty": jnp.zeros((0, 3)),
            "pair": (jnp.ones(2, jnp.bfloat16), jnp.array([True, False])),
        },
        None,
    )
    return training.make_init(
        objective,
        optimizers.adamw(),
        # A part without parameters has a place in the tree all the same.
        lambda key: init_params(key, hidden=hidden) | {"unused": {"of": {}}},
        {"x0": np.zeros((2, 4))},
        ema=tracks,
        seed=seed,
    )


def test_fingerprints_are_the_same_on_a_host_and_on_a_device():
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((3, 5), np.float32),
        np.float32(rng.standard_normal()),
        rng.standard_normal(7).astype(jnp.bfloat16),
        np.complex64(rng.standard_normal(4) + 1j * rng.standard_normal(4)),
        rng.integers(-9, 9, 6, np.int32),
        rng.integers(0, 255, 3, np.uint8),
        rng.random(9) > 0.5,
        np.zeros((0, 3), np.float32),
    ]
    leaves = [jnp.asarray(array) for array in arrays]
    assert [int(storage._sum_on_host(leaf)) for leaf in leaves] == [int(value) for value in storage._sums(leaves)]


def test_what_every_device_holds_is_written_from_one_copy():
    mesh = distributed.make_mesh()
    whole = distributed.init_sharded(lambda: jnp.arange(8.0), mesh=mesh)
    split = distributed.shard_batch(np.arange(8.0), mesh)
    tree = storage.one_copy({"whole": whole, "split": split, "number": 3})
    assert len(whole.devices()) == 8 and len(tree["whole"].devices()) == 1
    np.testing.assert_array_equal(tree["whole"], np.arange(8.0))
    assert tree["split"] is split and tree["number"] == 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints 1, 2, 3 and their states."""
    workdir = tmp_path_factory.mktemp("run")
    state = jax.jit(make())()
    states = {}
    with training.Checkpointer(workdir) as checkpointer:
        for step in (1, 2, 3):
            states[step] = state._replace(
                step=jnp.int32(step), params=jax.tree.map(lambda leaf, k=step: leaf + k, state.params)
            )
            checkpointer.save(states[step], {**POSITION, "at": step})
            checkpointer.save_snapshot(step, TRACKS, states[step].ema)
    training.write_config(workdir, {"steps": 3})
    return workdir, states


def words(state):
    """The state with its keys as words, so that bits can be compared."""
    return state._replace(
        objective_state={**state.objective_state, "key": jax.random.key_data(state.objective_state["key"])}
    )


def copied(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def restore(workdir, abstract=None, **where):
    with training.Checkpointer(workdir) as checkpointer:
        return checkpointer.restore(abstract or jax.eval_shape(make()), **where)


def test_everything_comes_back_on_any_mesh(saved):
    workdir, states = saved
    for where in (
        {},
        {"mesh": distributed.make_mesh(data=2, fsdp=4), "rules": distributed.Rules(fsdp_min_size=1)},
    ):
        found = restore(workdir, **where)
        assert found.step == 3
        assert equal(words(found.state), words(states[3]))
        assert jax.tree.structure(found.state.params) == jax.tree.structure(states[3].params)
        assert found.data["at"] == 3 and found.data["bytes"] == b"\x00\xff" and found.data["tuple"] == (1, [2.5, None])
    assert found.state.params["up"]["kernel"].addressable_shards[0].data.size == 5 * 16 // 4


def test_the_position_survives_json():
    value = json.loads(json.dumps(as_json(POSITION)))
    found = from_json(value)
    np.testing.assert_array_equal(found.pop("array"), np.arange(3))
    assert found == {name: entry for name, entry in POSITION.items() if name != "array"}
    with pytest.raises(InvalidInput, match="object"):
        as_json({"bad": object()})


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _other_array(step):
    """As if an array had been overwritten while it was being written: Orbax's own checksums are right."""
    path = _largest(step / "meta")
    meta = json.loads(path.read_text())
    meta["items"]["params"]["up/kernel"]["sum"] ^= 1
    path.write_text(json.dumps(meta))


DAMAGE = {
    "another array": _other_array,
    "a flipped bit": lambda step: _flip(_largest(step / "params")),
    "a truncated file": lambda step: _largest(step / "rest").write_bytes(b""),
    "a lost item": lambda step: shutil.rmtree(step / "ema_fixed"),
    "a torn meta": lambda step: _largest(step / "meta").write_bytes(b'{"form'),
    "a lost position": lambda step: shutil.rmtree(step / "data"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(saved, tmp_path, kind):
    workdir = copied(saved, tmp_path)
    DAMAGE[kind](workdir / "checkpoints" / "3")
    with pytest.warns(UserWarning, match="Checkpoint 3 .* is damaged"):
        found = restore(workdir)
    assert found.step == 2
    assert equal(words(found.state), words(saved[1][2]))
    # The run will come by this step again and save it.
    assert not (workdir / "checkpoints" / "3").exists()


def test_all_damaged_is_an_error_and_none_is_none(saved, tmp_path):
    workdir = copied(saved, tmp_path)
    for step in (1, 2, 3):
        _flip(_largest(workdir / "checkpoints" / str(step) / "params"))
    with pytest.warns(UserWarning), pytest.raises(InvalidInput, match=r"all checkpoints in .* are damaged"):
        restore(workdir)
    assert restore(tmp_path / "new") is None


@pytest.mark.parametrize(
    "other, words",
    [
        (
            {"hidden": 8},
            r"params/\w+/\w+ has shape .*16.*, but this run has .*8",
        ),
        ({"tracks": {"other": ema.fixed(0.5)}}, "ema_other"),
    ],
)
def test_another_runs_checkpoint_is_refused(saved, other, words):
    with pytest.raises(InvalidInput, match=words):
        restore(saved[0], jax.eval_shape(make(**other)))


def test_parameters_alone_for_sampling(saved, tmp_path):
    workdir, states = saved
    assert equal(training.load_params(workdir), states[3].params)
    assert training.load_params(workdir)["unused"] == {"of": {}}
    assert equal(training.load_params(workdir, ema="fixed", step=2), states[2].ema["fixed"])
    training.export_params(workdir, tmp_path / "out", ema="power")
    assert equal(training.load_params(tmp_path / "out"), states[3].ema["power"])
    assert training.read_config(tmp_path / "out") == {"steps": 3}
    mesh = distributed.make_mesh(data=1, fsdp=8)
    spread = training.load_params(workdir, mesh=mesh, rules=distributed.Rules(fsdp_min_size=1))
    assert spread["up"]["kernel"].addressable_shards[0].data.size == 5 * 16 // 8
    assert equal(training.reconstruct_ema(workdir, 0.1), states[3].ema["power"])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda workdir: training.load_params(workdir, ema="fixd"), "did you mean 'fixed'"),
        (lambda workdir: training.load_params(workdir, step=9), "step is 9"),
        (lambda workdir: training.load_params(workdir / "nowhere"), "does not exist"),
        (lambda workdir: training.read_config(workdir / "nowhere"), "does not exist"),
        (lambda workdir: training.reconstruct_ema(workdir / "nowhere", 0.1), "no EMA snapshots"),
        (lambda workdir: training.Checkpointer(workdir / "config.json"), "must be a folder"),
        (lambda workdir: training.Checkpointer(workdir, keep=0), "keep is 0"),
    ],
)
def test_mistakes_are_named(saved, call, words):
    with pytest.raises(InvalidInput, match=words):
        call(saved[0])
