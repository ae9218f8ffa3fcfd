"""Control: environments, policies made of denoisers of actions, and the loops in which a policy acts in an environment.

    policy = control.receding_horizon(denoiser, solvers.ddim(), timesteps.linspace(16), shape=(16, 2), execute=8)
    run = jax.jit(lambda params, key: control.rollout(environment, policy, params, key, episodes=64, steps=80))

Environments and policies are NamedTuples of pure functions, so you write your own as a few functions. Simulators that
are Python objects run in `rollout_simulators`. Environments with experts are `data.tabletop` and `data.push_t`.
"""

from diffusion_jax.control.environments import (
    Environment,
    Rollout,
    Simulator,
    rollout,
    rollout_simulators,
    with_event,
)
from diffusion_jax.control.policies import (
    PRIMERS,
    Policy,
    decision_cost,
    receding_horizon,
    streamed_actions,
    with_action_noise,
)

__all__ = [
    "PRIMERS",
    "Environment",
    "Policy",
    "Rollout",
    "Simulator",
    "decision_cost",
    "receding_horizon",
    "rollout",
    "rollout_simulators",
    "streamed_actions",
    "with_action_noise",
    "with_event",
]
