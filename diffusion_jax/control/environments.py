"""Environments and rollouts: one scan where the environment is written in JAX, a loop where it is a Python object.

Actions lie in [-1, 1], and observations should. An episode has a fixed number of steps and continues after its task is
done, so that all episodes have one shape; `Rollout.time` is when it was first done.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from diffusion_jax import randomness
from diffusion_jax.control.policies import Policy
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.typing import NO_COST, Cost, Params


class Environment(NamedTuple):
    """An environment as pure functions of one state; `rollout` runs many at once.

    reset: (key) -> state, any pytree of arrays
    step: (state, action [A], key) -> state; actions lie in [-1, 1]
    observe: (state) -> a dict of arrays, of which a policy sees the last ones, `[E, history, ...]` each
    done: (state) -> bool []
    """

    reset: Callable[..., Any]
    step: Callable[..., Any]
    observe: Callable[[Any], dict]
    done: Callable[[Any], Any]


class Rollout(NamedTuple):
    """`E` episodes of `T` steps, all of them whole.

    states: a pytree `[E, T + 1, ...]`, the start first; of simulators their observations. actions: those executed.
    done: after each step. score: after each step, where simulators tell one. cost: of the policy, an episode.
    """

    states: Any
    actions: Float[Array | np.ndarray, "*E T A"]
    done: Bool[Array | np.ndarray, "*E T"]
    cost: Cost = NO_COST
    score: Any = None

    @property
    def success(self) -> Bool[Array, "*E"]:
        """Whether the task was ever done."""
        return jnp.any(self.done, axis=-1)

    @property
    def time(self) -> Int[Array, "*E"]:
        """The number of steps until the task was first done; T where it never was."""
        steps = self.done.shape[-1]
        return jnp.where(self.success, jnp.argmax(self.done, axis=-1) + 1, steps)


def rollout(
    environment: Environment,
    policy: Policy,
    params: Params,
    key: Key[Array, ""],
    *,
    episodes: int,
    steps: int,
    history: int = 1,
) -> Rollout:
    """Lets a policy act for so many steps in `episodes` environments at once: one scan over its decisions.

    Pure, to be jitted with `params` and `key` as arguments. Episode i is a function of (key, i), however many run
    beside it.
    history: observations that the policy sees, the latest last; the first is repeated at the start. They are made of
        states when a decision is due, so costly ones (pictures) are made no more often than they are looked at.
    """
    _positive(episodes=episodes, steps=steps, history=history)
    worlds, deciding = jax.random.split(key)
    reset_keys, step_keys = randomness.split(randomness.sample_keys(worlds, jnp.arange(episodes)), 2)
    first = jax.vmap(environment.reset)(reset_keys)
    observed = jax.vmap(jax.vmap(environment.observe))

    def live(loop, action):
        past, time = loop
        action = jnp.clip(action, -1.0, 1.0)
        now = jax.tree.map(lambda leaf: leaf[:, -1], past)
        after = jax.vmap(environment.step)(now, action, randomness.fold(step_keys, time))
        past = jax.tree.map(lambda old, new: jnp.concatenate([old[:, 1:], new[:, None]], axis=1), past, after)
        return (past, time + 1), (after, action, jax.vmap(environment.done)(after))

    def decide(loop, index):
        carry, past, time = loop
        actions, carry = policy.act(params, carry, observed(past), jax.random.fold_in(deciding, index))
        (past, time), record = jax.lax.scan(live, (past, time), jnp.swapaxes(actions, 0, 1))
        return (carry, past, time), record

    past = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], history, axis=1), first)
    carry = policy.init(params, observed(past), jax.random.fold_in(deciding, 0))
    start = (carry, past, jnp.zeros((), jnp.int32))
    chunk = jax.tree.leaves(jax.eval_shape(lambda loop: decide(loop, 1)[1][1], start))[0].shape[0]
    (carry, *_), record = jax.lax.scan(decide, start, jnp.arange(1, 1 - (-steps // chunk)))

    def by_episode(leaf):
        return jnp.swapaxes(leaf.reshape(-1, *leaf.shape[2:])[:steps], 0, 1)

    states, actions, done = jax.tree.map(by_episode, record)
    states = jax.tree.map(lambda one, rest: jnp.concatenate([one[:, None], rest], axis=1), first, states)
    return Rollout(states, actions, done, policy.cost(carry))


class EventState(NamedTuple):
    """A state and how many steps led to it."""

    state: Any
    time: Any


def with_event(environment: Environment, after: int, change: Callable[[Any], Any]) -> Environment:
    """The environment whose state becomes `change(state)` once, when `after + 1` steps have been made.

    Only what is done from then on counts as done, so that `Rollout.success` tells whether the policy adapted: a goal
    that jumps, a push from outside. States are `EventState`.
    """
    if after < 0:
        raise invalid("after", after, "it must not be negative")

    def step(timed, action, key):
        state = environment.step(timed.state, action, key)
        state = jax.tree.map(lambda a, b: jnp.where(timed.time == after, a, b), change(state), state)
        return EventState(state, timed.time + 1)

    return Environment(
        lambda key: EventState(environment.reset(key), jnp.zeros((), jnp.int32)),
        step,
        lambda timed: environment.observe(timed.state),
        lambda timed: environment.done(timed.state) & (timed.time > after),
    )


class Simulator(NamedTuple):
    """An environment that is a Python object, such as one of gymnasium, as two functions.

    reset: () -> observation, a dict of arrays
    step: (action [A] in [-1, 1]) -> (observation, done, score)
    """

    reset: Callable[[], dict]
    step: Callable[[np.ndarray], tuple[dict, bool, float]]


def rollout_simulators(
    simulators: Sequence[Simulator],
    policy: Policy,
    params: Params,
    key: Key[Array, ""],
    *,
    steps: int,
    history: int = 1,
) -> Rollout:
    """`rollout` for simulators in Python: a loop, whose decisions see all of them together.

    `policy.act` is worth compiling: `policy._replace(act=jax.jit(policy.act))`. An episode that is done is not
    stepped any further: what was observed last, done and the score repeat.
    """
    _positive(steps=steps, history=history)
    if not simulators:
        raise InvalidInput("simulators is empty: at least one is needed.")

    def stacked(observations):
        return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *observations)

    now = [(simulator.reset(), False, -np.inf) for simulator in simulators]
    path, taken, told = [stacked([one[0] for one in now])], [], []
    past = jax.tree.map(lambda leaf: np.repeat(leaf[:, None], history, axis=1), path[0])
    carry = policy.init(params, past, jax.random.fold_in(key, 0))
    decisions = 0
    while len(taken) < steps:
        decisions += 1
        actions, carry = policy.act(params, carry, past, jax.random.fold_in(key, decisions))
        for action in np.clip(np.swapaxes(np.asarray(actions), 0, 1), -1, 1)[: steps - len(taken)]:
            now = [
                one if one[1] else simulator.step(own)
                for simulator, one, own in zip(simulators, now, action, strict=True)
            ]
            taken.append(action)
            path.append(stacked([one[0] for one in now]))
            told.append([one[1:] for one in now])
            past = jax.tree.map(lambda old, new: np.concatenate([old[:, 1:], new[:, None]], axis=1), past, path[-1])
    record = np.asarray(told, np.float32)
    states = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *path)
    done, score = record[..., 0].T > 0, record[..., 1].T
    return Rollout(states, np.stack(taken, axis=1).astype(np.float32), done, policy.cost(carry), score)


def _positive(**fields):
    for name, value in fields.items():
        if value < 1:
            raise invalid(name, value, "it must be at least 1")
