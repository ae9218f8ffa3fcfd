"""One name, one meaning: a function or class that two modules define is one idea, or one of them is renamed."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import diffusion_jax
from diffusion_jax.recipes.systems import BY_SLUG

ROOT = Path(diffusion_jax.__file__).parent

SAME_IDEA = {
    "the command line of its module": {"main"},
    "what a command line runs": {"run"},
    "what every generated world has: pictures of a state and back, their judge, texts, an expert and a simulation": {
        *("Reading", "describe", "encode", "expert_policy", "observe", "read", "render"),
        *("tokenizer", "verify"),
    },
    "what every family of checkpoints has: fields and table of its modules, and the config of one": {
        *("config", "fields", "patch_embedding", "residual", "shapes", "table"),
    },
    "a value that is kept up to date, as optax writes it": {"init", "update"},
    "text to ids: for data without a checkpoint, and as a checkpoint has it": {"Tokenizer"},
    "of one picture, and the transform of examples by it": {"resize"},
    "a picture file: as Pillow has it, and as pixels": {"read_image"},
    "B, of data and of a batch of data": {"batch_size"},
    "one of several at each step, by a rule: of denoisers, and of solvers": {"switched"},
    "the uniform distribution, of numbers, of times and of tokens that are noise": {"uniform"},
    "the curve of that shape, of noise levels and of learning rates": {"cosine"},
    "noise and sampler of Karras et al. 2022": {"edm"},
    "a convolution: the layer, and the rows of a checkpoint's table for it": {"conv"},
}

VAGUE = {"found", "kept", "made", "one", "own", "told"}


@pytest.fixture(scope="module")
def places():
    """Public functions, classes and aliases by name; tables in capitals belong to their file, all of a study to it."""
    found = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        if path.parent.name == "recipes" and path.stem in BY_SLUG:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            for target in targets:
                name = getattr(target, "name", getattr(target, "id", "_"))
                if not name.startswith("_") and not name.isupper():
                    found[name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_a_public_name_has_one_meaning(places):
    explained = set().union(*SAME_IDEA.values())
    several = {name: where for name, where in places.items() if len(where) > 1}
    assert not {name: where for name, where in several.items() if name not in explained}
    assert explained <= set(several), "take out of the list what is defined once by now"


def test_a_public_name_can_be_searched_for(places):
    assert not {name: places[name] for name in VAGUE & set(places)}
