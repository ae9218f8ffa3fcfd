"""Runs at equal numbers of blocks, what learns, and the published size."""

import jax
import numpy as np
import pytest

from diffusion_jax.acceleration import exit_depths
from diffusion_jax.config import load
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.recipes.deediff import equal_depths, exit_training
from diffusion_jax.stages import stage

UNCERTAINTY = np.sort(np.random.default_rng(0).uniform(size=(6, 8, 16)), axis=1)[:, ::-1]


def test_all_ways_run_as_many_blocks_and_the_reversed_table_turns_time_around():
    depth = exit_depths(UNCERTAINTY, 0.4)
    ways = equal_depths(depth, 0)
    for way, other in ways.items():
        assert other.shape == depth.shape, way
        assert other.mean() == pytest.approx(depth.mean(), abs=0.1), way
    assert np.ptp(ways["fixed"]) <= 1 and (ways["fixed"] == ways["fixed"][0]).all()
    np.testing.assert_array_equal(ways["reversed"], ways["table"][::-1])
    np.testing.assert_array_equal(np.sort(ways["random"].ravel()), np.sort(depth.ravel()))


@pytest.mark.usefixtures("one_device")
def test_beside_a_frozen_network_the_exits_alone_learn():
    config = load("configs/recipes/deediff.py:smoke")
    base = stage("digits", config.base, keep=False)
    learned = {}
    for frozen in (True, False):
        config.tuned.frozen = frozen
        experiment = exit_training(config.tuned, base)
        learned[frozen] = experiment.begin(jax.random.key(0))
    assert learned[False].keys() == {"params", "exits"}
    jax.tree.map(np.testing.assert_array_equal, learned[False]["params"], base.value)
    jax.tree.map(np.testing.assert_array_equal, learned[False]["exits"], learned[True])


def test_the_published_size(capsys):
    main(["deediff:paper"])
    millions = float(capsys.readouterr().out.split("network: ")[1].split()[0].replace(",", ""))
    # 13 blocks of 12 width^2 parameters, and the adaptive norms of a DiT, 6 width^2 a block.
    assert 13 * 18 * 0.512**2 < millions < 1.1 * 13 * 18 * 0.512**2
