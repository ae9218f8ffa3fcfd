"""A learned choice of a time: a policy over K times that is trained by what each choice was worth.

It is a contextual bandit. The context x is what is known before the choice, the action is one of the times t_1 .. t_K,
and the reward r(x, t) is any function of a sample made with it. With the policy pi(k | x) = softmax of K logits,

    sampled:  grad = - (r - b) grad log pi(k | x),  k ~ pi(. | x)            (Williams 1992, REINFORCE)            (1)
    exact:    grad = - grad sum_k pi(k | x) r(x, t_k)                                                              (2)

both minus `entropy` times the gradient of the entropy of pi, without which a policy that has once become sure tries
nothing else. (1) has the expectation of (2) for every b that does not depend on k, and costs one evaluation of the
reward in the place of K. b is a running mean of rewards or, with several draws of k for each context, the mean reward
of the others (Kool et al. 2019). Where contexts differ in what can be had at all, a mean over all of them praises every
choice in the good ones, and the policy settles on what it tries first: use two draws. No gradient flows into what the
reward is made with.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import invalid, unknown
from diffusion_jax.models.choosing import Chooser
from diffusion_jax.objectives.batches import batch_size, example_keys, refuse_gradient
from diffusion_jax.randomness import fold
from diffusion_jax.typing import Aux, Frozen, Number, Objective, Params, Times

GRADIENTS = ("sampled", "exact")

Reward = Callable[..., Any]
"""`(params, batch, t [B], key) -> [B]`, such as `leap_reward`."""


class PolicyState(NamedTuple):
    """judge: parameters of the reward that do not learn. baseline: b. count: losses so far."""

    judge: Any
    baseline: Any
    count: Any


class JointState(NamedTuple):
    """inner: the state of the student's objective. policy: `PolicyState`."""

    inner: Any
    policy: PolicyState


def policy_loss(logits: Any, choice: Any, reward: Any, baseline: Any = 0.0, entropy: Number = 0.0) -> Any:
    """`[B]`: the loss whose gradient is equation (1), of `logits [B, K]`, `choice [B]` and `reward [B]`."""
    log_policy = jax.nn.log_softmax(logits)
    advantage = jax.lax.stop_gradient(reward - baseline)
    chosen = jnp.take_along_axis(log_policy, choice[:, None], axis=-1)[:, 0]
    return -advantage * chosen - entropy * _entropy(log_policy)


def expected_loss(logits: Any, rewards: Any, entropy: Number = 0.0) -> Any:
    """`[B]`: the loss whose gradient is equation (2), of `logits [B, K]` and the `rewards [B, K]` of all choices."""
    log_policy = jax.nn.log_softmax(logits)
    expected = jnp.sum(jnp.exp(log_policy) * jax.lax.stop_gradient(rewards), axis=-1)
    return -expected - entropy * _entropy(log_policy)


def time_policy(
    policy: Chooser,
    times: Times,
    reward: Reward,
    reward_params: Params = (),
    *,
    context: str = "base",
    gradient: str = "sampled",
    draws: int = 1,
    entropy: Number = 0.01,
    decay: Number = 0.99,
) -> Objective:
    """Equation (1) or (2) as an `Objective` of the parameters of `policy` alone.

    policy: of K actions (`models.chooser`), on `batch[context]`. times: `[K]`. reward: `(reward_params, batch, t [B],
        key) -> [B]`; reward_params do not learn. gradient: one of `GRADIENTS`. draws: of k for each context, where
        it is sampled; more than one needs no running mean. decay: of the running mean b.

    Metrics: `reward`, of the choice that was drawn (with "exact" its expectation), and `entropy`, in nats.
    Raises InvalidInput for a number of times that is not the number of actions.
    """
    times, reward = _checked(policy, times, gradient, draws, entropy, decay), _one_each(reward)

    def init(key, params, batch):
        return PolicyState(Frozen(reward_params), jnp.float32(0), jnp.int32(0))

    def chosen(logits, judge, state, batch, key):
        """Losses, the rewards of what was chosen, each `[B]`; without choices their expectation."""
        reward_key = fold(key, 6)
        if gradient == "exact":
            rewards = jax.lax.map(
                lambda t: reward(judge, batch, jnp.broadcast_to(t, logits.shape[:1]), reward_key), times
            ).T
            return expected_loss(logits, rewards, entropy), jnp.sum(jax.nn.softmax(logits) * rewards, axis=-1)
        keys = fold(example_keys(key, batch["index"]), 5)
        one = jax.vmap(lambda key, z: jax.random.categorical(key, z, shape=(draws,)))
        choices = one(keys, jax.lax.stop_gradient(logits)).T
        # The noise of the reward is the same for all of them.
        rewards = jax.lax.map(lambda choice: reward(judge, batch, times[choice], reward_key), choices)
        baseline = state.baseline if draws == 1 else (rewards.sum(0) - rewards) / (draws - 1)
        each = jax.vmap(policy_loss, (None, 0, 0, 0 if draws > 1 else None, None))
        return each(logits, choices, rewards, baseline, entropy).mean(0), rewards.mean(0)

    def loss(params, state, batch, key):
        batch = {"index": jnp.arange(batch_size(batch)), **batch}
        if context not in batch:
            raise unknown("context, what of the batch the policy sees,", context, batch)
        logits = policy.apply(params, batch[context])
        losses, found = chosen(logits, jax.lax.stop_gradient(state.judge.value), state, batch, key)
        mean = jax.lax.stop_gradient(jnp.mean(found.astype(jnp.float32)))
        # A plain mean at first.
        share = jnp.maximum(1.0 - decay, 1.0 / (state.count + 1.0))
        after = PolicyState(state.judge, state.baseline + share * (mean - state.baseline), state.count + 1)
        uncertain = jax.lax.stop_gradient(jnp.mean(_entropy(jax.nn.log_softmax(logits))))
        losses = losses.astype(jnp.float32)
        return losses, Aux(after, {"reward": mean, "entropy": uncertain}, {"loss": losses})

    return Objective(init, loss)


def with_time_policy(objective: Objective, policy: Objective, until: int = 4000) -> Objective:
    """`objective` of parameters {"student": ..., "policy": ...}, beside which a policy learns what the student is good
    for: its rewards are `reward(student, batch, t, key)`, and their gradient does not reach the student.

    policy: `time_policy(...)`, whose reward_params are the student's. until: losses after which it learns no more, its
        rewards are not computed, and its gradient is exactly 0. With `optimizers.alternating({"student": ..., "policy":
        optimizers.until(..., until)})` its parameters stay as they are then; momentum or weight decay alone would move
        them on.
    Metrics: those of both, where the reward is its running mean once the policy learns no more.
    """
    refuse_gradient(objective, "with_time_policy")

    def init(key, params, batch):
        for name in ("student", "policy"):
            if name not in params:
                raise unknown("an entry of the parameters", name, params)
        inner = objective.init(key, params["student"], batch)
        return JointState(inner, policy.init(key, params["policy"], batch))

    def loss(params, state, batch, key):
        losses, aux = objective.loss(params["student"], state.inner, batch, key)
        own = state.policy

        def learn():
            judged = own._replace(judge=Frozen(params["student"]))
            more, said = policy.loss(params["policy"], judged, batch, fold(key, 5))
            return more, said.metrics, said.state.baseline

        def rest():
            nothing = {"reward": own.baseline, "entropy": jnp.float32(0)}
            return jnp.zeros_like(losses, jnp.float32), nothing, own.baseline

        more, metrics, baseline = jax.lax.cond(own.count < until, learn, rest)
        after = JointState(aux.state, PolicyState(own.judge, baseline, own.count + 1))
        return losses + more, aux._replace(state=after, metrics={**aux.metrics, **metrics})

    prepare = objective.prepare
    return Objective(init, loss, prepare and (lambda state, batch, key: prepare(state.inner, batch, key)))


def chosen_times(policy: Chooser, params: Params, times: Times, context: Any) -> Any:
    """The time `[B]` that the policy prefers for each `context [B, ...]`."""
    return jnp.asarray(times, jnp.float32)[jnp.argmax(policy.apply(params, context), axis=-1)]


def _one_each(reward):
    """`reward`, which is told when it is not one number an example."""

    def checked(params, batch, t, key):
        found = reward(params, batch, t, key)
        if jnp.shape(found) != jnp.shape(t):
            raise invalid("the shape of the reward", jnp.shape(found), f"one for each example, {t.shape}, is needed")
        return found

    return checked


def _checked(policy, times, gradient, draws, entropy, decay):
    times = np.asarray(times, np.float32)
    if times.shape != (policy.count,):
        raise invalid("times.shape", times.shape, f"one time for each of the policy's {policy.count} actions is needed")
    if not ((times >= 0) & (times <= 1)).all():
        raise invalid("times", times.tolist(), "times in [0, 1] are needed")
    times = jnp.asarray(times)
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    if draws < 1:
        raise invalid("draws", draws, "at least one choice for each context is needed")
    if entropy < 0 or not 0 <= decay < 1:
        raise invalid("entropy, decay", (entropy, decay), "a weight of at least 0 and a decay in [0, 1) are needed")
    return times


def _entropy(log_policy):
    return -jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1)
