"""Pairs of an image and a text, drawn by one program in every task: what stands at 0 is given, at 1 unknown."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax import denoisers, pictures, solvers, timesteps
from diffusion_jax.experiment import Experiment
from diffusion_jax.sampling import make_role_sampler, sample
from diffusion_jax.typing import Params

TASKS = {
    "image, text": {"image": "generate", "text": "generate"},
    "image | text": {"image": "generate", "text": "given"},
    "text | image": {"image": "given", "text": "generate"},
    "image": {"image": "generate", "text": "ignored"},
    "text": {"image": "ignored", "text": "generate"},
}
"""Roles of the modalities in each task: the query table of the paper."""

CONDITIONALS = (("image | text", "image", "text"), ("text | image", "text", "image"))
"""Task, what is generated, what is given."""


class PairSampler(NamedTuple):
    """draw: `(params, key, roles, known, scale=1) -> pairs`: one program for all tasks and networks at each scale.

    roles: for each modality its role, or a list with one an example; what has none is a part of the image, with its
        role. known: what is given, and anything for the others.
    replaced: `(params, key, known, given) -> pairs`: all is generated, but the modality `given` replaced at each step.
    traces: an entry for each time that the network was traced for `draw` at a scale of 1.
    """

    draw: Callable[..., Any]
    replaced: Callable[..., Any]
    traces: list


def pair_sampler(experiment: Experiment, steps: int) -> PairSampler:
    """How pairs are drawn from networks like that of `experiment`."""
    grid, solver, shape = timesteps.linspace(steps), solvers.dpm_solver_pp(order=2), experiment.shape
    plain, traces = denoisers.denoiser(experiment.network, experiment.process), []

    def apply(*args):
        traces.append(steps)
        return plain.apply(*args)

    @functools.cache
    def asker(scale):
        denoiser = plain._replace(apply=apply) if scale == 1.0 else denoisers.jointly_guided(plain, scale)
        return make_role_sampler(denoiser, solver, grid, shape=shape)

    @jax.jit
    def inpainted(params, key, known, mask):
        shape = {name: value.shape for name, value in known.items()}
        plan = timesteps.roles(grid, TASKS["image, text"])
        return sample(key, plain, params, solvers.inpainted(solver, known, mask), plan, shape=shape).x

    def draw(params, key, roles, known, scale=1.0):
        roles = {name: roles.get(name, "image") for name in known}
        return jax.device_get(asker(scale)(key, params, roles, known).x)

    def replaced(params, key, known, given):
        mask = {name: np.full(len(value), name == given) for name, value in known.items()}
        return jax.device_get(inpainted(params, key, known, mask))

    return PairSampler(draw, replaced, traces)


def save_pairs(
    path: Path, made: PairSampler, params: Params, known: Any, shown: Callable[[Any], Any], scale: float = 1.0
) -> Path:
    """All tasks of one network as a picture, and a chain: an image, its text, an image of that text."""
    drawn = {task: made.draw(params, jax.random.key(0), roles, known, scale) for task, roles in TASKS.items()}
    again = made.draw(params, jax.random.key(1), TASKS["image | text"], drawn["text | image"], scale)
    rows = {f"p({task})": shown(pairs) for task, pairs in drawn.items()}
    # What is ignored is noise: it is not shown.
    rows["p(image)"] = (rows["p(image)"][0], [""] * len(again["text"]))
    rows["p(text)"] = (np.ones_like(rows["p(text)"][0]), rows["p(text)"][1])
    rows["image of p(text | image)"] = shown(again)
    pictures.save_captioned(path, {name: (images[:10], texts[:10]) for name, (images, texts) in rows.items()})
    return path
