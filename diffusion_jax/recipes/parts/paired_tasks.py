"""Pairs of an image and a text, drawn in every task by one program, and shown."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import pictures, solvers, timesteps
from diffusion_jax.data import captioned_digits
from diffusion_jax.experiment import Experiment
from diffusion_jax.sampling import make_role_sampler
from diffusion_jax.typing import Denoiser, Params

TASKS = {
    "image, text": {"image": "generate", "text": "generate"},
    "image | text": {"image": "generate", "text": "given"},
    "text | image": {"image": "given", "text": "generate"},
    "image": {"image": "generate", "text": "ignored"},
    "text": {"image": "ignored", "text": "generate"},
}
CONDITIONALS = {"image | text": ("image", "text"), "text | image": ("text", "image")}
"""What is generated and what is given."""

Asked = Callable[..., dict[str, np.ndarray]]
"""(params, key, task, known) -> pairs"""


def asker(denoiser: Denoiser, experiment: Experiment, steps: int) -> Asked:
    """All tasks of all networks of this kind by one program; parts of the image without a role have the image's."""
    solver, shape = solvers.dpm_solver_pp(order=2), experiment.shape
    sampler = make_role_sampler(denoiser, solver, timesteps.linspace(steps), shape=shape)

    def ask(params: Params, key: Any, task: str, known: Any) -> dict[str, np.ndarray]:
        roles = {name: TASKS[task].get(name, "image") for name in shape}
        return jax.device_get(sampler(key, params, roles, known).x)

    return ask


def pixels_and_names(pairs: Mapping[str, Any]) -> tuple[Any, list[str]]:
    return pairs["image"], captioned_digits.decode(pairs["text"])


def save_pairs(
    path: Path,
    ask: Callable[..., Any],
    known: Any,
    shown: Callable[[Any], Any],
    title: str = "Every task by one network",
) -> None:
    """All tasks of one network as a picture, and a chain: an image, its text, an image of that text."""
    drawn = {task: ask(jax.random.key(0), task, known) for task in TASKS}
    drawn["image of p(text | image)"] = ask(jax.random.key(1), "image | text", drawn["text | image"])
    rows = {name if name not in TASKS else f"p({name})": shown(pairs) for name, pairs in drawn.items()}
    # What is ignored is noise: it is not shown.
    rows["p(image)"] = (rows["p(image)"][0], [""] * len(known["text"]))
    rows["p(text)"] = (np.ones_like(rows["p(text)"][0]), rows["p(text)"][1])
    first = {name: (images[:10], texts[:10]) for name, (images, texts) in rows.items()}
    pictures.save_captioned(path, first, title=title)
