"""Networks as pure functions: diffusion transformer, U-Net, MLP, text transformer, the KL autoencoder, and the one
mechanism that opens them (`intercepted`). Constructors return a `typing.Network` (`kl_vae` an `Autoencoder`); the
linen modules behind them obey one convention of uniform blocks (`layers.branches`). What is attached to a frozen
network is in `adapters`.
"""

from diffusion_jax.models.conditions import empty_condition
from diffusion_jax.models.controlnet import ControlNet, control_from_unet, controlled, controlnet
from diffusion_jax.models.dit import DiT, dit, pixart
from diffusion_jax.models.edits import cached, edit, exits, gates, override, reweighted, taps
from diffusion_jax.models.interception import by_path, intercepted, per_layer
from diffusion_jax.models.mlp import Mlp, mlp
from diffusion_jax.models.network import count_params, network, param_shapes
from diffusion_jax.models.text_transformer import TextTransformer, text_transformer
from diffusion_jax.models.unet import UNet, unet
from diffusion_jax.models.vae import KLVAE, Autoencoder, GaussianPosterior, kl_vae

__all__ = [
    "KLVAE",
    "Autoencoder",
    "ControlNet",
    "DiT",
    "GaussianPosterior",
    "Mlp",
    "TextTransformer",
    "UNet",
    "by_path",
    "cached",
    "control_from_unet",
    "controlled",
    "controlnet",
    "count_params",
    "dit",
    "edit",
    "empty_condition",
    "exits",
    "gates",
    "intercepted",
    "kl_vae",
    "mlp",
    "network",
    "override",
    "param_shapes",
    "per_layer",
    "pixart",
    "reweighted",
    "taps",
    "text_transformer",
    "unet",
]
