"""AR-Diffusion: arms differ in their times (and the ordinary model in what it sees), ways to sample cost what they
should, and the published settings can be built."""

import numpy as np
import pytest

from diffusion_jax.config import load
from diffusion_jax.recipes import ar_diffusion
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.recipes.study import Study, table

CONFIG = "configs/recipes/ar_diffusion.py"


def test_the_published_settings(capsys):
    main(["ar_diffusion:paper"])
    # DiT-XL without classes and with one channel more than a patch of one pixel.
    millions = float(capsys.readouterr().out.split("network: ")[1].split()[0])
    assert millions == pytest.approx(675, rel=0.01)
    assert load(f"{CONFIG}:paper").process.prediction == "x0"


def test_arms_differ_in_their_times_alone_and_the_ordinary_model_in_what_it_sees():
    arms = {name: arm.to_dict() for name, arm in load(CONFIG).arms.items()}
    draws = {name: arm["objective"].pop("draw")["call"].rpartition(".")[2] for name, arm in arms.items()}
    assert draws == {"anchored": "anchored", "independent": "independent", "synchronous": "shared"}
    assert {name: arm["model"].pop("block") for name, arm in arms.items()} == {
        "anchored": 1,
        "independent": 1,
        "synchronous": 0,
    }
    assert all(arm == arms["anchored"] for arm in arms.values())


@pytest.mark.usefixtures("one_device")
def test_ways_to_sample_cost_what_they_should_and_kept_keys_are_the_widest_staircase(tmp_path):
    s = Study(load(f"{CONFIG}:smoke"), (0,), tmp_path, True, {})
    one = s.stage("anchored", s.config.arms.anchored, seed=0).trained
    arms = ar_diffusion.staircase_arms(s, one)(0)
    chosen = ("anchored, s = 2", "kept keys", "all at once", "in chunks, long", "anchored, long")
    found = table({name: arms[name] for name in chosen}, (0,), {}, shape=one.shape, count=2)
    evaluations = [found[name]["evaluations"][0] for name in chosen]
    # S = 2: S + (F - 1) s; one frame of 8 at S + 1 times each; as many as the staircase; as many by chunk as the long
    # one of S + (N - 1) s, in whole steps.
    assert evaluations == [16, 24, 16, 30, 32]
    x = found.samples
    widest = x["anchored, s = 2"]
    assert np.abs(x["kept keys"] - widest).max() < 1e-3 * np.abs(widest).max()
    assert x["anchored, long"].shape[1] == 16 == x["in chunks, long"].shape[1]
