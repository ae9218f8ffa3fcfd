"""Digits have a stand-in of the same size: everything else of a study stays as it is."""

import sys

import pytest

from diffusion_jax.config import ConfigDict, build, load
from diffusion_jax.errors import InvalidInput
from diffusion_jax.recipes.__main__ import ON_GARMENTS, main


def calls(entry, path=()):
    """Where something is called, and by which arguments."""
    if not isinstance(entry, dict):
        return {}
    found = {path: entry} if "call" in entry else {}
    for name, value in entry.items():
        found |= calls(value, (*path, name))
    return found


@pytest.mark.parametrize("slug", ON_GARMENTS)
def test_only_the_digits_of_a_study_are_exchanged(slug, monkeypatch, tmp_path):
    path = f"configs/recipes/{slug}.py"
    digits, garments = (calls(load(file).to_dict()) for file in (path, f"{path}:fashion"))
    assert digits.keys() == garments.keys()
    exchanged = {at: one for at, one in digits.items() if one["call"] == "data.digits"}
    assert len(exchanged) >= 2
    for at, one in digits.items():
        if at in exchanged:
            assert garments[at]["call"] == "data.fashion_mnist" and garments[at]["split"] == one["split"]
        else:
            assert garments[at]["call"] == one["call"]
    # The module of this name, not the function.
    monkeypatch.setattr(sys.modules["diffusion_jax.data.fashion_mnist"], "FOLDER", str(tmp_path))
    for at in exchanged:
        with pytest.raises(InvalidInput, match="apt-get install dataset-fashion-mnist"):
            build(ConfigDict(garments[at]))


def test_variants_that_do_not_exist_or_are_no_study_are_refused():
    with pytest.raises(InvalidInput, match="the variant"):
        main(["shadow_removal:fashion"])
    with pytest.raises(InvalidInput, match="the variant"):
        main(["ant:fashion", "--publish"])
