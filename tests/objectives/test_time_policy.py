"""A policy over times: its two gradients are one in the mean, it reaches nothing else, and it comes to rest."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data, distributed, models, objectives, training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import Chooser
from diffusion_jax.objectives import expected_loss, policy_loss
from diffusion_jax.typing import Aux, Objective
from tests.models.drawn import drawn
from tests.objectives.resumed import trained

KEY = jax.random.key(0)
TIMES = (0.1, 0.3, 0.5, 0.9)
BATCH = {"x0": np.zeros((3, 2), np.float32), "index": jnp.arange(3)}
BATCH["base"] = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
CHOOSER = Chooser(lambda key, x: {"w": jnp.zeros((2, 4))}, lambda params, x: x @ params["w"], 4)
PARAMS = {"w": np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)}


def reward(judge, batch, t, key):
    return judge["best"] - jnp.square(t - batch["base"][:, 0])


JUDGE = {"best": jnp.float32(0.7)}


@pytest.mark.parametrize("entropy", [0.0, 0.2])
def test_the_sampled_gradient_is_the_exact_one_in_expectation_whatever_the_baseline(entropy):
    rng = np.random.default_rng(2)
    logits, rewards = (rng.standard_normal((8,)).astype(np.float32) for _ in range(2))

    @jax.jit
    def sampled(logits, share, other):
        choice, another = jax.random.categorical(KEY, logits, shape=(2, 100_000))
        baseline = share + other * jnp.asarray(rewards)[another]
        whole = jnp.broadcast_to(logits, (100_000, 8))
        each = jax.grad(lambda z: policy_loss(z, choice, jnp.asarray(rewards)[choice], baseline, entropy).sum())(whole)
        return each.mean(0), each.std(0) / np.sqrt(100_000)

    exact = jax.grad(lambda z: expected_loss(z[None], rewards[None], entropy)[0])(logits)
    share = jax.nn.softmax(logits)
    ours, error = sampled(logits, 0.0, 0.0)
    assert (np.abs(ours - exact) < 4.5 * error).all()
    nearer, less = sampled(logits, float(share @ rewards), 0.0)
    assert (np.abs(nearer - exact) < 4.5 * less).all() and np.linalg.norm(less) < np.linalg.norm(error)
    # The reward of another draw is as good a baseline as a number.
    found, error = sampled(logits, 0.0, 1.0)
    assert (np.abs(found - exact) < 4.5 * error).all()
    # By hand: d/dz of -sum pi r - entropy H.
    by_hand = -share * (rewards - share @ rewards)
    log = np.log(share)
    by_hand += entropy * share * (log - share @ log)
    np.testing.assert_allclose(exact, by_hand, atol=1e-5)


@pytest.mark.parametrize(("gradient", "draws"), [("sampled", 1), ("sampled", 3), ("exact", 1)])
def test_what_judges_learns_nothing_and_the_policy_does(gradient, draws):
    objective = objectives.time_policy(CHOOSER, TIMES, reward, JUDGE, gradient=gradient, draws=draws)
    state = objective.init(KEY, PARAMS, BATCH)

    @jax.jit
    def gradients(params, judge):
        def mean(params, judge):
            own = state._replace(judge=state.judge._replace(value=judge))
            losses, aux = objective.loss(params, own, BATCH, KEY)
            return losses.mean(), aux

        return jax.grad(mean, (0, 1), has_aux=True)(params, judge)

    (own, judge), aux = gradients(PARAMS, JUDGE)
    assert np.abs(own["w"]).max() > 1e-3 and float(judge["best"]) == 0.0
    np.testing.assert_allclose(aux.state.baseline, aux.metrics["reward"], rtol=1e-6)
    if gradient == "exact":
        share = jax.nn.softmax(BATCH["base"] @ PARAMS["w"])
        rewards = 0.7 - np.square(np.asarray(TIMES) - BATCH["base"][:, :1])
        np.testing.assert_allclose(aux.metrics["reward"], (share * rewards).sum(1).mean(), rtol=1e-5)


def test_in_the_mean_what_is_sampled_is_what_is_exact():
    """The gradient and what is reported, whatever the running mean is and however many draws there are."""
    many = {name: np.repeat(BATCH[name], 10_000, axis=0) for name in ("x0", "base")}
    many["index"] = jnp.arange(30_000)

    def of(gradient, draws=1, batch=many):
        objective = objectives.time_policy(CHOOSER, TIMES, reward, JUDGE, gradient=gradient, draws=draws, entropy=0.1)
        state = objective.init(KEY, PARAMS, batch)._replace(baseline=jnp.float32(0.5), count=jnp.int32(7))

        def mean(params):
            losses, aux = objective.loss(params, state, batch, KEY)
            return losses.mean(), aux

        return jax.grad(mean, has_aux=True)(PARAMS)

    found = jax.device_get(
        jax.jit(lambda: [of("exact"), of("sampled"), of("sampled", 3), of("sampled", 10_000, BATCH)])()
    )
    exact, told = found[0]
    size = np.abs(exact["w"]).max()
    for grads, aux in found[1:]:
        np.testing.assert_allclose(grads["w"], exact["w"], atol=0.05 * size)
        np.testing.assert_allclose(aux.metrics["reward"], told.metrics["reward"], atol=0.01)
        np.testing.assert_allclose(aux.metrics["entropy"], told.metrics["entropy"], rtol=1e-5)
    assert told.metrics["entropy"] > 0
    # After seven rewards the running mean is still a plain one.
    np.testing.assert_allclose(told.state.baseline, 0.5 + (told.metrics["reward"] - 0.5) / 8, rtol=1e-5)
    assert int(told.state.count) == 8


def test_the_running_mean_forgets_and_a_run_goes_on_bit_for_bit(tmp_path):
    objective = objectives.time_policy(CHOOSER, TIMES, reward, JUDGE, decay=0.75)
    state = objective.init(KEY, PARAMS, BATCH)._replace(baseline=jnp.float32(0.2), count=jnp.int32(50))
    aux = objective.loss(PARAMS, state, BATCH, KEY)[1]
    np.testing.assert_allclose(aux.state.baseline, 0.2 + 0.25 * (aux.metrics["reward"] - 0.2), rtol=1e-5)
    source = data.ArraySource(BATCH["x0"], beside={"base": BATCH["base"]})
    both = joint(until=2)
    params, mesh = jax.tree.map(jnp.asarray, BOTH), distributed.make_mesh(devices=1)
    run = partial(trained, both, source, params, batch_size=3, mesh=mesh)
    whole = run(3)
    run(1, tmp_path)
    resumed = run(3, tmp_path)
    kept = [(one.params, one.objective_state) for one in (resumed, whole)]
    jax.tree.map(np.testing.assert_array_equal, *kept)
    # Two rewards were seen, whose plain mean it is, and the third loss had none.
    assert int(whole.objective_state.policy.count) == 3 and float(whole.objective_state.policy.baseline) > 0


def joint(until):
    """A student that learns x0 by one number, and a policy that is judged by the student."""

    def loss(params, state, batch, key):
        losses = jnp.square(params["number"] - 2.0) + jnp.zeros(3)
        return losses, Aux(state, {}, {"loss": losses})

    student = Objective(lambda key, params, batch: (), loss)

    def judged(params, batch, t, key):
        return params["number"] * t

    return objectives.with_time_policy(student, objectives.time_policy(CHOOSER, TIMES, judged), until)


BOTH = {"student": {"number": jnp.float32(1.0)}, "policy": PARAMS}


def test_beside_a_student_each_learns_by_its_own_loss_alone_and_the_policy_stops():
    objective = joint(until=2)
    begun = objective.init(KEY, BOTH, BATCH)

    @jax.jit
    def gradient(count):
        state = begun._replace(policy=begun.policy._replace(count=count))
        return jax.grad(lambda params: objective.loss(params, state, BATCH, KEY)[0].mean())(BOTH)

    early, late = gradient(1), gradient(2)
    assert float(early["student"]["number"]) == float(late["student"]["number"]) == -2.0
    assert np.abs(early["policy"]["w"]).max() > 1e-4 and not np.asarray(late["policy"]["w"]).any()


def test_after_its_last_step_nothing_moves_the_policy():
    """Adam's momentum and the decay of weights would."""
    rate = training.optimizers.adamw(learning_rate=0.1, weight_decay=0.1)
    parts = {"student": rate, "policy": training.optimizers.until(rate, 2)}
    optimizer, objective = training.optimizers.alternating(parts), joint(until=2)
    state = objective.init(KEY, BOTH, BATCH)

    @jax.jit
    def step(params, state, moments):
        def mean(params):
            losses, aux = objective.loss(params, state, BATCH, KEY)
            return losses.mean(), aux

        found, aux = jax.grad(mean, has_aux=True)(params)
        updates, moments = optimizer.update(found, moments, params)
        return jax.tree.map(jnp.add, params, updates), aux.state, moments

    params, moments, seen = BOTH, optimizer.init(BOTH), []
    for _ in range(4):
        params, state, moments = step(params, state, moments)
        seen.append(jax.device_get(params))
    assert not np.array_equal(seen[0]["policy"]["w"], seen[1]["policy"]["w"])
    np.testing.assert_array_equal(seen[1]["policy"]["w"], seen[3]["policy"]["w"])
    assert seen[1]["student"]["number"] != seen[3]["student"]["number"]


def test_the_preferred_time_is_one_for_each_context():
    chosen = objectives.chosen_times(CHOOSER, {"w": 5 * jnp.eye(2, 4)}, TIMES, np.eye(2, dtype=np.float32))
    np.testing.assert_allclose(chosen, TIMES[:2])


@pytest.mark.parametrize("shape", [(2, 6), (2, 4, 4, 3), (2, 3, 4, 4, 2)])
def test_a_fresh_chooser_has_no_preference_and_looks_at_all_that_it_is_given(shape):
    policy = models.chooser(3, width=8, depth=2)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    abstract = jax.eval_shape(policy.init, KEY, x)
    assert abstract["logits"]["kernel"].shape == (8, 3)

    @jax.jit
    def of(x):
        params = drawn(abstract, 0)
        fresh = {**params, "logits": jax.tree.map(jnp.zeros_like, params["logits"])}
        return policy.apply(fresh, x), jax.grad(lambda x: policy.apply(params, x)[:, 0].sum())(x)

    logits, seen = of(x)
    assert not np.asarray(logits).any() and np.abs(seen).reshape(-1).min() > 0


def test_wrong_input_is_named():
    with pytest.raises(InvalidInput, match=r"times\.shape"):
        objectives.time_policy(CHOOSER, (0.1, 0.2), reward)
    with pytest.raises(InvalidInput, match="gradient"):
        objectives.time_policy(CHOOSER, TIMES, reward, gradient="simple")
    with pytest.raises(InvalidInput, match="draws"):
        objectives.time_policy(CHOOSER, TIMES, reward, draws=0)
    with pytest.raises(InvalidInput, match="entropy"):
        objectives.time_policy(CHOOSER, TIMES, reward, entropy=-1.0)
    for times in ((0.1, 0.2, 0.3, 3.0), (0.1, 0.2, 0.3, np.nan)):
        with pytest.raises(InvalidInput, match=r"times is .* in \[0, 1\]"):
            objectives.time_policy(CHOOSER, times, reward)
    with pytest.raises(InvalidInput, match="steps"):
        training.optimizers.until(training.optimizers.adamw(), -1)
    # What a batch, the parameters or a reward lack, at the first loss.
    with pytest.raises(InvalidInput, match="an entry of the parameters is 'policy'"):
        joint(1).init(KEY, {"student": 0.0}, BATCH)
    for wrong, told in (
        (objectives.time_policy(CHOOSER, TIMES, reward, context="picture"), "the policy sees, is 'picture'"),
        (objectives.time_policy(CHOOSER, TIMES, lambda *_: jnp.float32(0)), r"shape of the reward is \(\)"),
    ):
        with pytest.raises(InvalidInput, match=told):
            wrong.loss(PARAMS, wrong.init(KEY, PARAMS, BATCH), BATCH, KEY)
