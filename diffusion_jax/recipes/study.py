"""What studies are made of: arms that are sampled alike, and tables of their figures by seed.

A study is a module `recipes/<slug>.py` with `study(s: Study) -> Results`: it asks for stages (`s.stage`), makes arms of
them, measures those in a table, and states its claims as rows (`verdicts.Row`). It is run by `python -m
diffusion_jax.recipes <slug>`, which judges the rows and writes the report and the page.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from diffusion_jax import stages
from diffusion_jax.metrics import timed
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.sampling import Samples, sample
from diffusion_jax.stages import Stage
from diffusion_jax.timesteps import noised_start
from diffusion_jax.typing import Condition, Denoiser, Grid, Params, Solver


class Study(NamedTuple):
    """What a study is run with. seeds: those that it reports. ledger: the stages that it asked for, by key."""

    config: ConfigDict
    seeds: tuple[int, ...]
    workdir: Path
    smoke: bool
    ledger: dict[str, Stage]

    def stage(self, name: str, config: Any, *parents: Stage, seed: int | None = None, **how: Any) -> Stage:
        """`stages.stage`, at another seed where one is given. Nothing of a smoke run is kept; equal ones are shared."""
        if seed is not None:
            config = ConfigDict({**ConfigDict(config).to_dict(), "seed": seed})
        key = stages.stage_key(config, *parents, **how)
        if key not in self.ledger:
            self.ledger[key] = stages.stage(name, config, *parents, keep=not self.smoke, **how)
        return self.ledger[key]

    def picture(self, name: str) -> Path:
        """Where the picture `name` of this study goes."""
        return self.workdir / f"{name}.png"


class Results(NamedTuple):
    """What a study returns. rows: the first is the headline. pictures: files, each with what one should see in it.

    varied: what differs between seeds, e.g. "noise of sampling" or "training and noise".
    """

    rows: Sequence[Row]
    pictures: Mapping[Path, str]
    varied: str


class Arm(NamedTuple):
    """A way to sample. denoiser: made once and shared by arms that differ in the other fields only, so that they share
    a compiled program; with `settings`, arrays, it is a function of them that makes one: schedules, thresholds, ...

    sampled: with the arguments of `sampling.sample`, for other loops (`streaming.sample_chained`, ...).
    known: what stands where the grid, a plan, stands still; the run begins with `timesteps.noised_start` of it.
    """

    denoiser: Denoiser | Callable[..., Denoiser]
    params: Params
    solver: Solver
    grid: Grid
    cond: Condition = None
    settings: tuple[Any, ...] = ()
    sampled: Callable[..., Samples] = sample
    known: Any = None


class Drawn(NamedTuple):
    """What a measure sees: the samples of an arm, its condition, the samples of the reference arm, seed and arm."""

    x: Any
    cond: Condition
    reference: Any
    seed: int
    arm: str


Arms = Mapping[str, Arm | Callable[[Any], Any]]
"""By name. A function `key -> Samples` (or samples alone) where an arm is no such run, compiled already."""

Figures = dict[str, dict[str, list[float]]]
"""By arm and measure: one value a seed."""

COSTS = ("evaluations", "compute", "seconds")


class Tabulated(NamedTuple):
    """figures: of every arm the measures, and `COSTS`: network evaluations and relative compute for a sample, and
    seconds for all. samples: of the first seed, for pictures."""

    figures: Figures
    samples: dict[str, Any]

    def __getitem__(self, arm: str) -> dict[str, list[float]]:
        return self.figures[arm]

    def row(
        self,
        title: str,
        measure: str,
        ours: str,
        against: str | float,
        direction: str,
        published: str = "",
        factor: float = 1.0,
        margin: float = 0.0,
        figure: str | None = None,
    ) -> Row:
        """The `Row` that compares a measure of two arms, or of one with a number.

        figure: of the row, where that is not the measure's name.
        """
        other = self[against][measure] if isinstance(against, str) else against
        return Row(title, figure or measure, self[ours][measure], other, direction, published, factor, margin)


def table(
    arms: Arms | Callable[[int], Arms],
    seeds: Sequence[int],
    measures: Mapping[str, Callable[[Drawn], float]] | Callable[[Drawn], Mapping[str, float]],
    *,
    shape: Any = None,
    count: int = 1,
    reference: str | None = None,
) -> Tabulated:
    """Samples every arm from the same noise at each seed, in turns, and measures what came of it.

    arms: by name, or a function of the seed where parameters or conditions depend on it. measures: by name, functions
    of `Drawn`; or one function that returns its figures by name. shape: of one sample (a dict for joint data). count:
    of samples. reference: the arm with which measures compare.

    Arms whose denoiser, solver and shapes are the same share one compiled program, at all seeds. Seconds are of runs
    that compile nothing.
    """
    programs: dict[Any, Callable[..., Any]] = {}
    whole = jax.tree.map(lambda size: (count, *size), shape, is_leaf=lambda leaf: isinstance(leaf, tuple))
    figures: Figures = {}
    kept: dict[str, Any] = {}
    for seed in seeds:
        here = arms(seed) if callable(arms) else arms
        order = sorted(here, key=lambda name: name != reference)
        against = None
        for name in tqdm(order, desc=f"arms, seed {seed}", unit="arm", disable=not sys.stderr.isatty()):
            run, cond = _prepared(here[name], jax.random.key(seed), whole, programs)
            seconds, result = timed(run)
            x = jax.device_get(result.x if isinstance(result, Samples) else result)
            against = x if name == reference else against
            drawn = Drawn(x, cond, against, seed, name)
            found = measures(drawn) if callable(measures) else {name: f(drawn) for name, f in measures.items()}
            row = {measure: float(value) for measure, value in found.items()}
            cost = result.cost if isinstance(result, Samples) else None
            counted = (np.nan, np.nan) if cost is None else (float(cost.evaluations), float(cost.compute))
            row |= dict(zip(COSTS, (*counted, seconds), strict=True))
            for measure, value in row.items():
                figures.setdefault(name, {}).setdefault(measure, []).append(value)
            kept.setdefault(name, x)
    return Tabulated(figures, kept)


def _prepared(arm: Any, key: Any, shape: Any, programs: dict[Any, Any]) -> tuple[Callable[[], Any], Condition]:
    """A run of an arm that compiles nothing any more, and its condition."""
    if not isinstance(arm, Arm):
        if id(arm) not in programs:
            jax.block_until_ready(arm(key))
            programs[id(arm)] = arm
        return (lambda: arm(key)), None

    def run(key, params, grid, cond, settings, known):
        denoiser = arm.denoiser if isinstance(arm.denoiser, Denoiser) else arm.denoiser(*settings)
        begin: dict[str, Any] = {"shape": shape}
        if known is not None:
            begin = {"x_init": noised_start(key, denoiser.process, grid, known)}
        return arm.sampled(key, denoiser, params, arm.solver, grid, cond=cond, **begin)

    arguments = jax.tree.map(jax.numpy.asarray, (key, arm.params, arm.grid, arm.cond, arm.settings, arm.known))
    leaves, structure = jax.tree.flatten(arguments)
    kinds = tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)
    # Identities tell parts apart as long as those live, so the arm is kept beside its program.
    program = (*map(id, (arm.denoiser, arm.solver, arm.sampled)), structure, kinds)
    if program not in programs:
        programs[program] = jax.jit(run).lower(*arguments).compile(), arm
    return (lambda: programs[program][0](*arguments)), arm.cond


def by_seed(seeds: Sequence[int], measure: Callable[[int], Mapping[str, float]]) -> dict[str, list[float]]:
    """`measure(seed)` for each seed, by name: one value a seed, for what is no sampling."""
    found = [measure(seed) for seed in seeds]
    return {name: [float(one[name]) for one in found] for name in found[0]}
