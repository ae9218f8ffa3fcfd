"""ViDiT-Q: a transformer in few bits, whose ranges follow each token and whose channels are balanced by timestep.

The transformer on digits is quantised at several widths with each part of the method in turn. Compared are the error of
its output at states of a 32-bit run, another than that which calibrates it, and samples from the same noise.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, objectives, pictures, solvers, timesteps
from diffusion_jax.config import build
from diffusion_jax.quantization import affine, input_ranges, quantized, symmetric
from diffusion_jax.quantization.balanced_network import balanced_network, input_taps
from diffusion_jax.quantization.statistics import no_maxima, pooled_maxima, with_batch
from diffusion_jax.recipes.study import Arm, Results, Study, by_seed, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.sampling import sample
from diffusion_jax.stages import Stage
from diffusion_jax.typing import Network, Params


class Calibration(NamedTuple):
    """Of the inputs of layers: running maxima in K buckets, by path, and the ranges of `input_ranges`."""

    maxima: Any
    ranges: Any


def states_of(s: Study, base: Stage) -> Callable[[Any], tuple[Any, Any, Any]]:
    """key -> states `[S, B, ...]` of a 32-bit run before each step but the first, times `[S, B]`, and labels."""
    config, process, grid = s.config, base.trained.process, build(s.config.grid)
    plain, shape = denoisers.denoiser(base.trained.network, process), (config.count, *base.trained.shape)
    how = {"cond": {"label": np.arange(config.count) % 10}, "save_every": 1}
    times = process.network_time(grid[1:-1])

    def states(key):
        trace = sample(key, plain, base.value, solvers.ddim(), grid, shape=shape, **how).trace
        return trace[:-1], jnp.broadcast_to(times[:, None], (len(times), config.count)), how["cond"]

    return states


def calibrating(base: Stage, config: ConfigDict) -> Callable[..., Calibration]:
    """(states, times, labels) -> what the quantised networks are made of."""
    read, edges = input_taps(base.trained.network, tuple(config.select)), np.asarray(config.edges, np.float32)

    @jax.jit
    def collect(xs, times, cond):
        def step(maxima, given):
            return with_batch(maxima, read(base.value, *given, cond), given[1], edges), None

        shapes = jax.eval_shape(read, base.value, xs[0], times[0], cond)
        return jax.lax.scan(step, no_maxima(shapes, len(edges) + 1), (xs, times))[0]

    def calibrated(xs, times, cond):
        plain, runs, select = base.trained, jnp.moveaxis(xs, 0, 1), tuple(config.select)
        grid = build(config.grid)
        ranges = input_ranges(plain.network, plain.process, base.value, runs, grid[1:-1], cond, select=select)
        return Calibration(collect(xs, times, cond), ranges)

    return calibrated


def quantised_arm(base: Stage, config: ConfigDict, name: str, bits: ConfigDict) -> tuple[Network, Callable]:
    """`(network, Calibration -> its parameters)`; bits: of weights and activations, and alpha at that width."""
    plain, select, static = base.trained.network, tuple(config.select), name in ("static", "nearest")
    weights = symmetric(bits["weights"], per="tensor" if name == "nearest" else "channel")
    activations = affine(bits["activations"], per="tensor" if static else "token")
    inner, batch = quantized(plain, weights, activations, dynamic=not static, select=select), base.trained.example()

    def quantize(params, ranges=None):
        return inner.quantize(params, batch["x0"], jnp.zeros(1), batch["cond"], ranges=ranges)

    if static or name == "dynamic":
        return inner.network, lambda found: quantize(base.value, found.ranges if static else None)
    one, rotated = name != "by time", name == "static-dynamic"
    made = balanced_network(inner.network, plain, select, edges=() if one else tuple(config.edges), rotated=rotated)

    def prepare(found):
        # One bucket is that of all times, or the noisiest, which is the last.
        maxima = (pooled_maxima(found.maxima) if name == "balanced" else found.maxima).maxima
        maxima = {path: leaf[-1:] for path, leaf in maxima.items()} if one else maxima
        return made.prepare(base.value, maxima, bits["alpha"], quantize)

    return made.network, prepare


def output_error(network: Network) -> Callable[..., Any]:
    """(params, states, plain outputs) -> the relative squared error of the output at each step, `[S]`."""

    @jax.jit
    def errors(params: Params, xs, times, cond, expected):
        def step(_, given):
            ours, output = network.apply(params, given[0], given[1], cond)[0], given[2]
            return None, jnp.sum((ours - output) ** 2) / jnp.maximum(jnp.sum(output**2), 1e-12)

        return jax.lax.scan(step, None, (xs, times, expected))[1]

    return errors


def loss_of(base: Stage, network: Network) -> Callable[[Params, Any], Any]:
    """(params, key) -> the loss on all held-out examples; of a key, the same times and noise for every network."""
    objective = objectives.denoising(network, base.trained.process, timesteps.stratified(), train=False)
    batch = jax.tree.map(jnp.asarray, base.trained.held_out.take(np.arange(len(base.trained.held_out))))
    return jax.jit(lambda params, key: objective.loss(params, (), batch, key)[0].mean())


def study(s: Study) -> Results:
    config, base = s.config, s.stage("digits", s.config.base)
    plain, process = base.trained.network, base.trained.process
    keys = [(width, name) for width in config.widths for name in config.arms]
    made = {one: quantised_arm(base, config, one[1], config.widths[one[0]]) for one in keys}
    asked = {one: denoisers.denoiser(network, process) for one, (network, _) in made.items()}
    error = {one: output_error(network) for one, (network, _) in made.items()}
    losses = {one: loss_of(base, made[one][0]) for one in keys if one == ("W8A8", "dynamic")}
    lost, states, collect = loss_of(base, plain), states_of(s, base), calibrating(base, config)
    expect = jax.jit(lambda xs, times, cond: jax.lax.map(lambda g: plain.apply(base.value, *g, cond)[0], (xs, times)))
    arms, curves = {}, {name: [] for name in config.arms}

    def figures(seed):
        found = collect(*states(jax.random.key(1000 + seed)))
        xs, times, cond = states(jax.random.key(2000 + seed))
        expected, told = expect(xs, times, cond), {}
        for width, name in keys:
            params = made[width, name][1](found)
            errors = np.asarray(error[width, name](params, xs, times, cond, expected))
            told[f"{width} {name}"] = errors.mean()
            if width == config.sampled:
                curves[name].append(errors)
                arms[seed, name] = asked[width, name], params
            if (width, name) in losses:
                key = jax.random.key(3000 + seed)
                told |= {"loss": lost(base.value, key), "loss, W8A8": losses[width, name](params, key)}
        return told

    found = by_seed(s.seeds, figures)
    rows = error_rows(config, found) + sample_rows(s, base, arms)
    times = np.asarray(process.network_time(build(config.grid)[1:-1]))
    lines, path = {name: (times, np.mean(errors, axis=0)) for name, errors in curves.items()}, s.picture("errors")
    label, title = "network's time (large: noise)", f"What {config.sampled} changes"
    pictures.save_curves(path, lines, x_label=label, y_label=ERROR, title=title)
    captions = {path: f"Error of the quantised networks' output at {config.sampled}, by time, mean over seeds."}
    return Results(rows, captions, "calibration and noise; the transformer is trained once")


ERROR = "relative squared error of the output"
CLAIMS = (
    ("ranges by token at run time", "dynamic", "static", 1 / 3, ">= 3 x"),
    ("balanced channels", "balanced", "dynamic", 1.0, "balancing restores quality"),
    ("balanced by time", "by time", "balanced", 1 / 1.3, ">= 1.3 x"),
    ("balanced, then rotated", "static-dynamic", "balanced", 1 / 1.3, ">= 1.3 x"),
    ("all of it against nearest rounding", "by time", "nearest", 1 / 3, "the naive form fails"),
)


def error_rows(config: ConfigDict, found: Mapping[str, list[float]]) -> list[Row]:
    rows = []
    for width in (one for one in config.widths if one != "W8A8"):
        for title, ours, other, factor, published in CLAIMS:
            if {ours, other} <= set(config.arms):
                first, second = found[f"{width} {ours}"], found[f"{width} {other}"]
                rows.append(Row(f"{width}: {title}", ERROR, first, second, "lower", published, factor))
    if "loss" in found:
        lost = found["loss, W8A8"]
        rows.append(Row("W8A8 keeps the loss", "held-out loss", lost, found["loss"], "lower", "lossless", 1.01))
    return rows


def sample_rows(s: Study, base: Stage, arms: Mapping[tuple[int, str], tuple]) -> list[Row]:
    """Samples from the same noise, by their distance to those of the 32-bit network."""
    config, cond = s.config, {"label": np.arange(s.config.count) % 10}
    plain, grid = denoisers.denoiser(base.trained.network, base.trained.process), build(config.grid)

    def of_seed(seed):
        own = {name: arms[seed, name] for name in config.drawn}
        ours = {name: Arm(made[0], made[1], solvers.ddim(), grid, cond) for name, made in own.items()}
        return {"float": Arm(plain, base.value, solvers.ddim(), grid, cond), **ours}

    how = {"shape": base.trained.shape, "count": config.count, "reference": "float"}
    found = table(of_seed, s.seeds, {"distance": lambda drawn: float(np.mean((drawn.x - drawn.reference) ** 2))}, **how)
    title = f"{config.sampled}: samples against nearest rounding"
    what = {"figure": "squared distance to the 32-bit samples", "factor": 1 / 3}
    return [found.row(title, "distance", "by time", "nearest", "lower", "naive: noise", **what)]
