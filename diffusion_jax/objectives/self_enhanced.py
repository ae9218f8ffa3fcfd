"""Training on states that a model made itself, with the true answer as the target.

In a run a network sees states that hold the errors of its earlier answers; in training it sees states made of the data.
Here a share of the examples is taken to a later time t' = t + u min(gap, 1 - t), u uniform, and brought back by one
DDIM step of an average of the parameters,

    (x0', eps') = D_average(x_t', t'),      x_t = alpha_t x0' + sigma_t eps'                                      (1)

so that x_t is what a run would hold. The target is that of the true x0: of the noise by which x_t differs from it,

    eps = (x_t - alpha_t x0) / sigma_t                                                                            (2)

which is not the noise that was drawn; with that one the network would learn to keep its error. A perfect average makes
x_t what it would have been, and the target the ordinary one. It is the cross-timestep self-enhancement of residual
shadow removal, and serves any Gaussian process.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.clock import single_step
from diffusion_jax.errors import InvalidInput, invalid, need
from diffusion_jax.objectives.batches import corrupted, example_keys, refuse_gradient
from diffusion_jax.processes import need_gaussian
from diffusion_jax.randomness import fold, split, uniform
from diffusion_jax.time_axes import expand, fill, where
from diffusion_jax.typing import Aux, Denoiser, Number, Objective


class SelfEnhanced(NamedTuple):
    """average: of the parameters that learn. inner: the state of the objective itself. count: losses so far."""

    average: Any
    inner: Any
    count: Any


def self_enhanced(
    objective: Objective,
    denoiser: Denoiser,
    *,
    share: Number = 0.5,
    gap: Number = 0.2,
    decay: Number = 0.999,
    warmup: int = 1000,
    whole: Callable[[Any, Any], Any] | None = None,
) -> Objective:
    """`objective` on examples of which some are states of equation (1); one or more times an example.

    objective: one that trains at the times "t" and with the noise "noise" of its batch, as `denoising` does without a
        `base`, and draws its times in `prepare`. Its weight should not grow at small t, where (2) divides by sigma:
        `min_snr_weight` and predictions of x0 or v do not.
    denoiser: of the same network and process, without a memory. share: of the examples; 0 is `objective` itself.
    gap: the longest step of (1). decay: of the average. warmup: losses before the first such example.
    whole: `(parameters that learn, state of objective) -> parameters of denoiser` where these are not the same; with
        `with_frozen(..., {"unet": prior}, "control")` it is
        `lambda learned, state: {**state.frozen.value, "control": learned}`, and the average is of what learns.

    Metrics: those of `objective`, and `self_generated`, the share of such examples. Costs a forward pass of the network
    for the whole batch, none before `warmup`. Raises InvalidInput for numbers out of range, a process that is not
    Gaussian, a denoiser that remembers its last step, an objective that draws no times, and batches with a `base`.
    """
    need("denoiser", denoiser, Denoiser, "that of the network is needed: denoisers.denoiser(network, process)")
    need_gaussian("self_enhanced", denoiser.process)
    refuse_gradient(objective, "self_enhanced")
    if not 0 <= share <= 1 or not 0 < gap <= 1 or not 0 <= decay < 1 or warmup < 0:
        told = "shares in [0, 1], (0, 1] and [0, 1) and a number of losses were expected"
        raise invalid("share, gap, decay, warmup", (share, gap, decay, warmup), told)
    if objective.prepare is None:
        raise InvalidInput("self_enhanced needs an objective that draws its times in `prepare`, such as denoising.")
    draw, process = objective.prepare, denoiser.process

    def made_of(learned, inner):
        return learned if whole is None else whole(learned, inner)

    def init(key, params, batch):
        if "base" in batch:
            raise InvalidInput("The batch says what is noised ('base'), which self_enhanced makes: leave it out.")
        inner = objective.init(key, params, batch)
        carry = jax.eval_shape(lambda: denoiser.init(made_of(params, inner), batch["x0"], batch.get("cond")))
        if jax.tree.leaves(carry):
            raise InvalidInput("The denoiser remembers its last step, but each example has a time of its own.")
        return SelfEnhanced(jax.tree.map(jnp.asarray, params) if share else (), inner, jnp.int32(0))

    def prepare(state, batch, key):
        return draw(state.inner, batch, key)

    def noise_of(state, batch, key):
        """The noise of each example, of the state that it is trained on, and which of them are of equation (1)."""
        x0, t, cond = batch["x0"], fill(batch["t"], batch["x0"]), batch.get("cond")
        noise_key, far_key, pick_key = split(example_keys(fold(key, 2), batch["index"]), 3)
        far = expand(uniform(far_key, t.shape[:1]), t)
        later = t + far * jnp.minimum(gap, 1.0 - t)
        x_later, noise = corrupted(process, noise_key, batch, later)
        teacher = jax.lax.stop_gradient(made_of(state.average, state.inner))

        def step():
            carry = denoiser.init(teacher, x_later, cond)
            said, _ = denoiser.apply(teacher, carry, x_later, single_step(later, t), cond)
            own = process.marginal(said.x0, said.eps, t)
            return process.from_x0(x0, own, t).eps

        begun = state.count >= warmup
        chosen = (uniform(pick_key, t.shape[:1]) < share) & begun
        own = jax.lax.cond(begun, step, lambda: noise)
        return jax.lax.stop_gradient(where(chosen, own, noise)), chosen

    def loss(params, state, batch, key):
        batch = prepare(state, batch, key)
        chosen = jnp.zeros(())
        if share:
            noise, chosen = noise_of(state, batch, key)
            batch = {**batch, "noise": noise}
        losses, aux = objective.loss(params, state.inner, batch, key)
        now = jax.lax.stop_gradient(params)
        average = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.average, now if share else ())
        after = SelfEnhanced(average, aux.state, state.count + 1)
        metrics = {**aux.metrics, "self_generated": jnp.mean(chosen.astype(jnp.float32))}
        return losses, Aux(after, metrics, aux.per_example, aux.extras)

    return Objective(init, loss, prepare)
