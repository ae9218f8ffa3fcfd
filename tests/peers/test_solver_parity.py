"""Trajectories equal those of the diffusers schedulers, in float64, on the same model and the same grid.

Needs the peers extra: `make test-peers`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, solvers, timesteps
from diffusion_jax.denoisers import denoiser
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Network

torch = pytest.importorskip("torch")
schedulers = pytest.importorskip("diffusers.schedulers")
pytestmark = pytest.mark.peers

STEPS = 10
"""Divides the 1000 training steps: where it does not, the peer's DDIM steps by a rounded ratio, not along its grid."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
DPM = {"algorithm_type": "dpmsolver++", "lower_order_final": True, "final_sigmas_type": "zero"}

CASES = {
    "ddim": (solvers.ddim(), "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "ddim, trailing": (
        solvers.ddim(),
        "DDIMScheduler",
        {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"},
    ),
    "ddim, v": (
        solvers.ddim(),
        "DDIMScheduler",
        {"clip_sample": False, "set_alpha_to_one": True, "prediction_type": "v_prediction"},
    ),
    "dpm++ 1": (solvers.dpm_solver_pp(1), "DPMSolverMultistepScheduler", {"solver_order": 1, **DPM}),
    "dpm++ 2m": (solvers.dpm_solver_pp(2), "DPMSolverMultistepScheduler", {"solver_order": 2, **DPM}),
    "unipc 2": (
        solvers.unipc(2, "b2"),
        "UniPCMultistepScheduler",
        {"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"},
    ),
    "euler": (solvers.euler(), "EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
}


def theirs(name, options, x):
    """The peer's run on the model `0.4 tanh(x) + k / 2000`, and its timesteps."""
    scheduler = getattr(schedulers, name)(**BETAS, **options)
    scheduler.set_timesteps(STEPS)
    x = torch.tensor(x, dtype=torch.float64)
    if name == "EulerDiscreteScheduler":
        x = x * scheduler.init_noise_sigma
    for k in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, k)
        output = 0.4 * torch.tanh(seen) + float(k) / 2000
        x = scheduler.step(output, k, x, return_dict=False)[0]
    return x.numpy(), np.asarray(scheduler.timesteps)


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_peers(case):
    solver, name, options = CASES[case]
    noise = np.random.default_rng(0).normal(size=(3, 5))
    expected, indices = theirs(name, options, noise)
    with jax.enable_x64(True):
        prediction = "v" if options.get("prediction_type") == "v_prediction" else "epsilon"
        process = processes.vp_scaled_linear(prediction=prediction)

        def model(params, x, k, cond, train=False, key=None):
            return 0.4 * jnp.tanh(x) + k[:, None] / 2000, {}

        grid = jnp.asarray(timesteps.from_indices(indices.astype(int), 1000), jnp.float64)
        x_init = jnp.asarray(noise)
        if name == "EulerDiscreteScheduler":
            # The peer works in the space of x / alpha.
            x_init = x_init * initial_scale(options) * process.alpha(grid[0])
        run = jax.jit(
            lambda x: sample(jax.random.key(0), denoiser(Network(None, model), process), None, solver, grid, x_init=x)
        )
        result = np.asarray(run(x_init).x)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def initial_scale(options):
    """The factor by which the peer's Euler scheduler scales its noise."""
    scheduler = schedulers.EulerDiscreteScheduler(**BETAS, **options)
    scheduler.set_timesteps(STEPS)
    return float(scheduler.init_noise_sigma)
