"""SDP (Høeg et al. 2024): a policy whose actions stand at rising noise levels, so that a decision is a share of a run.

A disc is driven around an obstacle, on either side, by plans of h chunks of actions of which the first is executed.
Full re-denoising makes a plan at each decision, for N evaluations; a stream keeps it in a rolling buffer and needs
N / h. Networks are trained on the levels that a stream visits in 80 of 100 examples, or on one level for all actions.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import control, denoisers, pictures
from diffusion_jax.config import build
from diffusion_jax.data import tabletop
from diffusion_jax.metrics import interleaved
from diffusion_jax.recipes.study import Results, Study, by_seed
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.solvers import ddim
from diffusion_jax.typing import Denoiser


class Driver(NamedTuple):
    """A policy, and the network with whose parameters it acts."""

    network: str
    policy: control.Policy


def study(s: Study) -> Results:
    config = s.config
    trained = {n: {i: s.stage(n, entry, seed=i) for i in s.seeds} for n, entry in config.policies.items()}
    network = trained["mixed"][s.seeds[0]].trained
    drivers = drivers_of(denoisers.clipped(denoisers.denoiser(network.network, network.process)), config)
    world = tabletop.environment(tabletop.Tabletop(config.task))
    worlds = {
        "table": world,
        "jump": control.with_event(world, config.jump, tabletop.jump_goal),
        "slow": tabletop.environment(tabletop.Tabletop(config.task, max_step=config.slow)),
    }
    programs = {
        (name, where): jax.jit(partial(control.rollout, worlds[where], drivers[name].policy, **size))
        for where, (steps, names) in config.plays.items()
        for size in [{"episodes": config.episodes, "steps": steps}]
        for name in names
    }
    shown: dict[tuple[str, str], control.Rollout] = {}

    def measured(seed: int) -> dict[str, float]:
        figures = {}
        for (name, where), program in programs.items():
            run = program(trained[drivers[name].network][seed].value, jax.random.key(seed))
            shown.setdefault((name, where), run)
            figures |= {f"{name}, {where}: {what}": value for what, value in measures(run, config).items()}
        return figures

    found = by_seed(s.seeds, measured)
    rows = [*cost_rows(drivers, trained, config), *success_rows(found)]
    return Results(
        rows, drawn(s, found, shown), "training, the episodes, and the noise; the demonstrations are the same"
    )


def drivers_of(denoiser: Denoiser, config: ConfigDict) -> dict[str, Driver]:
    """All ways to act: by a network trained on constant levels, or ("mixed") on those of a stream of h chunks."""
    chunk, h, grid = config.chunk, config.h, build(config.grid)

    def plans(every=1):
        return control.receding_horizon(denoiser, ddim(), grid[::every], shape=(h * chunk, 2), execute=chunk)

    def stream(primer="denoise", h=h):
        return control.streamed_actions(denoiser, ddim(), grid, shape=(h * chunk, 2), chunk=chunk, primer=primer)

    return {
        "full": Driver("constant", plans()),
        "full, mixed": Driver("mixed", plans()),
        "fewer steps": Driver("constant", plans(h)),
        "stream": Driver("mixed", stream()),
        "stream from zeros": Driver("mixed", stream("zero")),
        "stream, constant": Driver("constant", stream()),
        **{f"stream, h = {other}": Driver(f"mixed, h = {other}", stream(h=other)) for other in config.other_h},
    }


def measures(run: control.Rollout, config: ConfigDict) -> dict[str, float]:
    """Shares of the episodes: that succeed, that do so by the deadline of the jump, that steer to both sides."""
    state = run.states.state if hasattr(run.states, "state") else run.states
    wavered = tabletop.wavering(tabletop.observe(state), run.actions, config.chunk)
    return {
        "success": float(run.success.mean()),
        "in time": float(run.done[:, : config.deadline].any(axis=1).mean()),
        "wavering": float(wavered.mean()),
    }


def cost_rows(drivers: Mapping[str, Driver], trained: Mapping[str, Any], config: ConfigDict) -> list[Row]:
    """What a decision costs, counted, and timed in so many environments at once, the policies in turns."""
    key, spent, rows = jax.random.key(0), {}, []
    for count in config.environments:
        seen, thunks = {"observation": jnp.zeros((count, 1, 8))}, {}
        for name in ("full", "stream"):
            network, policy = drivers[name]
            params = next(iter(trained[network].values())).value
            carry, act = jax.jit(policy.init)(params, seen, key), jax.jit(policy.act)
            thunks[name] = partial(act, params, carry, seen, key)
            spent[name] = float(control.decision_cost(policy, params, seen).evaluations)
        rate = {name: [1 / taken for taken in seconds] for name, seconds in interleaved(thunks, config.rounds).items()}
        title, figure = f"Three times the decisions, {count} at once", "decisions a second, by round"
        published = "1.0 s falls to 0.1 s as h grows"
        rows.append(Row(title, figure, rate["stream"], rate["full"], "higher", published, factor=3.0))
    title, figure, published = "A decision costs N / h", "network evaluations a decision", "50 instead of 100 (h = 2)"
    return [Row(title, figure, spent["stream"], spent["full"], "equal", published, 1 / config.h), *rows]


SUCCESS = (
    ("As good as a model of full plans", "stream", "full", -0.03, "0.90 on Push-T, whatever h"),
    ("As good as its own full plans", "stream", "full, mixed", -0.03, "scores unchanged as h grows"),
    ("Better than fewer steps, at equal cost", "stream", "fewer steps", 0.0, "no figure"),
    ("Constant levels do not train a stream", "stream", "stream, constant", 0.1, "80/20 is best (0.90)"),
    ("It may begin with zeros", "stream from zeros", "stream", -0.03, "0.90 with each primer"),
)
"""Claims about success on the table: title, ours, against, margin, published."""


def success_rows(found: Mapping[str, list[float]]) -> list[Row]:
    """Claims about what policies do, where both sides have acted."""
    rows = []
    for title, ours, against, margin, published in SUCCESS:
        left, right = (found.get(f"{name}, table: success") for name in (ours, against))
        if left and right:
            rows.append(Row(title, f"success; against: {against}", left, right, "higher", published, margin=margin))
    if "stream, slow: wavering" in found:
        left, right = (found[f"{name}, slow: wavering"] for name in ("stream", "fewer steps"))
        rows.append(Row("A stream keeps to its side", "episodes that steer to both sides", left, right, "lower"))
    lost = {}
    for name in jumped(found):
        # Networks of another h succeed less often to begin with, so it is a share of those that do.
        calm, after = (np.asarray(found[f"{name}, {where}: in time"]) for where in ("table", "jump"))
        lost[name] = (1 - after / np.maximum(calm, 1e-3)).tolist()
    figure = "share of successes lost to a jump of the goal"
    return rows + [
        Row(f"It reacts later: {name}", figure, lost[name], lost["full, mixed"], "higher", "reactivity drops with h")
        for name in lost
        if name != "full, mixed"
    ]


def jumped(found: Mapping[str, Any]) -> list[str]:
    """The policies that met a jump of the goal."""
    return [name.removesuffix(", jump: in time") for name in found if name.endswith(", jump: in time")]


def drawn(s: Study, found: Mapping[str, Any], shown: Mapping[Any, control.Rollout]) -> dict[Any, str]:
    """Where the disc was, by policy, and when episodes succeed after a jump."""
    paths = {
        name: run.states.disc[:, :24].reshape(-1, 2)[:4000] for (name, where), run in shown.items() if where == "table"
    }
    pictures.save_scatter(s.picture("paths"), paths, title="Where the disc was, by policy")
    made = {s.picture("paths"): "Where the disc was: policies pass the obstacle on either side, or are held by it."}
    if jumped(found):
        steps = range(s.config.jump, s.config.deadline + 1)
        curves = {
            name: (steps, [float(shown[name, "jump"].done[:, :step].any(axis=1).mean()) for step in steps])
            for name in jumped(found)
        }
        y_label, title = "share of episodes at the goal", f"The goal jumps after step {s.config.jump}"
        pictures.save_curves(s.picture("jump"), curves, x_label="step of the episode", y_label=y_label, title=title)
        made[s.picture("jump")] = "After a jump of the goal: the longer the buffer, the later it is reached."
    return made
