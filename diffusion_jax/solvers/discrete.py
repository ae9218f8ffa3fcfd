"""Solvers of the discrete processes, and the solver that gives each modality of joint data a method of its own.

`prediction.x0` holds log-probabilities of the clean token, `[..., V]`; x holds int32 tokens.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.processes import kind_of, members
from diffusion_jax.randomness import draw_per_sample, fold, split, uniform
from diffusion_jax.solvers.base import modality_of, per_modality
from diffusion_jax.time_axes import batch_axes, expand
from diffusion_jax.typing import Solver

CONFIDENCES = ("probability", "margin", "entropy", "random")


def _gumbel(key, shape, dtype):
    return draw_per_sample(jax.random.gumbel, key, shape).astype(dtype)


def _of_kind(name, needed, *kinds):
    def init(process, x, grid):
        for part in members(process).values():
            if kind_of(part) not in kinds:
                raise InvalidInput(f"solver {name!r} needs {needed} process, but got {type(part).__name__}.")
        return ()

    return init


def _keys_per_modality(key, x):
    return dict(zip(sorted(x), split(key, len(x)))) if isinstance(x, dict) else key


def ancestral(temperature: float = 1.0) -> Solver:
    """Draws every token from the posterior `sum_x0 q(x' | x_t, x0) p(x0 | x_t)`, independently (tau-leaping).

    Exact for each token alone; tokens that change in the same step are drawn as if independent, an error that vanishes
    with the step. temperature: divides the log-probabilities of x0; 0 takes the likeliest x0.
    One evaluation a step. Austin et al. 2021, equation 4; Campbell et al. 2022. Raises InvalidInput if negative.
    """
    if temperature < 0:
        raise invalid("temperature", temperature, "it must not be negative")

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)

        def update(process, x, log_x0, key, t, t_next):
            if temperature == 0:
                log_x0 = _log_one_hot(jnp.argmax(log_x0, axis=-1), log_x0)
            elif temperature != 1:
                log_x0 = jax.nn.log_softmax(log_x0 / temperature)
            logits = process.posterior(log_x0, x, t, t_next)
            drawn = jnp.argmax(logits + _gumbel(key, logits.shape, logits.dtype), axis=-1)
            return drawn.astype(x.dtype)

        x = per_modality(update, process, x, answer.x0, _keys_per_modality(key, x), step.t, step.t_next)
        return x, state, carry

    return Solver(_of_kind("ancestral", "a discrete", "discrete", "absorbing"), step, order=1)


def _log_one_hot(index, like):
    return jnp.where(index[..., None] == jnp.arange(like.shape[-1]), 0.0, jnp.finfo(like.dtype).min)


def unmask(confidence: str = "probability", temperature: float = 1.0, noise: float = 0.0) -> Solver:
    """Unmasks the most confident tokens first (Chang et al. 2022, MaskGIT; Nie et al. 2025, LLaDA), for `Absorbing`.

    Each step draws a candidate for every mask and keeps the most confident ones, as many as make the expected number of
    masks `round(N (1 - alpha(t')))` per sample, where N is its number of tokens; at t' = 0 none is left. With a vector
    of times the numbers are those of the mean of `1 - alpha(t')` over the sample, and only tokens that move change.

    confidence: 'probability' of the candidate, 'margin' between the two likeliest, negative 'entropy', or 'random'.
        Only the first looks at what was drawn, which favours likely sequences; with one token a step and an exact
        denoiser the others keep the distribution.
    temperature: of the candidates; 0 takes the likeliest. noise: Gumbel noise on the confidence, times `1 - alpha(t')`.
    One evaluation a step. Raises InvalidInput for another confidence or negative values.
    """
    if confidence not in CONFIDENCES:
        raise unknown("confidence", confidence, CONFIDENCES)
    for field, value in (("temperature", temperature), ("noise", noise)):
        if value < 0:
            raise invalid(field, value, "it must not be negative")

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)

        def update(process, x, log_x0, key, t, t_next):
            token_key, order_key = split(key, 2)
            if temperature == 0:
                candidate = jnp.argmax(log_x0, axis=-1)
            else:
                perturbed = log_x0 / temperature + _gumbel(token_key, log_x0.shape, log_x0.dtype)
                candidate = jnp.argmax(perturbed, axis=-1)
            lost = jnp.broadcast_to(expand(process.sigma(t_next), x), x.shape)
            moves = jnp.broadcast_to(expand(t != t_next, x), x.shape)
            score = _confidence(log_x0, candidate, order_key)
            score = score + noise * lost * _gumbel(fold(order_key, 1), x.shape, score.dtype)
            masked = process.is_masked(x)
            flat = (x.shape[0], -1)
            target = jnp.round(lost.reshape(flat).sum(axis=1)).astype(jnp.int32)
            reveal = jnp.maximum(masked.reshape(flat).sum(axis=1) - target, 0)
            # Tokens whose own time has come to an end are revealed first, whatever the count says.
            score = jnp.where(lost == 0, jnp.inf, score)
            score = jnp.where(masked & moves, score, -jnp.inf).reshape(flat)
            rank = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
            chosen = (rank < reveal[:, None]).reshape(x.shape) | (lost == 0)
            return jnp.where(chosen & masked & moves, candidate.astype(x.dtype), x)

        x = per_modality(update, process, x, answer.x0, _keys_per_modality(key, x), step.t, step.t_next)
        return x, state, carry

    def _confidence(log_x0, candidate, key):
        if confidence == "probability":
            return jnp.take_along_axis(log_x0, candidate[..., None], axis=-1)[..., 0]
        if confidence == "margin":
            best = jax.lax.top_k(jnp.exp(log_x0), 2)[0]
            return best[..., 0] - best[..., 1]
        if confidence == "entropy":
            return (jnp.exp(log_x0) * log_x0).sum(axis=-1)
        return uniform(key, candidate.shape)

    return Solver(_of_kind("unmask", "an absorbing", "absorbing"), step, order=1)


def joint(solvers: Mapping[str, Solver]) -> Solver:
    """A solver for each modality: `joint({"image": ddim(), "text": ancestral()})`, one joint evaluation a step.

    Every solver must evaluate once a step and is given its own modality of that evaluation. Modality i in alphabetical
    order draws with `split(key, n)[i]`. Raises InvalidInput when the names are not the process's, or when a solver
    evaluates more than once.
    """
    solvers = dict(solvers)

    def init(process, x, grid):
        if not isinstance(x, dict) or set(solvers) != set(x):
            names = sorted(x) if isinstance(x, dict) else "a single array"
            raise invalid("solvers", sorted(solvers), f"one solver per modality was expected; the data is {names}")
        parts = process.processes
        return {
            name: solver.init(parts[name], x[name], grid[name] if isinstance(grid, dict) else grid)
            for name, solver in solvers.items()
        }

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)
        keys = _keys_per_modality(key, x)
        results = {}
        for name, solver in solvers.items():
            part, own = modality_of(answer, name), modality_of(step, name)
            results[name] = solver.step(
                process.processes[name], _once(part, name), (), state[name], x[name], own, keys[name]
            )
        return (
            {name: result[0] for name, result in results.items()},
            {name: result[1] for name, result in results.items()},
            carry,
        )

    def axes(state):
        return {name: batch_axes(solver, state[name]) for name, solver in solvers.items()}

    return Solver(init, step, min((solver.order for solver in solvers.values()), default=1), axes)


def _once(prediction, name):
    """A denoise function that has one answer to give."""
    calls = []

    def denoise(carry, x, step):
        if calls:
            raise InvalidInput(
                f"solvers[{name!r}] evaluates more than once a step, but joint() evaluates once for all."
            )
        calls.append(step)
        return prediction, carry

    return denoise
