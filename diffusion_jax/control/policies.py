"""Policies, made from a denoiser of actions or written as functions.

A diffusion policy denoises a plan of h actions given what is observed, executes the first n and plans anew (Chi et al.
2023). Where the actions of a plan have rising noise levels, the part that was not executed is kept half denoised,
and a decision costs a share of the steps (Høeg et al. 2024). What is observed becomes the condition as it is: networks
that read it are `models.observing` and `models.watching`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import randomness
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.sampling import Samples, sample
from diffusion_jax.streaming import rolling
from diffusion_jax.time_axes import batch_size
from diffusion_jax.typing import NO_COST, Condition, Cost, Denoiser, Params, Plan, Solver, Times

PRIMERS = ("zero", "denoise")
"""What a stream of actions is begun with: zeros noised to its levels, or a whole plan noised to them."""


class Policy(NamedTuple):
    """A policy that acts in `E` environments at once: pure functions, with parameters as arguments.

    init: (params, observation, key) -> carry, at the beginning of the episodes
    act: (params, carry, observation, key) -> (actions [E, n, A], carry); all n actions, in [-1, 1], are executed before
        the next call
    cost: (carry) -> Cost, what an environment has spent so far; nothing by default

    observation: a dict of `[E, history, ...]`, the latest last. key: one a call; environment i draws from
    `fold_in(key, i)`, so that it is the same however many are beside it.
    """

    init: Callable[..., Any]
    act: Callable[..., tuple[Any, Any]]
    cost: Callable[[Any], Cost] = lambda carry: NO_COST


def receding_horizon(
    denoiser: Denoiser, solver: Solver, grid: Plan, *, shape: Any, execute: int, modality: str | None = None
) -> Policy:
    """Diffusion Policy: each decision denoises a new plan and executes its first actions (Chi et al. 2023).

    denoiser: of plans, given the observation as its condition. `denoisers.clipped` keeps it to actions in [-1, 1].
    grid: `[S + 1]` or any plan: S evaluations a decision.
    shape: of one plan, `(h, A)`; a dict where actions are one modality of joint data, which is then named. With
        `grid=timesteps.roles(grid, {"action": "generate", "future": "ignored"})` a world model acts (Zhu et al. 2025).
    execute: how many of the h actions are executed before the next decision.

    Raises InvalidInput for a modality that is not in shape, and an `execute` outside of 1 .. h.
    """
    if (modality is None) == isinstance(shape, dict):
        raise InvalidInput(
            f"modality is {modality!r}, but shape is {shape}: a dict of shapes, and only that, needs one."
        )
    if modality is not None and modality not in shape:
        raise unknown("modality", modality, shape)
    horizon = (shape if modality is None else shape[modality])[0]
    if not 1 <= execute <= horizon:
        raise invalid("execute", execute, f"it must lie in 1 .. {horizon}, the actions of a plan")

    def act(params, cost, observation, key):
        made = _plan(denoiser, solver, grid, shape, params, observation, key)
        actions = made.x if modality is None else made.x[modality]
        return actions[:, :execute], cost + made.cost

    return Policy(lambda params, observation, key: NO_COST, act, lambda cost: cost)


def streamed_actions(
    denoiser: Denoiser,
    solver: Solver,
    grid: Times,
    *,
    shape: tuple[int, ...],
    chunk: int,
    primer: str | Callable[..., Any] = "zero",
) -> Policy:
    """Streaming Diffusion Policy: a plan whose chunk i of h waits at the level (i + 1) / h (Høeg et al. 2024).

    A decision advances the buffer by S / h steps under what is now observed, until its first chunk is clean, executes
    that, and lets fresh noise in at the end (see `streaming.rolling`). The network must be trained on such levels:
    `timesteps.on_rows(timesteps.chunk_staircase(grid, entries, chunk))` in most examples. The price is reactivity:
    later chunks were begun under older observations.

    shape: of the buffer, `(entries, A)`, h = entries // chunk. grid: `[S + 1]`, ends at 0.
    primer: what the buffer is begun with and noised to its levels: "zero", the cheapest; "denoise", a whole plan, which
        costs S evaluations once; or `(params, observation, key) -> [E, entries, A]`, for example a pose repeated.

    Raises InvalidInput for another primer, and what `rolling` refuses.
    """
    if isinstance(primer, str) and primer not in PRIMERS:
        raise unknown("primer", primer, PRIMERS)
    buffer = rolling(denoiser, solver, grid, entries=shape[0], chunk=chunk)

    def init(params, observation, key):
        first, own = jax.random.split(key)
        if callable(primer):
            return buffer.prime(own, primer(params, observation, first))
        if primer == "zero":
            return buffer.prime(own, jnp.zeros((batch_size(observation), *shape)))
        whole = _plan(denoiser, solver, grid, shape, params, observation, first)
        stream = buffer.prime(own, whole.x)
        return stream._replace(run=stream.run._replace(cost=whole.cost))

    def act(params, stream, observation, key):
        stream, actions = buffer.advance(params, stream, observation)
        return actions, stream

    return Policy(init, act, lambda stream: stream.run.cost)


def with_action_noise(policy: Policy, deviation: float) -> Policy:
    """The policy with normal noise on each action, clipped to [-1, 1], so that demonstrations include recoveries.

    deviation: its standard deviation.
    """
    if deviation < 0:
        raise invalid("deviation", deviation, "it must not be negative")

    def act(params, carry, observation, key):
        own, other = jax.random.split(key)
        actions, carry = policy.act(params, carry, observation, own)
        noise = randomness.normal(randomness.sample_keys(other, jnp.arange(actions.shape[0])), actions.shape)
        return jnp.clip(actions + deviation * noise, -1.0, 1.0), carry

    return policy._replace(act=act)


def decision_cost(policy: Policy, params: Params, observation: Condition) -> Cost:
    """What one decision costs an environment, counted from what ran: evaluations, and compute in full passes.

    Of the second decision, so that what a policy does once, such as priming a stream, is not in it.
    """

    @jax.jit
    def spent(params, observation):
        key = jax.random.key(0)
        carry = policy.init(params, observation, key)
        _, once = policy.act(params, carry, observation, key)
        _, twice = policy.act(params, once, observation, key)
        return jax.tree.map(lambda one, two: two - one, policy.cost(once), policy.cost(twice))

    return jax.tree.map(float, spent(params, observation))


def _plan(denoiser, solver, grid, shape, params, observation, key) -> Samples:
    size = batch_size(observation)
    whole = {name: (size, *one) for name, one in shape.items()} if isinstance(shape, dict) else (size, *shape)
    return sample(key, denoiser, params, solver, grid, shape=whole, cond=observation)
