"""Checkpoints give back every bit on any mesh, notice damage, and refuse another run's state."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from diffusion_jax import distributed, training
from diffusion_jax.errors import Halted, InvalidInput
from diffusion_jax.training import data_position, ema, optimizers, storage
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
    "a null meta": lambda step: _largest(step / "meta").write_text("null"),
    "a meta without entries": lambda step: _edit(step / "meta", lambda meta: {"format": meta["format"]}),
    "a meta of another kind": lambda step: _edit(step / "meta", lambda meta: {**meta, "items": [5]}),
    "another shape": lambda step: _edit(step / "meta", _another_shape),
    "a lost position": lambda step: shutil.rmtree(step / "data"),
    "a position of null": lambda step: _position(step).write_text("null"),
    "a number as position": lambda step: _position(step).write_text("5"),
    "another position": lambda step: _edit(step / "data", lambda data: {**data, "state": {"dict": [["at", 2]]}}),
    "a flipped bit in the position": lambda step: _position(step).write_text(
        _position(step).read_text().replace('["at", 3]', '["at", 2]')
    ),
}


def _position(step):
    return step / "data" / "0_of_1.json"


def _edit(folder, change):
    path = _largest(folder)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _another_shape(meta):
    meta["items"]["params"]["up/kernel"]["shape"][0] += 1
    return meta


def listing(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(saved, tmp_path, kind):
    workdir = copied(saved, tmp_path)
    DAMAGE[kind](workdir / "checkpoints" / "3")
    before = listing(workdir / "checkpoints" / "3")
    with pytest.warns(UserWarning, match="Checkpoint 3 .* is damaged"):
        found = restore(workdir)
    assert found.step == 2 and found.data["at"] == 2
    assert equal(words(found.state), words(saved[1][2]))
    # The run will come by this step again and save it; what there was is kept under another name.
    assert not (workdir / "checkpoints" / "3").exists()
    (aside,) = (workdir / "checkpoints").glob("3.unusable-*")
    assert listing(aside) == before
    with training.Checkpointer(workdir) as checkpointer:
        assert checkpointer.steps() == [1, 2]
        checkpointer.save(saved[1][3], {"at": 3}, wait=True)
        assert checkpointer.steps() == [1, 2, 3]


TENSORSTORE = (
    'PERMISSION_DENIED: Error opening "zarr" driver: Error reading local file "d/a" [OS error 13: Permission denied]'
)


@pytest.mark.parametrize(
    "error, words",
    [
        (PermissionError(errno.EACCES, "Permission denied", "d/a"), "Permission denied"),
        (OSError(errno.EMFILE, "Too many open files", "d/a"), "Too many open files"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (MemoryError(), "out of memory"),
        (ValueError(TENSORSTORE), "Permission denied"),
    ],
)
def test_what_cannot_be_read_now_is_not_damaged(saved, tmp_path, monkeypatch, error, words):
    workdir = copied(saved, tmp_path)
    before = listing(workdir)

    def refused(*_, **__):
        raise ValueError("wrapped") from error

    monkeypatch.setattr(ocp.CheckpointManager, "restore", refused)
    for read in (restore, training.load_params, lambda folder: training.reconstruct_ema(folder, 0.1)):
        with pytest.raises(InvalidInput, match=f"cannot be read now .*{words}.*nothing was changed"):
            read(workdir)
    monkeypatch.undo()
    assert listing(workdir) == before
    assert restore(workdir).step == 3


def test_too_many_open_files_lose_nothing(saved, tmp_path):
    workdir = copied(saved, tmp_path)
    before = listing(workdir / "checkpoints")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held, refused = [], 0
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(5):
            os.close(held.pop())
            try:
                assert restore(workdir).step == 3
            except (InvalidInput, Halted) as error:
                refused += 1
                assert "Too many open files" in str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in held:
            os.close(number)
    assert refused >= 3 and listing(workdir / "checkpoints") == before


def test_what_orbax_says_of_a_checkpoint_is_not_needed(saved, tmp_path):
    workdir = copied(saved, tmp_path)
    for step in (2, 3):
        (workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_text("5")
    assert restore(workdir).step == 3 and equal(training.load_params(workdir), saved[1][3].params)


def _as_of(processes, *states):
    """Writes the position in the data as so many processes would have."""

    def change(folder):
        text = json.loads((folder / "0_of_1.json").read_text())
        (folder / "0_of_1.json").unlink()
        for number, at in enumerate(states):
            state = json.loads(json.dumps(text["state"]).replace('["at", 3]', f'["at", {at}]'))
            stored = {"state": state, "sha256": data_position.digest(state)}
            (folder / f"{number}_of_{processes}.json").write_text(json.dumps(stored))

    return change


def test_any_number_of_processes_resumes_where_all_stood_at_one_position(saved, tmp_path):
    folder = copied(saved, tmp_path) / "checkpoints" / "3" / "data"
    original = (folder / "0_of_1.json").read_bytes()
    cases = {(2, 7, 7): 7, (2, 7, 8): "data positions of 2 processes, which differ", (2, 7): "is damaged"}
    for (processes, *states), expected in cases.items():
        for path in folder.glob("*.json"):
            path.unlink()
        (folder / "0_of_1.json").write_bytes(original)
        _as_of(processes, *states)(folder)
        if expected == "is damaged":
            with pytest.warns(UserWarning, match=expected):
                assert restore(tmp_path / "copy").step == 2
        elif isinstance(expected, str):
            with pytest.raises(InvalidInput, match=expected):
                restore(tmp_path / "copy")
        else:
            assert restore(tmp_path / "copy").data["at"] == expected


def test_a_damaged_snapshot_is_named(saved, tmp_path):
    workdir = copied(saved, tmp_path)
    _edit(workdir / "snapshots" / "2" / "meta", lambda meta: {**meta, "sigma_rel": {"power": 0.2}})
    with pytest.raises(InvalidInput, match=r"snapshot 2 in .* is damaged"):
        training.reconstruct_ema(workdir, 0.1)


def test_one_run_in_a_folder_at_a_time(tmp_path):
    owner = rf"in use: process {os.getpid()} on \S+ .*since \d{{4}}-"
    with training.Checkpointer(tmp_path), pytest.raises(InvalidInput, match=owner):
        training.Checkpointer(tmp_path)
    holding = f"""if True:
        import os, time
        from diffusion_jax.training.lock import FolderLock
        lock = FolderLock({str(tmp_path)!r})
        print(os.getpid(), flush=True)
        time.sleep(60)"""
    with subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True) as other:
        pid = other.stdout.readline().strip()
        with pytest.raises(InvalidInput, match=f"in use: process {pid} on"):
            training.Checkpointer(tmp_path)
        other.kill()
        other.wait()
        training.Checkpointer(tmp_path).close()


def test_what_is_exported_overwrites_nothing(saved, tmp_path):
    training.export_params(saved[0], tmp_path / "out")
    before = listing(tmp_path / "out")
    with pytest.raises(InvalidInput, match="holds a checkpoint 0 already"):
        training.export_params(saved[0], tmp_path / "out", ema="fixed")
    assert listing(tmp_path / "out") == before


def test_parameters_of_the_format_before_can_be_read_but_no_run_goes_on_from_it(saved, tmp_path):
    workdir = copied(saved, tmp_path)
    for step in (1, 2, 3):
        _edit(
            workdir / "checkpoints" / str(step) / "meta",
            lambda meta: {"format": 1} | {name: meta[name] for name in meta if name not in ("format", "sha256")},
        )
    assert equal(training.load_params(workdir), saved[1][3].params)
    with pytest.raises(InvalidInput, match="has format 1, but format 2 is needed"):
        restore(workdir)


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
