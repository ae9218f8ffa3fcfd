"""Scheduler configs are read into parts that run, and what cannot be read is said in one sentence.

That the runs are those of diffusers is proven with the peer, in tests/peers/test_solver_parity.py.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import solvers
from diffusion_jax.denoisers.analytic import analytic, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.schedulers import SCHEDULERS, read_scheduler, write_scheduler_config
from diffusion_jax.sampling import sample

SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
"""That of Stable Diffusion 1.5."""


FLUX = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift": 3.0}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_class_reaches_the_data(name):
    """With the exact denoiser of a narrow Gaussian, a run of 20 steps ends near its mean, whatever the scheduler."""
    scheduler = read_scheduler({"_class_name": name, "clip_sample": False})
    grid = scheduler.grid(20)
    assert grid.shape == (21,) and grid.dtype == jnp.float32
    noise = jax.random.normal(jax.random.key(1), (4, 3))
    denoiser = scheduler.transform(analytic(scheduler.process))
    mixture = gaussian_mixture([[0.3, -0.2, 0.5]], 0.05)

    @jax.jit
    def run(noise):
        x = scheduler.initial_scale(grid) * noise
        x = sample(jax.random.key(0), denoiser, mixture, scheduler.solver, grid, x_init=x).x
        return scheduler.final_scale(grid) * x

    error = np.abs(np.asarray(run(noise)) - np.array([0.3, -0.2, 0.5])).max()
    assert error < 0.3, error


def test_a_folder_is_read_and_written(tmp_path):
    scheduler = read_scheduler(SD)
    assert scheduler.config == SD
    write_scheduler_config(tmp_path / "scheduler", scheduler)
    for folder in (tmp_path, tmp_path / "scheduler", tmp_path / "scheduler" / "scheduler_config.json"):
        again = read_scheduler(folder)
        assert again.process == scheduler.process and again.config == SD
    np.testing.assert_allclose(1000 * scheduler.grid(5), [802, 602, 402, 202, 2, 1], rtol=1e-6)
    (tmp_path / "broken.json").write_text("{")
    for path, words in (("nothing", "holds no scheduler_config.json"), ("broken.json", "JSON")):
        with pytest.raises(InvalidInput, match=words):
            read_scheduler(tmp_path / path)


def test_the_dynamic_shift_follows_the_image():
    """FLUX: mu is 0.5 at 256 tokens and 1.15 at 4096; the pipeline gives its own sigmas."""
    scheduler = read_scheduler(FLUX)
    sigmas = np.linspace(1.0, 0.25, 4)
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        shift = np.exp(mu)
        expected = [*(shift * sigmas / (1 + (shift - 1) * sigmas)), 0.0]
        np.testing.assert_allclose(scheduler.grid(seq_len=tokens, sigmas=sigmas), expected, rtol=1e-6)


def test_a_run_that_begins_in_the_middle_follows_the_whole_grid():
    """Image to image: PNDM's first step is made from one index earlier, and its second is left out (diffusers)."""
    grid = read_scheduler(SD).grid(5)
    np.testing.assert_allclose(1000 * read_scheduler(SD).begun(grid, 3), [802, 602, 402, 402, 2, 1], rtol=1e-6)
    for first in (0, 1):
        np.testing.assert_array_equal(read_scheduler(SD).begun(grid, first), grid)
    # Another solver in its place makes every step.
    np.testing.assert_array_equal(read_scheduler(SD).begun(grid, 3, solver=solvers.ddim()), grid)
    other = read_scheduler(euler())
    np.testing.assert_array_equal(other.begun(grid, 3), grid)


FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("double", [False, True])
def test_whole_numbers_are_told_as_the_peer_rounds_them(double):
    """UniPC begins at 1 - 1e-6 and cuts off; two of SD's exponential sigmas are the ends of its table of float32."""
    unipc = {"_class_name": "UniPCMultistepScheduler"}
    sd = {**SD, **unipc, "use_exponential_sigmas": True}
    with jax.enable_x64(double):
        for config, told in (
            ({**unipc, **FLOW_SIGMAS}, [999, 750, 500, 250]),
            ({**unipc, **FLOW_SIGMAS, "flow_shift": 3.0}, [999, 900, 750, 500]),
            (sd, [999 if double else 998, 538, 52, 0]),
            ({**SD, **unipc, "use_karras_sigmas": True}, [999, 687, 146, 0]),
        ):
            scheduler = read_scheduler(config)
            np.testing.assert_array_equal(scheduler.process.network_time(scheduler.grid(4)[:-1]), told)


def test_own_times_and_sigmas():
    grid = read_scheduler(euler()).grid(sigmas=(10.0, 2.0, 0.0))
    process = read_scheduler(euler()).process
    np.testing.assert_allclose(process.sigma(grid) / process.alpha(grid), [10.0, 2.0, 0.0], rtol=1e-5)
    for given in ([999, 400], (999, 400), np.array([999.0, 400.0]), jnp.array([999, 400])):
        np.testing.assert_allclose(1000 * read_scheduler(euler()).grid(timesteps=given), [1000, 401, 0], rtol=1e-6)
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    np.testing.assert_allclose(read_scheduler(flow).grid(timesteps=[900, 300]), [0.9, 0.3, 0.0], rtol=1e-6)
    with pytest.raises(InvalidInput, match="give sigmas=, those before the shift"):
        read_scheduler({**flow, "shift": 3.0}).grid(timesteps=[900, 300])


def test_grids_are_known_while_something_else_is_traced():
    for config in (euler(use_karras_sigmas=True), SD, FLUX, {"_class_name": "LCMScheduler"}):
        scheduler = read_scheduler(config)
        traced = jax.jit(lambda x, s=scheduler: x + jnp.asarray(s.grid(5, seq_len=1024)))(0.0)
        np.testing.assert_array_equal(traced, scheduler.grid(5, seq_len=1024))


def euler(**options):
    return {"_class_name": "EulerDiscreteScheduler", **options}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: read_scheduler({"_class_name": "DDIMSheduler"}), "did you mean 'DDIMScheduler'"),
        (lambda: read_scheduler({}), "no _class_name"),
        (lambda: read_scheduler(euler(beta_schedule="laplace")), "beta_schedule='laplace'"),
        (lambda: read_scheduler(euler(interpolation_type="log_linear")), "interpolation_type='log_linear'"),
        (lambda: read_scheduler(euler(prediction_type="flow")), "prediction_type='flow'"),
        (lambda: read_scheduler(euler(timestep_spacing="middle")), "timestep_spacing='middle'"),
        (lambda: read_scheduler(euler(use_karras_sigmas=True, use_beta_sigmas=True)), "choose one"),
        (lambda: read_scheduler(euler(use_lu_lambdas=True)), "use_lu_lambdas=True"),
        (lambda: read_scheduler(euler(), eta=1.0), "eta is 1.0, but EulerDiscreteScheduler has none"),
        (
            lambda: read_scheduler(euler(use_karras_sigmas=True, sigma_max=999.0)).grid(5),
            "the table of betas ends at 157",
        ),
        (lambda: read_scheduler(euler()).grid(0), "num_steps is 0"),
        (lambda: read_scheduler(euler()).grid(), "num_steps is None"),
        (lambda: read_scheduler(SD).grid(5, sigmas=[1.0, 0.5]), "takes no sigmas"),
        (lambda: read_scheduler(euler()).grid(5, sigmas=[1.0, 0.5]), "num_steps is 5, but sigmas has 1 steps"),
        (lambda: read_scheduler({**SD, "timestep_spacing": "linspace"}), "timestep_spacing='linspace'"),
        (lambda: read_scheduler({**SD, "skip_prk_steps": False}).grid(8), "even 1000 // num_steps"),
        (lambda: read_scheduler({**SD, "_class_name": "LMSDiscreteScheduler", "rescale_betas_zero_snr": True}),
         "rescale_betas_zero_snr=True, but this class has no such option"),
        (lambda: read_scheduler({"_class_name": "DDPMScheduler", "variance_type": "learned"}), "type='learned'"),
        (lambda: read_scheduler({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver"}),
         "algorithm_type='sde-dpmsolver'"),
        (lambda: read_scheduler({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}),
         "final_sigmas_type='sigma_min'"),
        (lambda: read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}),
         "invert_sigmas=True"),
        (lambda: read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500}),
         "num_train_timesteps=500"),
        (lambda: read_scheduler(FLUX).grid(5), "seq_len is None"),
        (lambda: read_scheduler({"_class_name": "LCMScheduler"}).grid(51), "num_steps is 51"),
        (lambda: read_scheduler({"_class_name": "DDIMInverseScheduler"}), "is not read: for the way"),
        (lambda: read_scheduler({"_class_name": ["DDIMScheduler"]}), "the name of a class is needed"),
        (lambda: read_scheduler(None), "a dict, or the folder"),
        (lambda: read_scheduler(euler(beta_start=None)), "beta_start=null, but a"),
        (lambda: read_scheduler(euler(beta_start="0.1")), "beta_start='0.1', but a"),
        (lambda: read_scheduler(euler(beta_schedule=None)), "beta_schedule=null, but only"),
        (lambda: read_scheduler(euler(num_train_timesteps=1e13)), "a whole number from 1 to 100000 is needed"),
        (lambda: read_scheduler(euler(trained_betas=[0.1, 0.2])), "a list of 1000 entries is needed"),
        (lambda: read_scheduler(euler(use_karras_sigmas="yes")), "true or false is needed"),
        (lambda: read_scheduler(euler(steps_offset=-1)), "steps_offset=-1"),
        (lambda: read_scheduler({"_class_name": "DDIMScheduler", "clip_sample": None}), "clip_sample=null"),
        (lambda: read_scheduler({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": 99.0}), "no step"),
        (lambda: read_scheduler({"_class_name": "UniPCMultistepScheduler", "disable_corrector": ["0"]}), "a whole"),
        (lambda: read_scheduler({"_class_name": "DDIMScheduler"}, eta="1"), "eta is '1'"),
        (lambda: read_scheduler(euler()).grid(2.0), "num_steps is 2.0, but it must be a whole number"),
        (lambda: read_scheduler(euler()).grid(True), "num_steps is True"),
        (lambda: read_scheduler(euler()).grid(timesteps=[400, 999]), "they must fall"),
        (lambda: read_scheduler(euler()).grid(timesteps=[999, float("nan")]), "they must lie in"),
        (lambda: read_scheduler(euler()).grid(timesteps="999"), "timesteps"),
        (lambda: read_scheduler(euler()).grid(timesteps=[1000, 1]), "they must lie in"),
        (lambda: read_scheduler(euler()).grid(sigmas=[3.0, 0.0, 0.0]), "only the last may be 0"),
        (lambda: read_scheduler(FLUX).grid(5, seq_len="4096"), "seq_len is '4096'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


def test_written_configs_are_plain_json(tmp_path):
    path = write_scheduler_config(tmp_path, read_scheduler(euler(use_karras_sigmas=True)))
    assert json.loads(path.read_text()) == euler(use_karras_sigmas=True)
