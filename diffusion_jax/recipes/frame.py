"""What recipes share: models that are trained once and kept, seeds, and devices."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
from ml_collections import ConfigDict

from diffusion_jax.cache import cache_folder
from diffusion_jax.distributed import init_sharded
from diffusion_jax.errors import invalid
from diffusion_jax.experiment import Experiment, fit

_VERSION = 1
"""Counts up whenever a change elsewhere would train other weights from the same config."""


def trained(
    experiment: Experiment, name: str, *, init_params: Callable[[Any], Any] | None = None, given: Any = None
) -> Any:
    """The averaged parameters of `experiment` (of its only `config.ema`; the last ones without an average).

    They are kept in the cache under `name` and a hash of the whole config: a second call with the same config trains
    nothing, an interrupted one goes on. With `config.train.steps` 0 they are those that a run would begin with.

    init_params: `key -> params` to begin with; the network's own when None. given: plain values besides the config on
    which the run depends, e.g. the configs of the models from which a replaced source or objective was made.
    """
    config = experiment.config
    if len(config.ema) > 1:
        raise invalid("config.ema", list(config.ema), "a recipe keeps one average, or none")
    if config.train.steps == 0:
        begin = experiment.init_params if init_params is None else init_params
        return init_sharded(begin, jax.random.key(config.seed), mesh=experiment.mesh)
    text = json.dumps([_VERSION, config.to_dict(), given], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    state = fit(experiment, cache_folder() / "recipes" / f"{name}-{digest}", init_params=init_params, progress=False)
    if int(state.step) < config.train.steps:
        # After SIGTERM; the next run goes on from here.
        raise KeyboardInterrupt
    return next(iter(state.ema.values())) if config.ema else state.params


def trained_arms(experiments: Mapping[str, Experiment], name: str, *, given: Any = None) -> dict[str, Any]:
    """`trained` for each arm; arms whose configs are equal, as in smoke runs, share one training.

    name: in the cache; "{arm}" in it stands for that of the arm.
    """
    made: list[tuple[Any, Any]] = []
    for arm, experiment in experiments.items():
        config = experiment.config.to_dict()
        known = [params for other, params in made if other == config]
        params = known[0] if known else trained(experiment, name.format(arm=arm), given=given)
        made.append((config, params))
    return {arm: params for arm, (_, params) in zip(experiments, made, strict=True)}


def seeds(config: ConfigDict) -> range:
    """The seeds of a run: `config.seeds` many, from `config.seed` on."""
    return range(config.seed, config.seed + config.seeds)


def on_devices(count: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` where `count` devices are seen: here, or else in a new process with virtual CPU devices.

    function: of a module, where a new process finds it. arguments, result: plain values, NumPy arrays, and trees and
    `functools.partial` of those.
    """
    if jax.device_count() >= count:
        return function(*arguments)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    fresh = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}),
        concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool,
    ):
        return pool.submit(function, *arguments).result()
