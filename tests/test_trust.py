"""Code outside of the library: what the user writes is imported, what is read from a file only where it is trusted."""

import copy
import json
import sys

import numpy as np
import pytest

from diffusion_jax import config as configs
from diffusion_jax import solvers
from diffusion_jax.commands.image_files import write_image
from diffusion_jax.commands.repeating import repeated
from diffusion_jax.config import ConfigDict, build, call
from diffusion_jax.config.overrides import apply_overrides
from diffusion_jax.config.parts import constructor
from diffusion_jax.config.trust import ImportableName, outside_packages, source_digests, written_by_user
from diffusion_jax.errors import InvalidInput
from diffusion_jax.measuring.trained_extractors import trained_extractor
from diffusion_jax.typing import Network, Solver

PARTS = """
import functools
import subprocess
from subprocess import run as rerun

from diffusion_jax import solvers
from diffusion_jax.typing import Solver
import {other} as _other
from {other} import borrowed

open("imported", "a").write(__name__)

def told(eta: float = 0.5) -> Solver:
    return solvers.ddim(eta)

def untold(eta=0.5):
    return solvers.ddim(eta)

@functools.cache
def cached(eta: float = 0.5) -> Solver:
    return solvers.ddim(eta)

def written(path: str) -> None:
    open(path, "w").write("done")

def broken() -> Solver:
    return solvers.ddim(None + 1)

def _private() -> Solver:
    return solvers.ddim()

number = 5
partial = functools.partial(solvers.ddim, 0.5)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`mine`, `mine.parts` and `others` in the current directory, which is not on the path."""
    name, other = f"mine_{tmp_path.name}", f"others_{tmp_path.name}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(f"from {name}.parts import told\n")
    (tmp_path / name / "parts.py").write_text(PARTS.format(other=other))
    (tmp_path / f"{other}.py").write_text(
        "from diffusion_jax import solvers, typing\ndef borrowed() -> typing.Solver:\n    return solvers.ddim()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield name
    for module in [module for module in sys.modules if module.startswith((name, other))]:
        del sys.modules[module]


def stored(folder, entry):
    path = folder / "config.json"
    path.write_text(json.dumps({"sampling": {"solver": entry}, "list": [{"a": entry}]}))
    return str(path)


def test_what_the_user_writes_is_imported_checked_and_described(package, tmp_path):
    entry = call(f"{package}.parts:told")
    assert entry.to_dict() == {"call": f"{package}.parts:told", "eta": 0.5}
    for text in ("told(eta=0.25)", "untold(0.25)", "cached(eta=0.25)"):
        config = apply_overrides(ConfigDict({"solver": call("solvers.ddim")}), [f"solver={package}.parts:{text}"])
        assert build(config.solver, Solver, "config.solver").order == solvers.ddim().order
        assert config.solver.eta == 0.25
        with pytest.raises(InvalidInput, match=r"config\.model is"):
            build(config.solver, Network, "config.model")
    with pytest.raises(InvalidInput, match="did you mean 'eta'"):
        call(f"{package}:told", eat=1)
    assert outside_packages(ConfigDict({"a": [{"b": entry.to_dict()}], "c": call("solvers.ddim")})) == [package]


def test_a_stored_name_is_not_imported_unless_its_package_is_trusted(package, tmp_path):
    name = f"{package}.parts:told"
    path = stored(tmp_path, {"call": name, "eta": 0.5})
    for trust in ([], ["other"], [package[:-1]], [f"{package}.part"], [f"{package}x"]):
        with pytest.raises(InvalidInput, match=f"--trust={package}") as error:
            configs.load(path, trust)
        assert "\n" not in str(error.value)
    for data in (
        {"call": name},
        ConfigDict({"call": name}),
        json.loads(json.dumps(call("solvers.ddim").to_dict())) | {"call": name},
    ):
        with pytest.raises(InvalidInput, match="trust"):
            build(data, Solver)
    assert not (tmp_path / "imported").exists(), "nothing was imported"
    for trust in ([package], ["other", package], [f"{package}.parts"]):
        config = configs.load(path, trust)
        assert build(config.sampling.solver, Solver).order == 1
        assert build(ConfigDict({"all": config.list})["all"])[0]["a"].order == 1
    assert (tmp_path / "imported").read_text() == f"{package}.parts", "once"


def test_a_part_whose_code_has_changed_is_another_part(package, tmp_path):
    entry = call(f"{package}.parts:told")
    before = source_digests({"solver": entry})
    assert before == source_digests([entry, call("solvers.ddim")]) and [*before] == [f"{package}.parts"]
    with (tmp_path / package / "parts.py").open("a") as file:
        file.write("# changed\n")
    assert source_digests([entry]) != before


def test_a_run_whose_network_measures_is_trusted_like_any_other(package, tmp_path):
    stored(tmp_path, {"call": f"{package}.parts:told"})
    with pytest.raises(InvalidInput, match=f"--trust={package}"):
        trained_extractor("run", str(tmp_path))
    with pytest.raises(InvalidInput, match="has no entry"):
        trained_extractor("run", str(tmp_path), [package])


def test_trust_is_in_what_a_package_defines(package, tmp_path):
    """Not in what it has imported: a stored config reaches nothing else through it."""
    for attribute in ("rerun", "borrowed", "subprocess", "number", "partial", "nothing", "functools", "written"):
        config = configs.load(stored(tmp_path, {"call": f"{package}.parts:{attribute}", "path": "victim"}), [package])
        with pytest.raises(InvalidInput):
            build(config.sampling.solver)
    assert not (tmp_path / "victim").exists()
    # For that reason, and not for an argument that they do not take.
    for attribute, origin in (("rerun", "subprocess"), ("borrowed", "others_")):
        config = configs.load(stored(tmp_path, {"call": f"{package}.parts:{attribute}"}), [package])
        with pytest.raises(InvalidInput, match=f"is defined in {origin}.*--trust="):
            build(config.sampling.solver)
    other = f"others_{tmp_path.name}"
    config = configs.load(stored(tmp_path, {"call": f"{package}.parts:borrowed"}), [package, other])
    assert build(config.sampling.solver, Solver).order == 1
    assert build(call(f"{package}.parts:borrowed"), Solver).order == 1, "the user's own import is the user's"
    with pytest.raises(InvalidInput, match=r"cannot be made .*TypeError"):
        build(call(f"{package}.parts:broken"))


ACTS = "os:system builtins:eval posix:system subprocess:run importlib:import_module diffusion_jax.stages:stage"
MALFORMED = (
    "a:b.c a:__b a:_b _a:b a._b:c __main__:b a:b:c :b a: a..b:c .a:b a.:b a:b() a/b:c ../a:b \u0430:b nowhere_at_all:b"
)


@pytest.mark.parametrize("name", [*ACTS.split(), *MALFORMED.split(), "a b:c", "a:b\n", "a\0:b"])
def test_names_that_name_no_part_are_refused_whoever_writes_and_trusts_them(name, tmp_path):
    package = name.partition(":")[0]
    with pytest.raises(InvalidInput):
        call(name)
    with pytest.raises(InvalidInput):
        constructor(ImportableName(name))
    with pytest.raises(InvalidInput):
        build(configs.load(stored(tmp_path, {"call": name}), [package]).sampling.solver)


@pytest.mark.parametrize("package", ["os", "builtins", "diffusion_jax", "", "*", "a:b", "a.", "../a", "_a"])
def test_what_nobody_can_trust_is_told(package, tmp_path):
    with pytest.raises(InvalidInput, match="--trust"):
        configs.load(stored(tmp_path, {"call": "solvers.ddim"}), [package])


def test_the_right_to_be_imported_is_lost_where_a_name_is_stored_and_kept_where_it_is_copied():
    name = written_by_user("mine:thing")
    assert isinstance(copy.deepcopy(name), ImportableName) and written_by_user("solvers.ddim") == "solvers.ddim"
    config = ConfigDict({"a": {"call": name}}).copy_and_resolve_references()
    assert isinstance(config.to_dict()["a"]["call"], ImportableName)
    assert type(json.loads(configs.to_json(config))["a"]["call"]) is str
    assert str(config) == "a:\n  call: mine:thing\n"


@pytest.mark.parametrize(
    "flags",
    [
        {"config.sampling.solver": "evil.parts:run"},
        {"config.sampling.solver.call": "evil.parts:run"},
        {"config.sampling.solver": "solvers.ddim(eta=evil.parts:run(1))"},
        {"config.sampling.solver": '{"call": "evil.parts\\x3arun"}'},
        {"config.sampling.solver=evil.parts:run": True},
        {"solver": "ddim(eta=evil.parts:run())"},
        {"config": "evil.py"},
        {"trust": ["evil"]},
        {"output": "/elsewhere"},
    ],
)
def test_an_image_chooses_no_code_and_no_place(tmp_path, flags):
    """`sample --like=PNG`: its settings come from whoever made the image."""
    image = tmp_path / "made.png"
    write_image(image, np.zeros((8, 8, 3)), {"seed": 1, "index": 0, "flags": {"workdir": "run", "steps": 3, **flags}})
    with pytest.raises(InvalidInput, match="not taken from an image"):
        repeated([f"--like={image}"])
    # What the user gives is the user's.
    name, value = next(iter(flags.items()))
    if value is not True:
        assert repeated([f"--like={image}", f"--{name}={value}"])[-1] == f"--{name}={value}"


def test_an_image_without_the_flags_of_a_call_is_not_repeated(tmp_path):
    write_image(tmp_path / "made.png", np.zeros((8, 8, 3)), {"prompt": "a cube"})
    with pytest.raises(InvalidInput, match="cannot be repeated"):
        repeated([f"--like={tmp_path / 'made.png'}"])
