"""Where things that took a while to make are kept between runs: trained judges, base models, compiled programs."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """`$DIFFUSION_JAX_CACHE`, or `diffusion_jax` in the platform's cache folder."""
    if "DIFFUSION_JAX_CACHE" in os.environ:
        return Path(os.environ["DIFFUSION_JAX_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "diffusion_jax"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "diffusion_jax"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffusion_jax"
