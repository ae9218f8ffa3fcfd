"""Statistics of a set of features in an NPZ file, in the layout that other programs write and read.

mu [D], sigma [D, D]       mean and covariance of the features: pytorch-fid, clean-fid and guided-diffusion
mu_s, sigma_s              those of Inception's spatial features, in the files of guided-diffusion (sFID)
arr_0 [N, H, W, C]         the images themselves, where the file is one of guided-diffusion's reference batches
made_by                    JSON of this library: feature network, resizing, number of images; others ignore it
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax import reading
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.metrics.frechet import Moments
from diffusion_jax.whole_files import written_whole

LAYOUT = ("mu", "sigma", "mu_s", "sigma_s", "made_by")


class Gaussian(NamedTuple):
    """Mean `[D]` and covariance `[D, D]` of features."""

    mean: np.ndarray
    covariance: np.ndarray


class Statistics(NamedTuple):
    """What a statistics file says of a set.

    features: of the feature network. spatial: of Inception's spatial features, or None. made_by: what this library
    wrote about it (`features`, `digest`, `resizing`, `count`); empty in files of other programs.
    """

    features: Gaussian
    spatial: Gaussian | None = None
    made_by: Mapping[str, Any] = {}


def gaussian(of: Moments) -> Gaussian:
    """The Gaussian with these moments."""
    return Gaussian(of.mean, of.covariance)


def read_statistics(path: str | os.PathLike) -> Statistics | None:
    """The statistics in an NPZ file; None where it has none (`mu` and `sigma`), as a file of images.

    Raises InvalidInput for a file that is damaged, has one of the two alone, or holds other shapes or a NaN.
    """
    arrays = reading.read_members(path, LAYOUT)
    if not {"mu", "sigma"} & arrays.keys():
        return None
    made_by = reading.parse_json(str(arrays["made_by"]), f"{path}: made_by") if "made_by" in arrays else {}
    features = _checked(arrays, "mu", "sigma", path)
    spatial = _checked(arrays, "mu_s", "sigma_s", path) if {"mu_s", "sigma_s"} & arrays.keys() else None
    return Statistics(features, spatial, made_by)


def _checked(arrays, mean, covariance, path):
    for name in (mean, covariance):
        if name not in arrays:
            raise InvalidInput(f"{path} has no array {name!r}, but statistics are {mean!r} and {covariance!r}.")
        if arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all():
            raise InvalidInput(f"{path}: {name!r} is no array of finite numbers.")
    mu, sigma = arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise invalid(f"shapes of {mean}, {covariance} in {path}", (mu.shape, sigma.shape), "[D] and [D, D] are needed")
    return Gaussian(mu, sigma)


def write_statistics(path: str | os.PathLike, statistics: Statistics) -> Path:
    """Writes an NPZ file that pytorch-fid, guided-diffusion and `read_statistics` read; whole, or not at all.

    Raises InvalidInput where there is a file already, or it cannot be written.
    """
    file = check_new(path)
    arrays = {"mu": statistics.features.mean, "sigma": statistics.features.covariance}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.covariance}
    arrays["made_by"] = np.asarray(json.dumps(dict(statistics.made_by)))
    try:
        with written_whole(file) as draft, draft.open("wb") as opened:
            np.savez(opened, **arrays)  # pyright: ignore[reportArgumentType]: no array is named allow_pickle
    except OSError as error:
        raise InvalidInput(f"{file} cannot be written: {error.strerror or error}.") from None
    return file


def check_new(path: str | os.PathLike) -> Path:
    """The path of a statistics file to be written. Raises InvalidInput unless it ends in .npz and is not there."""
    file = Path(path).expanduser()
    if file.suffix != ".npz":
        raise invalid("the name of the statistics file", str(file), "it must end in .npz")
    if file.exists():
        raise InvalidInput(f"{file} exists: remove it or give another name.")
    return file
