"""Adversarial losses: who learns from which term, runs that are carried from update to update, levels apart."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data, distributed, models, objectives, processes, training
from diffusion_jax.denoisers import denoiser
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path
from diffusion_jax.objectives.batches import example_keys
from diffusion_jax.randomness import fold
from diffusion_jax.typing import Aux, Frozen, Network, Objective
from tests.models.shared import drawn_params

KEY = jax.random.key(0)
FLOW = processes.rectified_flow()
GRID = np.array([1.0, 0.8, 0.5, 0.0], np.float32)
STEPS, SIZE = 3, 8
RNG = np.random.default_rng(0)
STATES = RNG.standard_normal((SIZE, STEPS + 1, 4)).astype(np.float32)
BATCH = jax.device_put(
    {
        "x0": STATES[:, -1],
        "states": STATES,
        "cond": {"label": np.arange(SIZE, dtype=np.int32) % 3},
        "index": np.arange(20, 20 + SIZE, dtype=np.int32),
    }
)
NETWORK = models.mlp(width=8, depth=3, conditions=(models.label(3),))
PARAMS = drawn_params(NETWORK, BATCH["x0"], np.ones(SIZE, np.float32), BATCH["cond"])
TEACHER = drawn_params(NETWORK, BATCH["x0"], np.ones(SIZE, np.float32), BATCH["cond"], seed=1)
JUDGE = objectives.feature_discriminator(NETWORK, FLOW, GRID, width=4)
HEADS = jax.tree.map(lambda leaf: leaf + 0.1, JUDGE.init(KEY, TEACHER, BATCH["x0"], BATCH["cond"]))
OWN = objectives.on_trajectories(objectives.denoising(NETWORK, FLOW), FLOW, GRID)
LEVELS = np.arange(SIZE) % STEPS
LEARNED = {"student": PARAMS, "heads": HEADS}

NOTHING = Objective(lambda *_: (), lambda params, state, batch, key: (jnp.zeros(SIZE), Aux(state, {}, {})))


def made(objective=NOTHING, student=NETWORK, **settings):
    return objectives.adversarial(objective, denoiser(student, FLOW), JUDGE, TEACHER, **settings)


CARRIED = {"label": (BATCH["cond"]["label"] + 1) % 3}
"""Runs have the condition at which they began."""


def begun(objective, count=STEPS, learned=LEARNED):
    """A state in which all runs have begun."""
    state = objective.init(KEY, learned, BATCH)
    return state._replace(count=jnp.int32(count), x=jnp.asarray(STATES[:, 1]), cond=CARRIED)


GAMES = {"non-saturating": (objectives.non_saturating(), 0.0), "hinge, R1": (objectives.hinge(), 2.0)}


@pytest.mark.parametrize(("loss", "r1"), GAMES.values(), ids=GAMES)
def test_each_term_trains_its_part_and_nothing_else(loss, r1):
    """The heads learn from (1) alone, the student from (2) alone, through its sample; the teacher from nothing."""
    objective = made(loss=loss, r1=r1, weight=0.5)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(both):
        learned, taught = both
        state = begun(objective)._replace(teacher=Frozen(taught))
        losses, aux = objective.loss(learned, state, BATCH, KEY)
        return losses.sum(), aux.metrics

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def of_terms(both):
        """The critic's and the student's losses, each of copies of its own of what is not its to train."""
        critic_heads, student = both
        level = (STEPS + np.arange(SIZE)) % STEPS
        noise = FLOW.prior(example_keys(fold(KEY, 3), BATCH["index"]), BATCH["x0"].shape)
        x = jnp.where(level[:, None] == 0, noise, STATES[:, 1])
        t, then = GRID[level], GRID[level + 1]
        label = jnp.where(level == 0, BATCH["cond"]["label"], CARRIED["label"])
        velocity, _ = NETWORK.apply(student, x, 1000 * t, {"label": label})
        fake = x + (then - t)[:, None] * velocity
        real = STATES[np.arange(SIZE), level + 1]

        def logits(heads, x, label=BATCH["cond"]["label"]):
            return JUDGE.judge(heads, JUDGE.features(TEACHER, x, level, {"label": label}), level)

        known = logits(critic_heads, jax.lax.stop_gradient(fake), label)
        critic = loss.critic(logits(critic_heads, real), known).mean(axis=1)
        if r1:
            slope = jax.grad(lambda x: logits(critic_heads, x).mean(axis=1).sum())(jnp.asarray(real))
            critic += 0.5 * r1 * (slope**2).sum(axis=1)
        fooled = loss.student(logits(HEADS, fake, label)).mean(axis=1)
        return critic.sum() + 0.5 * fooled.sum(), {"critic": critic.mean(), "student": fooled.mean()}

    (learned, taught), metrics = gradient((LEARNED, TEACHER))
    (heads, student), expected = of_terms((HEADS, PARAMS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, expected)
    for path, leaf in by_path(learned).items():
        expected = by_path({"heads": heads, "student": student})[path]
        np.testing.assert_allclose(leaf, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())), err_msg=path)
        assert float(jnp.abs(leaf).max()) > 0, path
    for path, leaf in by_path(taught).items():
        assert float(jnp.abs(leaf).max()) == 0, path


def test_the_games_are_the_published_ones():
    real, fake = np.float32([-2.0, 0.5, 3.0]), np.float32([1.0, -0.3, -4.0])
    saturating, hinge = objectives.non_saturating(), objectives.hinge()
    right = 1 / (1 + np.exp(-real)), 1 / (1 + np.exp(-fake))
    np.testing.assert_allclose(saturating.critic(real, fake), -np.log(right[0]) - np.log(1 - right[1]), rtol=1e-5)
    np.testing.assert_allclose(saturating.student(fake), -np.log(right[1]), rtol=1e-5)
    np.testing.assert_allclose(hinge.critic(real, fake), [5.0, 1.2, 0.0], rtol=1e-5)
    np.testing.assert_allclose(hinge.student(fake), -fake)


def test_a_level_is_judged_by_its_own_head_behind_its_own_block_at_its_own_time():
    heads = jax.jit(
        jax.jacrev(
            lambda heads: JUDGE.judge(heads, JUDGE.features(TEACHER, STATES[:, 1], LEVELS, BATCH["cond"]), LEVELS)
        )
    )(HEADS)
    for path, leaf in by_path(heads).items():
        touched = np.abs(np.asarray(leaf)).reshape(SIZE, STEPS, -1).max(axis=2) > 0
        np.testing.assert_array_equal(touched, np.arange(STEPS) == LEVELS[:, None], err_msg=path)
    behind = objectives.feature_discriminator(NETWORK, FLOW, GRID, blocks=(2, 2, 1))
    other = objectives.feature_discriminator(NETWORK, FLOW, [1.0, 0.9, 0.5, 0.0], blocks=(2, 0, 1))

    @jax.jit
    def features():
        return [one.features(TEACHER, BATCH["states"][:, 1], LEVELS, BATCH["cond"]) for one in (JUDGE, behind, other)]

    ours, same, apart = features()
    np.testing.assert_array_equal(ours, same)
    np.testing.assert_allclose(ours.mean(axis=-1), 0.0, atol=1e-5)
    differs = np.abs(np.asarray(ours - apart)).max(axis=(1, 2)) > 1e-4
    np.testing.assert_array_equal(differs, LEVELS < 2)


def linear_student():
    """x_next = x + (t' - t) p, with a parameter that says in which update a step was made."""
    return Network(
        lambda *_: {"p": jnp.float32(0)},
        lambda params, x, t, cond=None, train=False, key=None: (jnp.zeros_like(x) + params["p"], {}),
    )


def test_what_is_at_a_level_has_made_so_many_steps_with_the_parameters_of_those_updates():
    objective = made(student=linear_student(), weight=0.5)
    program = jax.jit(objective.loss)
    state = objective.init(KEY, LEARNED, BATCH)
    lengths, noises = np.diff(GRID), []
    for update in range(7):
        learned = {"student": {"p": np.float32(update + 1)}, "heads": HEADS}
        key = jax.random.key(update)
        batch = {**BATCH, "cond": {"label": np.full(SIZE, update % 3, np.int32)}}
        losses, aux = program(learned, state, batch, key)
        state = aux.state
        # What is told are means over the runs that have begun.
        told = aux.metrics["critic"] + 0.5 * aux.metrics["student"]
        np.testing.assert_allclose(told, losses[np.asarray(losses) != 0].mean(), rtol=1e-5)
        noises.append(FLOW.prior(example_keys(fold(key, 3), BATCH["index"]), (SIZE, 4)))
        for run in range(SIZE):
            first = -run % STEPS
            if update < first:
                assert losses[run] == 0
                continue
            assert losses[run] > 0
            steps = (update - first) % STEPS + 1
            began = update - steps + 1
            expected = noises[began][run] + sum(lengths[j] * (began + j + 1) for j in range(steps))
            np.testing.assert_allclose(state.x[run], expected, atol=1e-5)
            assert state.cond["label"][run] == began % 3
        levels = {int((update - -run % STEPS) % STEPS) for run in range(SIZE) if update >= -run % STEPS}
        assert levels == set(range(STEPS)) or update < STEPS - 1


def test_eight_devices_learn_what_one_does():
    objective, optimizer = made(OWN), optimiser()

    def three(mesh):
        state = training.init_state(objective, optimizer, lambda key: LEARNED, BATCH, mesh=mesh)
        step = training.make_train_step(objective, optimizer, mesh)
        placed = distributed.shard_batch(jax.device_get(BATCH), mesh)
        found = []
        for _ in range(4):
            state, metrics = step(state, placed)
            found.append([float(metrics[name]) for name in ("loss", "critic", "student", "mse")])
        return found, state

    alone, state = three(None)
    eight, _ = three(distributed.make_mesh(data=8))
    np.testing.assert_allclose(eight, alone, rtol=1e-5)
    moved = by_path(jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), state.params, LEARNED))
    assert min(moved.values()) > 0


def optimiser():
    adamw = training.optimizers.adamw
    return training.optimizers.alternating({"student": adamw(1e-3), "heads": adamw(1e-2)})


def test_a_run_that_was_stopped_goes_on_bit_for_bit_with_its_carried_samples(tmp_path):
    objective, optimizer = made(student=linear_student()), optimiser()

    class Runs:
        def __len__(self):
            return SIZE

        def __getitem__(self, index):
            return jax.tree.map(lambda leaf: leaf[index], {name: BATCH[name] for name in ("x0", "states", "cond")})

    def begin(key):
        return {"student": {"p": jnp.float32(0)}, "heads": HEADS}

    def trained(steps, workdir):
        batches = data.pipeline(Runs(), SIZE, seed=0)
        where = {"steps": steps, "workdir": workdir, "progress": False}
        return training.train(objective, optimizer, batches, init_params=begin, **where)

    trained(1, tmp_path / "cut")
    went_on, expected = trained(3, tmp_path / "cut"), trained(3, None)
    for part in ("params", "opt_state", "objective_state"):
        ours, theirs = (jax.tree.leaves(getattr(one, part)) for one in (went_on, expected))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_wrong_input_is_told():
    with pytest.raises(InvalidInput, match="weight"):
        made(weight=-1.0)
    for learned, told in (({"student": PARAMS}, "heads"), ({"heads": HEADS}, "student")):
        with pytest.raises(InvalidInput, match=told):
            made().init(KEY, learned, BATCH)
    with pytest.raises(InvalidInput, match="no 'states'"):
        made().init(KEY, LEARNED, {"x0": BATCH["x0"]})
    objective = made()
    half = jax.tree.map(lambda leaf: leaf[:4], BATCH)
    with pytest.raises(InvalidInput, match="accumulation"):
        objective.loss(LEARNED, begun(objective), half, KEY)
    for blocks in ((0, 1), (0, 1, 3)):
        with pytest.raises(InvalidInput, match="blocks"):
            objectives.feature_discriminator(NETWORK, FLOW, GRID, blocks=blocks)
    with pytest.raises(InvalidInput, match=r"network\.module"):
        objectives.feature_discriminator(linear_student(), FLOW, GRID)
