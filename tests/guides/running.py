"""The code of the how-tos runs as it is printed, at tiny sizes and on folders that the tests write."""

import re
from pathlib import Path

from diffusion_jax import interop, models
from tests.interop.folders import UNET, drawn, sd_folder

DOCS = Path(__file__).parents[2] / "docs"


def run(name, smaller):
    """Runs the code of a page with some of its text replaced, and returns the names that it defines."""
    text = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL))
    for found, put in smaller.items():
        assert found in text, found
        text = text.replace(found, put)
    names = {}
    exec(compile(text, name, "exec"), names)
    return names


def checkpoints(parent):
    """A folder of Stable Diffusion, and beside it one of a ControlNet."""
    folder = sd_folder(parent / "sd15")
    # A latent of the tiny autoencoder is two pixels, so the picture is halved once.
    control = models.controlnet("sd15", control_features=(4, 8), **UNET)
    interop.save_pretrained(parent / "control", drawn("ControlNetModel", control))
    return folder
