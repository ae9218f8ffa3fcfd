"""The autoencoder between pictures and latents, as those need it who have only the one or the other."""

import os
from pathlib import Path
from typing import Any

from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.pretrained import Pretrained, load_pretrained
from diffusion_jax.models import KLVAE


def load_latent_autoencoder(folder: str | os.PathLike, **options: Any) -> Pretrained:
    """The autoencoder of a folder, or of the pipeline that the folder holds (in `vae`).

    options: of `load_pretrained`. Raises InvalidInput where it is another network.
    """
    inner = Path(folder).expanduser() / "vae"
    found = load_pretrained(inner if (inner / "config.json").is_file() else folder, **options)
    if not isinstance(found.network.module, KLVAE):
        raise InvalidInput(f"{folder} holds a {found.family}, but an autoencoder (AutoencoderKL) is needed.")
    return found
