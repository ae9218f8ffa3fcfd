"""What a person looks at after `sample`: the first samples, and how they came about."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from diffusion_jax import denoisers, pictures
from diffusion_jax.experiment import Experiment, Sampling, decoded
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Params


def show(experiment: Experiment, samples: Mapping[str, np.ndarray], workdir: Path) -> Path | None:
    """Writes the first samples as a person would look at them: a grid, a scatter plot, or text."""
    x = samples.get("x")
    group = experiment.config.sampling
    if x is None:
        return None
    if group.get("decoder"):
        x = decoded(experiment, x[: group.picture_columns**2])
    if x.ndim == 4 and x.shape[-1] in (1, 3):
        path = workdir / "samples.png"
        pictures.save_grid(path, x[: group.picture_columns**2], group.picture_columns, zoom=group.picture_zoom or None)
        return path
    if x.ndim == 2 and x.shape[1] == 2:
        path = workdir / "samples.png"
        count = min(len(x), len(experiment.held_out))
        real = np.stack([experiment.held_out[i]["x0"] for i in range(count)])
        pictures.save_scatter(path, {"held-out data": real, "samples": x}, title=f"{len(x)} samples and data")
        return path
    tokenizer = getattr(experiment.source, "tokenizer", None)
    if np.issubdtype(x.dtype, np.integer) and tokenizer is not None:
        path = workdir / "samples.txt"
        path.write_text("\n\n".join(tokenizer.decode(row) for row in x[:20]) + "\n", encoding="utf-8")
        return path
    return None


def along_the_run(
    experiment: Experiment, sampling: Sampling, params: Params, seed: int, rows: int = 10
) -> dict[str, np.ndarray] | None:
    """The first samples at ten moments of their run, `[10, rows, H, W, C]`; None where there is no picture of them.

    "denoising": x on its way from noise to sample. "predictions": the sample as the denoiser predicted it at that
    moment (`denoisers.recorded`), from which one sees when the composition is decided.
    """
    if not (isinstance(experiment.shape, tuple) and len(experiment.shape) == 3 and experiment.shape[-1] in (1, 3)):
        return None
    steps = sampling.grid.shape[0] - 1
    every = max(1, steps // 10)
    denoiser = denoisers.recorded(sampling.denoiser, steps)
    index = np.arange(rows, dtype=np.int32)
    cond = sampling.conditions(index) if sampling.conditions else None
    result = jax.jit(
        lambda key, params, cond: sample(
            key, denoiser, params, sampling.solver, sampling.grid,
            shape=(rows, *experiment.shape), cond=cond, save_every=every,
        )
    )(jax.random.key(seed), params, cond)  # fmt: skip
    return {
        "denoising": np.asarray(result.trace),
        "predictions": np.asarray(result.run.carry.values[every - 1 :: every]),
    }
