"""Published settings by name: from a network and its process to a denoiser that does less.

A preset is a function of both; `accelerated` finds it by name, so that a config, a command line or a how-to can say
"taylorseer". Thresholds and intervals were found on the models named beside them, at their numbers of steps: on another
model they are where to begin (see docs/faster_sampling.md for how to choose).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion_jax.acceleration.features import cached_features
from diffusion_jax.acceleration.forecasting import Forecaster, foca, reuse, taylor
from diffusion_jax.acceleration.gated import cg_taylor, first_block_cached
from diffusion_jax.acceleration.modes import dmd
from diffusion_jax.acceleration.outputs import cached_outputs
from diffusion_jax.acceleration.refresh import every
from diffusion_jax.acceleration.spectral import sea_cached
from diffusion_jax.acceleration.tokens import cached_tokens
from diffusion_jax.config import of_type
from diffusion_jax.denoisers import denoiser
from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.typing import Denoiser, Network


class Preset(NamedTuple):
    """make: (network, process, **settings) -> Denoiser. source: where the settings were published, for which model.

    settings: all that can be set, with the published values.
    """

    make: Callable[..., Denoiser]
    source: str
    settings: Mapping[str, Any] = {}


def _features(forecaster: Callable[..., Forecaster]) -> Callable[..., Denoiser]:
    def make(network: Network, process: Any, interval: int, warmup: int, **settings: Any) -> Denoiser:
        return cached_features(network, process, forecaster(**settings), every(interval, warmup))

    return make


def _outputs(forecaster: Callable[..., Forecaster]) -> Callable[..., Denoiser]:
    def make(network: Network, process: Any, interval: int, warmup: int, **settings: Any) -> Denoiser:
        return cached_outputs(denoiser(network, process), every(interval, warmup), forecaster(**settings))

    return make


def _tokens(network: Network, process: Any, interval: int, ratio: float, attention: float) -> Denoiser:
    return cached_tokens(network, process, every(interval), ratio, attention=attention)


def _sea(network: Network, process: Any, threshold: float, exponent: float) -> Denoiser:
    return sea_cached(denoiser(network, process), threshold, exponent=exponent)


TAYLOR, GATE = {"interval": 3, "warmup": 2, "order": 3}, {"threshold": 0.008, "probe_order": 3, "order": 1, "warmup": 3}

PRESETS = {
    "plain": Preset(denoiser, "every step computed"),
    "interval_reuse": Preset(
        _outputs(reuse), "every second output reused, the simplest of all", {"interval": 2, "warmup": 1}
    ),
    "fora": Preset(_features(reuse), "FORA (Selvaraju et al. 2024), N = 3, DiT-XL/2", {"interval": 3, "warmup": 1}),
    "token_wise": Preset(
        _tokens,
        "ToCa (Zou et al. 2024), N = 3; a tenth of the tokens computed anew in feed-forward layers",
        {"interval": 3, "ratio": 0.1, "attention": 0.0},
    ),
    "taylorseer": Preset(
        _features(taylor), "TaylorSeer (Liu et al. 2025), N = 3, m = 3, DiT-XL/2 at 50 steps: 2.77x", TAYLOR
    ),
    "taylorseer_fast": Preset(
        _features(taylor), "TaylorSeer, N = 5, m = 3, DiT-XL/2 at 50 steps: 4.53x", {**TAYLOR, "interval": 5}
    ),
    "taylorseer_flux": Preset(
        _features(taylor),
        "TaylorSeer, N = 6, m = 2, FLUX.1-dev at 50 steps: 4.99x",
        {"interval": 6, "warmup": 3, "order": 2},
    ),
    "taylorseer_video": Preset(
        _features(taylor),
        "TaylorSeer, N = 5, m = 1, HunyuanVideo at 50 steps: 5.00x",
        {"interval": 5, "warmup": 3, "order": 1},
    ),
    "foca": Preset(
        _features(foca),
        "FoCa (Zheng et al. 2025), N = 5, FLUX.1-dev: 4.16x",
        {"interval": 5, "warmup": 3, "step": 1.0},
    ),
    "dmd": Preset(
        _outputs(dmd),
        "two modes of whole outputs, N = 3; after the DMD calibrator of cache-dit (2026)",
        {"interval": 3, "warmup": 4, "history": 4, "ridge": 1e-6},
    ),
    "seacache": Preset(
        _sea,
        "SeaCache (Chung et al. 2026), threshold 0.3, FLUX.1-dev: 1.91x; here on the input and for whole outputs",
        {"threshold": 0.3, "exponent": 2.0},
    ),
    "cg_taylor": Preset(cg_taylor, "CG-Taylor (Guan et al. 2025), threshold 0.008, DiT-XL/2 at 50 steps: 2.36x", GATE),
    "cg_taylor_flux": Preset(
        cg_taylor, "CG-Taylor, threshold 0.13, FLUX.1-dev: 3.17x", {**GATE, "threshold": 0.13, "probe_order": 1}
    ),
    "cg_taylor_video": Preset(
        cg_taylor, "CG-Taylor, threshold 0.36, Wan 2.1: 4.14x", {**GATE, "threshold": 0.36, "warmup": 6}
    ),
    "first_block_cache": Preset(
        first_block_cached, "FirstBlockCache of diffusers, its default threshold", {"threshold": 0.05}
    ),
}
"""What `accelerated` knows. Speeds are the papers'; FLOPs for TaylorSeer, latency for CG-Taylor."""


def accelerated(network: Network, process: Any, preset: str = "taylorseer", **settings: Any) -> Denoiser:
    """The denoiser of `network` on `process` with the settings of a key of `PRESETS`.

    settings: any of the preset's own (`PRESETS[preset].settings`) that differ from the published ones.

    It takes the same parameters as `denoisers.denoiser(network, process)`, and goes wherever that goes; guidance nests
    around it (`guided(accelerated(...))`). Raises InvalidInput for an unknown name or setting.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    make, _, published = PRESETS[preset]
    for name, value in settings.items():
        if name not in published:
            if not published:
                raise InvalidInput(f"the preset {preset!r} has no settings, but {name!r} is given.")
            raise unknown(f"a setting of the preset {preset!r}", name, published)
        of_type(f"accelerated.{name}", value, type(published[name]))
    return make(network, process, **{**published, **settings})
