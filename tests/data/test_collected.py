"""What a model makes is drawn once: the set is the same however often making it was cut short."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data, denoisers, processes, solvers, timesteps
from diffusion_jax.data import collected
from diffusion_jax.errors import InvalidInput
from diffusion_jax.randomness import sample_keys
from diffusion_jax.typing import Network

FLOW = processes.rectified_flow()
WORLD = denoisers.gaussian_mixture(np.eye(2, dtype=np.float32), 0.3)
EXACT = denoisers.analytic(FLOW)
GRID = timesteps.linspace(6)
STATES = (0, 2, 6)


@jax.jit
def numbers(index):
    return jax.vmap(lambda key: jax.random.normal(key, (3,)))(sample_keys(jax.random.key(5), index))


def made(index):
    return {"x0": numbers(index), "noise": 2 * numbers(index), "cond": {"label": np.asarray(index) % 4}}


class Killed(Exception):
    pass


def dying(after):
    calls = []

    def draw(index):
        calls.append(index)
        if len(calls) > after:
            raise Killed
        return made(index)

    return draw, calls


def of(draw, count=23):
    return data.Collection(draw, count, batch_size=4, shard_size=8)


def rows(source):
    return {name: np.stack([source[i][name] for i in range(len(source))]) for name in ("x0", "noise")}


def test_a_set_that_was_cut_short_is_finished_and_is_the_set_of_one_go(tmp_path):
    whole = data.collect(of(made))
    draw, calls = dying(after=3)
    with pytest.raises(Killed):
        data.collect(of(draw), tmp_path, {"model": "a"})
    # The second batch of the second shard was lost, the first shard was not.
    draw, calls = dying(after=99)
    source = data.collect(of(draw), tmp_path, {"model": "a"})
    assert [int(index[0]) for index in calls] == [8, 12, 16, 20]
    for name, values in rows(source).items():
        np.testing.assert_array_equal(values, rows(whole)[name])
    assert source[22]["cond"] == {"label": 2} == whole[22]["cond"] and len(source) == len(whole) == 23
    draw, calls = dying(after=0)
    data.collect(of(draw), tmp_path, {"model": "a"})
    assert not calls


def test_shards_that_were_damaged_are_made_again_and_those_of_something_else_are_refused(tmp_path):
    before = rows(data.collect(of(made), tmp_path, {"model": "a"}))
    damaged = {"00000-of-00003.label.npy": None, "00001-of-00003.x0.npy": b"nothing", "00002-of-00003.noise.npy": b""}
    for name, content in damaged.items():
        file = tmp_path / "train" / name
        file.unlink() if content is None else file.write_bytes(content)
        draw, calls = dying(after=99)
        after = data.collect(of(draw), tmp_path, {"model": "a"})
        # No other shard is.
        assert {int(index[0]) // 8 for index in calls} == {int(name[4])}
        for entry, values in rows(after).items():
            np.testing.assert_array_equal(values, before[entry])
    with pytest.raises(InvalidInput, match=r"made otherwise: made_by.model \(was 'a', is 'b'\)"):
        data.collect(of(made), tmp_path, {"model": "b"})
    with pytest.raises(InvalidInput, match=r"examples\.train"):
        data.collect(of(made, 24), tmp_path, {"model": "a"})
    for draw, told in (
        (lambda index: {"x0": np.zeros((2, 3))}, r"shape of 'x0' in what is collected is \(2, 3\), but 4 examples"),
        (lambda index: {"x0": np.zeros((4, 3)), "cond": {"score": 1.0}}, r"'cond/score' .* is \(\)"),
        (lambda index: {"x0": np.full((4, 3), np.nan)}, "the run that made it diverged"),
    ):
        with pytest.raises(InvalidInput, match=told):
            data.collect(of(draw), tmp_path / "new")
    assert not list(tmp_path.glob("new/train/*"))
    with pytest.raises(InvalidInput, match="shard_size"):
        data.collect(of(made)._replace(shard_size=16), tmp_path, {"model": "a"})
    with pytest.raises(InvalidInput, match="no x0"):
        data.collect(of(lambda index: {"x": index}))


def test_what_stands_beside_x0_and_its_conditions_reaches_the_batch(tmp_path):
    for source in (data.collect(of(made)), data.collect(of(made), tmp_path)):
        batch = next(data.pipeline(source, 4, num_threads=0))
        np.testing.assert_array_equal(batch["noise"], 2 * batch["x0"])
        assert batch["cond"]["label"].shape == (4,)
        # A NaN beside x0 is told like one in x0.
        assert set(data.unconditional(source)[3]) == {"x0", "noise"}
    wrong = data.ArraySource(np.zeros((4, 2)), beside={"noise": np.full((4, 2), np.nan)})
    with pytest.raises(InvalidInput, match="noise at position"):
        next(data.pipeline(wrong, 4, num_threads=0))
    with pytest.raises(InvalidInput, match="beside"):
        data.latents(str(tmp_path / "train"), beside=("noisy",))


def runs(**changed):
    how = {"shape": (2,), "keep": STATES, **changed}
    return data.trajectories(jax.random.key(1), EXACT, WORLD, solvers.ddim(), GRID, **how)


def test_trajectories_are_the_runs_of_the_sampler_from_their_noise():
    from diffusion_jax.sampling import sample

    found = runs()(np.arange(3, 7))
    at = {"shape": (4, 2), "index": np.arange(3, 7)}
    whole = sample(jax.random.key(1), EXACT, WORLD, solvers.ddim(), GRID, save_every=2, **at)
    np.testing.assert_allclose(found["x0"], whole.x, atol=1e-6)
    np.testing.assert_array_equal(found["states"][:, 0], found["noise"])
    np.testing.assert_array_equal(found["states"][:, -1], found["x0"])
    np.testing.assert_allclose(found["states"][:, 1], whole.trace[0], atol=1e-6)
    # Any single key point can be kept.
    np.testing.assert_array_equal(runs(keep=(0,))(np.arange(3, 7))["states"][:, 0], found["noise"])
    assert "states" not in runs(keep=None)(np.arange(3, 7))
    for keep in ((2, 0), (0, 0), (), (0, 7)):
        with pytest.raises(InvalidInput, match="rising numbers of steps from 0 to 6"):
            runs(keep=keep)


def test_a_run_is_made_at_the_condition_of_its_example():
    """A network whose velocity is its label ends as many units below its noise."""

    def apply(params, x, t, cond, train=False, key=None):
        return 0 * x + cond["label"][:, None], {}

    taught = denoisers.denoiser(Network(lambda *_: {}, apply), FLOW)
    draw = data.trajectories(
        jax.random.key(1), taught, {}, solvers.ddim(), GRID, shape=(2,), conditions=data.cycled_labels(3)
    )
    found = draw(np.arange(4, 8))
    np.testing.assert_array_equal(found["cond"]["label"], [1, 2, 0, 1])
    np.testing.assert_allclose(found["noise"] - found["x0"], np.tile([[1], [2], [0], [1]], (1, 2)), atol=1e-5)


def test_the_randomness_of_a_solver_belongs_to_the_example_and_only_asked_for_states_are_held(monkeypatch):
    draw = data.trajectories(jax.random.key(1), EXACT, WORLD, solvers.ddim(1.0), GRID, shape=(2,))
    whole, part = draw(np.arange(8)), draw(np.arange(4, 8))
    np.testing.assert_allclose(part["x0"], whole["x0"][4:], atol=1e-6)
    held = []
    monkeypatch.setattr(collected, "make_sampler", lambda *_, save_every, **__: held.append(save_every))
    for keep in ((0, 2, 6), (0, 3, 6), (0, 6), (0,), None):
        runs(keep=keep)
    assert held == [2, 3, 6, 6, None]


def test_a_mesh_changes_no_trajectory():
    mesh = jax.make_mesh((4,), ("data",))
    one, several = (runs(mesh=each)(np.arange(8)) for each in (None, mesh))
    for name in one:
        np.testing.assert_allclose(one[name], several[name], atol=1e-6)


def test_examples_are_labelled_by_what_is_said_of_their_batch():
    source = data.collect(of(made))
    scored = data.collect(
        data.labelled(source, lambda batch: {"cond": {"score": batch["x0"].sum(axis=1)}}, batch_size=4)
    )
    assert set(scored[5]) == {"x0", "noise", "cond"} and set(scored[5]["cond"]) == {"label", "score"}
    np.testing.assert_allclose(scored[5]["cond"]["score"], jnp.sum(source[5]["x0"]), rtol=1e-6)
    # What is said anew replaces what was there.
    other = data.collect(data.labelled(source, lambda batch: {"noise": -batch["noise"]}, batch_size=4))
    np.testing.assert_array_equal(other[5]["noise"], -source[5]["noise"])
