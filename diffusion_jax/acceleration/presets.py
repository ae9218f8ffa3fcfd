"""Published settings by name: from a network and its process to a denoiser that does less.

A preset is a function of both; `accelerated` finds it by name, so that a config, a command line or a how-to can say
"taylorseer". Thresholds and intervals were found on the models named beside them, at their numbers of steps: on another
model they are where to begin (see docs/faster_sampling.md for how to choose).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from diffusion_jax.acceleration.features import cached_features
from diffusion_jax.acceleration.forecasting import Forecaster, foca, reuse, taylor
from diffusion_jax.acceleration.gated import cg_taylor, first_block_cached
from diffusion_jax.acceleration.modes import dmd
from diffusion_jax.acceleration.outputs import cached_outputs
from diffusion_jax.acceleration.refresh import every
from diffusion_jax.acceleration.spectral import sea_cached
from diffusion_jax.acceleration.tokens import cached_tokens
from diffusion_jax.denoisers import denoiser
from diffusion_jax.errors import unknown
from diffusion_jax.typing import Denoiser, Network


class Preset(NamedTuple):
    """make: (network, process) -> Denoiser. source: where the settings were published, and for which model."""

    make: Callable[[Network, Any], Denoiser]
    source: str


def _features(forecaster: Forecaster, interval: int, warmup: int):
    return lambda network, process: cached_features(network, process, forecaster, every(interval, warmup))


def _outputs(forecaster: Forecaster, interval: int, warmup: int):
    return lambda network, process: cached_outputs(denoiser(network, process), every(interval, warmup), forecaster)


PRESETS = {
    "plain": Preset(denoiser, "every step computed"),
    "interval_reuse": Preset(_outputs(reuse(), 2, 1), "every second output reused, the simplest of all"),
    "fora": Preset(_features(reuse(), 3, 1), "FORA (Selvaraju et al. 2024), N = 3, DiT-XL/2"),
    "token_wise": Preset(
        lambda network, process: cached_tokens(network, process, every(3), 0.1, attention=0.0),
        "ToCa (Zou et al. 2024), N = 3; a tenth of the tokens computed anew in feed-forward layers",
    ),
    "taylorseer": Preset(
        _features(taylor(3), 3, 2), "TaylorSeer (Liu et al. 2025), N = 3, m = 3, DiT-XL/2 at 50 steps: 2.77x"
    ),
    "taylorseer_fast": Preset(_features(taylor(3), 5, 2), "TaylorSeer, N = 5, m = 3, DiT-XL/2 at 50 steps: 4.53x"),
    "taylorseer_flux": Preset(_features(taylor(2), 6, 3), "TaylorSeer, N = 6, m = 2, FLUX.1-dev at 50 steps: 4.99x"),
    "taylorseer_video": Preset(_features(taylor(1), 5, 3), "TaylorSeer, N = 5, m = 1, HunyuanVideo at 50 steps: 5.00x"),
    "foca": Preset(_features(foca(), 5, 3), "FoCa (Zheng et al. 2025), N = 5, FLUX.1-dev: 4.16x"),
    "dmd": Preset(
        _outputs(dmd(), 3, 4), "two modes of whole outputs, N = 3; after the DMD calibrator of cache-dit (2026)"
    ),
    "seacache": Preset(
        lambda network, process: sea_cached(denoiser(network, process), 0.3),
        "SeaCache (Chung et al. 2026), threshold 0.3, FLUX.1-dev: 1.91x; here on the input and for whole outputs",
    ),
    "cg_taylor": Preset(cg_taylor, "CG-Taylor (Guan et al. 2025), threshold 0.008, DiT-XL/2 at 50 steps: 2.36x"),
    "cg_taylor_flux": Preset(
        partial(cg_taylor, threshold=0.13, probe_order=1), "CG-Taylor, threshold 0.13, FLUX.1-dev: 3.17x"
    ),
    "cg_taylor_video": Preset(
        partial(cg_taylor, threshold=0.36, warmup=6), "CG-Taylor, threshold 0.36, Wan 2.1: 4.14x"
    ),
    "first_block_cache": Preset(
        partial(first_block_cached, threshold=0.05), "FirstBlockCache of diffusers, its default threshold"
    ),
}
"""What `accelerated` knows. Speeds are the papers'; FLOPs for TaylorSeer, latency for CG-Taylor."""


def accelerated(network: Network, process: Any, preset: str = "taylorseer") -> Denoiser:
    """The denoiser of `network` on `process` with the settings of a key of `PRESETS`.

    It takes the same parameters as `denoisers.denoiser(network, process)`, and goes wherever that goes; guidance nests
    around it (`guided(accelerated(...))`). Raises InvalidInput for an unknown name.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    return PRESETS[preset].make(network, process)
