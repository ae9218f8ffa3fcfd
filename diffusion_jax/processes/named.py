"""The usual Gaussian processes by name, each a schedule with the prediction and network time that go with it.

Every constructor takes `prediction` (a key of `PARAMETERIZATIONS`), `time` (a key of `NETWORK_TIMES`) and
`log_snr_shift`, which moves the log-SNR by a constant: `2 log(64 / resolution)` is the resolution shift of
Hoogeboom et al. 2023.
"""

import math

from diffusion_jax.errors import invalid
from diffusion_jax.processes.discrete_vp import DiscreteVP, betas, zero_terminal_snr_betas
from diffusion_jax.processes.gaussian import GaussianProcess
from diffusion_jax.processes.schedules import (
    EDM,
    Cosine,
    Linear,
    LinearVP,
    Shifted,
    VarianceExploding,
    check_positive,
)
from diffusion_jax.typing import Number


def _process(schedule, prediction, time, log_snr_shift, **kwargs):
    if log_snr_shift:
        schedule = Shifted(schedule, log_snr_shift)
    return GaussianProcess(schedule, prediction, time, **kwargs)


def _discrete(table, prediction, time, zero_terminal_snr, log_snr_shift):
    prediction = prediction or ("v" if zero_terminal_snr else "epsilon")
    if zero_terminal_snr:
        if prediction in ("epsilon", "score"):
            raise invalid(
                "prediction", prediction, "at zero terminal SNR the noise says nothing about the data; use 'v' or 'x0'"
            )
        table = zero_terminal_snr_betas(table)
    return _process(DiscreteVP(table), prediction, time or ("1000t" if log_snr_shift else "index"), log_snr_shift)


def vp_linear(
    num_steps: int = 1000,
    prediction: str | None = None,
    beta_start: Number = 1e-4,
    beta_end: Number = 0.02,
    zero_terminal_snr: bool = False,
    time: str | None = None,
    log_snr_shift: Number = 0.0,
) -> GaussianProcess:
    """DDPM: betas linear in the index (Ho et al. 2020).

    `prediction` is `epsilon` unless given, `v` with `zero_terminal_snr` (Lin et al. 2024), where epsilon cannot work.
    The network is fed the index k, or `1000 t` when the log-SNR is shifted.
    """
    table = betas("linear", num_steps, beta_start=beta_start, beta_end=beta_end)
    return _discrete(table, prediction, time, zero_terminal_snr, log_snr_shift)


def vp_scaled_linear(
    num_steps: int = 1000,
    prediction: str | None = None,
    beta_start: Number = 0.00085,
    beta_end: Number = 0.012,
    zero_terminal_snr: bool = False,
    time: str | None = None,
    log_snr_shift: Number = 0.0,
) -> GaussianProcess:
    """Stable Diffusion: square roots of beta linear in the index (Rombach et al. 2022). Options as for `vp_linear`."""
    table = betas("scaled_linear", num_steps, beta_start=beta_start, beta_end=beta_end)
    return _discrete(table, prediction, time, zero_terminal_snr, log_snr_shift)


def vp_cosine(
    num_steps: int = 1000,
    prediction: str | None = None,
    zero_terminal_snr: bool = False,
    time: str | None = None,
    log_snr_shift: Number = 0.0,
) -> GaussianProcess:
    """Improved DDPM: discrete cosine betas, at most 0.999 (Nichol & Dhariwal 2021). Options as for `vp_linear`."""
    return _discrete(betas("cosine", num_steps), prediction, time, zero_terminal_snr, log_snr_shift)


def vp_continuous(
    beta_min: Number = 0.1,
    beta_max: Number = 20.0,
    prediction: str = "epsilon",
    time: str = "1000t",
    log_snr_shift: Number = 0.0,
) -> GaussianProcess:
    """The VP-SDE with a linear rate (Song et al. 2021)."""
    return _process(LinearVP(beta_min, beta_max), prediction, time, log_snr_shift)


def cosine(prediction: str = "v", time: str = "1000t", log_snr_shift: Number = 0.0) -> GaussianProcess:
    """Continuous cosine VP, predicting v (Salimans & Ho 2022; with a shift, simple diffusion)."""
    return _process(Cosine(), prediction, time, log_snr_shift)


def gvp(prediction: str = "velocity", time: str = "1000t", log_snr_shift: Number = 0.0) -> GaussianProcess:
    """The trigonometric interpolant: cosine's schedule, predicting the velocity (Ma et al. 2024, SiT)."""
    return _process(Cosine(), prediction, time, log_snr_shift)


def trig_flow(sigma_data: Number = 0.5, time: str = "1000t") -> GaussianProcess:
    """TrigFlow (Lu & Song 2024): `cos(a) x0 + sin(a) sigma_data eps` with `a = pi t / 2`, scaled to be a VP.

    The network is that of TrigFlow: it sees the published x over sigma_data, of unit variance at every t, and predicts
    the velocity on the circle, `F = cos(a) eps - sin(a) x0 / sigma_data`. sigma_data: standard deviation of the data.
    The published networks are told the angle a, which is pi / 2 times the t of `time="t"`.
    """
    check_positive(sigma_data=sigma_data)
    return _process(Cosine(), "edm_v", time, -2.0 * math.log(sigma_data), sigma_data=sigma_data)


def variance_exploding(
    sigma_min: Number = 0.01,
    sigma_max: Number = 50.0,
    prediction: str = "score",
    time: str = "log_sigma",
    sigma_data: Number = 0.5,
    log_snr_shift: Number = 0.0,
) -> GaussianProcess:
    """The VE-SDE with geometric noise levels (Song et al. 2021)."""
    return _process(VarianceExploding(sigma_min, sigma_max), prediction, time, log_snr_shift, sigma_data=sigma_data)


def edm(
    sigma_max: Number = 80.0,
    sigma_data: Number = 0.5,
    prediction: str = "edm",
    time: str = "log_sigma",
    log_snr_shift: Number = 0.0,
) -> GaussianProcess:
    """`sigma = sigma_max t` with the preconditioning of Karras et al. 2022: the network sees unit variance everywhere.

    `sigma_data` is the standard deviation of the data.
    """
    return _process(EDM(sigma_max), prediction, time, log_snr_shift, sigma_data=sigma_data)


def rectified_flow(
    prediction: str = "velocity", shift: Number = 1.0, time: str = "1000t", log_snr_shift: Number = 0.0
) -> GaussianProcess:
    """`x_t = (1 - t) x0 + t eps` (Liu et al. 2023, Lipman et al. 2023), predicting the velocity `eps - x0`.

    shift: s of `t -> s t / (1 + (s - 1) t)`, built into the process: uniform t then trains on noisier data, and the
    velocity is the derivative with respect to the new t. SD3 and FLUX checkpoints are processes with `shift=1` sampled
    on shifted grids (`timesteps.shift`).
    """
    check_positive(shift=shift)
    return _process(Linear(), prediction, time, log_snr_shift - 2.0 * math.log(shift))
