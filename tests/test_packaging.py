"""What is installed: the configs inside, one version, names that are imported when they are used, a light start."""

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import diffusion_jax as dj
from diffusion_jax.__main__ import COMMANDS, dispatch
from diffusion_jax.config import load
from diffusion_jax.config import shipped as shipped_configs
from diffusion_jax.errors import InvalidInput

ROOT = Path(dj.__file__).parent

SLOW = ["diffrax", "grain", "matplotlib", "scipy.linalg", "scipy.ndimage", "scipy.stats", "skimage", "sklearn"]
SLOW += ["tensorboardX", "tensorflow", "torch", "transformers", "wandb"]
"""Packages that take long to import: they are imported by what uses them, not before."""

PROBE = f"""
import json, sys
import diffusion_jax
light = "jax" not in sys.modules
from diffusion_jax.__main__ import COMMANDS, dispatch
slow = {{}}
for command in COMMANDS:
    try:
        dispatch([command, "--help"])
    except SystemExit:
        slow[command] = [name for name in {SLOW} if name in sys.modules]
from diffusion_jax.config import load
from diffusion_jax.errors import InvalidInput
from diffusion_jax.config.shipped import shipped_names
found = {{}}
for name in shipped_names():
    try:
        found[name] = type(load(name)).__name__
    except InvalidInput as error:
        found[name] = str(error)
print(json.dumps([diffusion_jax.__file__, light, slow, found]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What a Python far from the checkout says, with nothing but what a wheel holds."""
    folder = tmp_path_factory.mktemp("built")
    lib = folder / "lib"
    build = [sys.executable, "setup.py", "--quiet", "build_py", f"--build-lib={lib}"]
    subprocess.run(build, cwd=ROOT.parent, check=True, capture_output=True)
    (folder / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=folder / "empty",
        env=os.environ | {"PYTHONPATH": str(lib)},
        capture_output=True,
        text=True,
        check=True,
    )
    file, *told = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(lib)
    return [lib / "diffusion_jax", *told]


def test_a_wheel_holds_every_module_text_and_config_of_the_checkout(built):
    package, _, _, found = built
    held, here = ({p.relative_to(root) for p in root.rglob("*") if p.is_file()} for root in (package, ROOT))
    assert {path for path in here if path.suffix in (".py", ".md", ".typed")} <= held
    top = ROOT.parent / "configs"
    assert found.keys() == {path.relative_to(top).with_suffix("").as_posix() for path in top.rglob("*.py")}
    refused = {name: told for name, told in found.items() if told != "ConfigDict"}
    assert refused.keys() == {"image_folder", "latents"}, "they need the path of a folder, and say so"
    assert all("Name the folder" in told for told in refused.values())


def test_the_package_alone_imports_no_jax_and_help_imports_nothing_slow(built):
    _, light, slow, _ = built
    assert light
    assert slow == {command: [] for command in COMMANDS}


def test_one_version(capsys):
    assert dj.__version__ == version("diffusion_jax")
    dispatch(["--version"])
    assert capsys.readouterr().out.startswith(f"diffusion_jax {dj.__version__}, jax {version('jax')}, Python 3.")


def test_names_are_found_when_they_are_used_and_type_checkers_see_the_same():
    guard = next(node for node in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(node, ast.If))
    typed = {f"{node.module}.{alias.name}": alias.asname for node in guard.body for alias in node.names}
    lazy = {f"diffusion_jax.{name}": name for name in dj._MODULES}
    lazy |= {f"diffusion_jax.{module}.{name}": name for name, module in dj._MODULE_OF.items()}
    assert typed == lazy and set(lazy.values()) <= set(dir(dj))
    for path, name in lazy.items():
        found = getattr(dj, name)
        module = sys.modules.get(path) or getattr(sys.modules[path.rpartition(".")[0]], name)
        assert found is module
    with pytest.raises(AttributeError, match="no attribute 'solver'"):
        _ = dj.solver


def test_a_name_is_a_shipped_config_and_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("toy2d:checkerboard").data.source.name == "checkerboard"
    assert load("recipes/sdp:smoke").seed_numbers == (0,)
    Path("digits_dit").write_text("{}")
    assert shipped_configs.config_file("digits_dit") == Path("digits_dit")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("digits_dti", "did you mean 'digits_dit'"),
        ("recipes/spd", "did you mean 'recipes/sdp'"),
        ("configs/digits_dit.py", "the shipped config 'digits_dit' is found by its name"),
        ("mine", "did you mean 'mine.py'"),
        ("run", "did you mean 'run/config.json'"),
        ("mien.py", "did you mean 'mine.py'"),
        ("", "config is ''"),
    ],
)
def test_a_wrong_name_is_told_with_the_nearest(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").touch()
    Path("run").mkdir()
    Path("run/config.json").touch()
    with pytest.raises(InvalidInput) as error:
        load(name)
    assert says in str(error.value)


def test_the_configs_are_listed_and_printed(capsys):
    dispatch(["configs"])
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == shipped_configs.shipped_names()
    assert all(len(line.split()) > 3 for line in listed.splitlines()), "each says what it is"
    dispatch(["configs", "digits_dit"])
    assert capsys.readouterr().out == (shipped_configs.shipped_folder() / "digits_dit.py").read_text()
