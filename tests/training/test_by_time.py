"""The loss by bins of t is that of each example at its time, whatever the shape of times, and names itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import objectives, processes, timesteps
from diffusion_jax.training import by_time
from diffusion_jax.typing import Network

KEY = jax.random.key(0)


def silent(params, x, t, cond, train=False, key=None):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), x), {}


NETWORK = Network(lambda key: {}, silent)
FLOW = processes.rectified_flow(time="t")


def reported(objective, batch):
    losses, aux = objective.loss({}, objective.init(KEY, {}, batch), batch, KEY)
    return losses, aux.per_example, by_time.sums_by_time(aux.per_example)


def by_hand(losses, t):
    place = np.clip((np.ravel(t) * by_time.BINS).astype(int), 0, by_time.BINS - 1)
    kept = np.isfinite(np.ravel(losses))
    counted = np.bincount(place[kept], minlength=by_time.BINS)
    return np.stack([np.bincount(place[kept], np.ravel(losses)[kept], minlength=by_time.BINS), counted])


def test_the_bins_hold_the_loss_of_the_batch():
    x0 = jax.random.normal(KEY, (64, 3))
    losses, told, sums = reported(objectives.denoising(NETWORK, FLOW), {"x0": x0})
    np.testing.assert_allclose(sums[""], by_hand(told["loss"], told["t"]), rtol=1e-5)
    np.testing.assert_allclose(sums[""][0].sum() / 64, losses.mean(), rtol=1e-5)
    # At the very end of the range there is a bin, too.
    end = {"loss": jnp.ones(2), "t": jnp.asarray([0.0, 1.0])}
    np.testing.assert_array_equal(by_time.sums_by_time(end)[""][1], [1, 0, 0, 0, 0, 0, 0, 1])


def test_frames_count_at_their_own_times():
    draw = timesteps.independent(timesteps.uniform())
    x0 = jax.random.normal(KEY, (8, 5, 3))
    _, told, sums = reported(objectives.denoising(NETWORK, FLOW, draw, t_shape=2), {"x0": x0})
    assert told["loss_at_t"].shape == told["t"].shape == (8, 5)
    np.testing.assert_allclose(told["loss_at_t"].mean(axis=1), told["loss"], rtol=1e-6)
    np.testing.assert_allclose(sums[""], by_hand(told["loss_at_t"], told["t"]), rtol=1e-5)


def test_modalities_have_bins_of_their_own_and_what_is_missing_has_none():
    joint = processes.JointProcess({"image": FLOW, "action": FLOW})
    draws = {"image": timesteps.uniform(), "action": timesteps.uniform()}
    batch = {"x0": {"image": jnp.ones((6, 2)), "action": jnp.ones((6, 4))}}
    batch["missing"] = {"action": jnp.arange(6) < 4}
    *_, sums = reported(objectives.denoising(NETWORK, joint, draws), batch)
    assert set(sums) == {"image", "action"} and sums["image"][1].sum() == 6 and sums["action"][1].sum() == 2
    names = by_time.means_by_time(sums)
    assert "loss/action/t=0.0625" in names and len(names) == 2 * by_time.BINS
    shown = by_time.without_empty({name: float(value) for name, value in names.items()} | {"loss": float("nan")})
    assert "loss" in shown and all(np.isfinite(value) for name, value in shown.items() if name != "loss")


@pytest.mark.parametrize(
    "per_example",
    [{}, {"loss": jnp.ones(2)}] + [{"loss": jnp.ones(2), "t": t} for t in ({"a": jnp.ones(2)}, jnp.ones((2, 3)))],
    ids=["nothing", "no times", "times by modality alone", "times of frames alone"],
)
def test_losses_that_have_no_time_have_no_bins(per_example):
    assert by_time.sums_by_time(per_example) == {}


def test_curves_are_of_the_end_of_the_log():
    records = [{"step": i, "loss": 1.0, "loss/t=0.0625": float(i), "loss/t=0.9375": 2.0} for i in range(10)]
    held_out = [{"step": i, "validation/loss/t=0.0625": float(i)} for i in (5, 9)]
    assert by_time.latest_curves([*records, *held_out, {"step": 9, "loss/image/t=0.5": "nan"}]) == {
        "training": ([0.0625, 0.9375], [8.5, 2.0]),
        "held out": ([0.0625], [9.0]),
    }
