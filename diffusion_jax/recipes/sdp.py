"""SDP: a policy whose actions stand at rising noise levels, so that a decision is a share of a denoising.

A disc is driven around an obstacle by plans of h chunks of actions, of which the first is executed. Diffusion Policy
denoises a whole plan at each decision, for N evaluations. A stream keeps the plan in a rolling buffer, whose chunks
wait at the levels 1/h, 2/h, .. 1, and needs N / h (Høeg et al. 2024). The network is trained on the levels that a
stream visits in 80 of 100 examples, and on one level for all actions in the others.
"""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import control, pictures
from diffusion_jax.control import Rollout
from diffusion_jax.data import push_t, tabletop
from diffusion_jax.recipes import Claim, Results, claim, seeds
from diffusion_jax.recipes.parts.acting import Planner, decisions, planner, rollouts
from diffusion_jax.solvers import ddim


def replanned(planner: Planner, chunk: int, every: int = 1) -> control.Policy:
    """Full re-denoising, on every so many-th time of the grid."""
    grid = planner.grid[::every]
    return control.receding_horizon(planner.denoiser, ddim(), grid, shape=planner.shape, execute=chunk)


def streamed(planner: Planner, chunk: int, primer: str = "zero") -> control.Policy:
    return control.streamed_actions(
        planner.denoiser, ddim(), planner.grid, shape=planner.shape, chunk=chunk, primer=primer
    )


def run(config: ConfigDict, workdir: Path) -> Results:
    chunk, numbers = config.chunk, list(seeds(config))
    mixed, constant = (planner(config.policies[name], f"sdp-{name}", numbers) for name in ("mixed", "constant"))
    chunks = mixed.shape[0] // chunk
    arms = {
        "full": (replanned(constant, chunk), constant.params),
        "full_mixed": (replanned(mixed, chunk), mixed.params),
        "short": (replanned(constant, chunk, chunks), constant.params),
        "stream": (streamed(mixed, chunk, "denoise"), mixed.params),
        "stream_zero": (streamed(mixed, chunk, "zero"), mixed.params),
        "stream_constant": (streamed(constant, chunk, "denoise"), constant.params),
    }

    def play(arm, world, steps):
        policy, params = arm
        return rollouts(policy, params, world, numbers, config.episodes, steps)

    world = tabletop.environment(tabletop.Tabletop(config.task))
    outcomes = {name: play(arms[name], world, config.horizon) for name in config.arms}
    success = {name: outcome.success.mean(axis=1).tolist() for name, outcome in outcomes.items()}
    timed = {name: (arms[name][0], arms[name][1][0]) for name in ("full", "stream")}
    cost = {n: decisions(timed, config.repeats, n) for n in config.environments}
    # A disc that answers slowly stays where both sides are open for several decisions.
    wavered, calm, after = {}, {}, {}
    if config.slow:
        slow = tabletop.environment(tabletop.Tabletop(config.task, max_step=config.slow.max_step))
        slowly = {name: play(arms[name], slow, config.slow.horizon) for name in ("short", "stream")}
        wavered = {
            name: tabletop.wavering(tabletop.observe(run.states), run.actions, chunk).mean(axis=-1).tolist()
            for name, run in slowly.items()
        }
    if config.jump:
        jumping = {1: arms["full_mixed"], chunks: arms["stream"]}
        for name, policy in config.jump.policies.items():
            longer = planner(policy, f"sdp-{name}", numbers[:1])
            jumping[longer.shape[0] // chunk] = streamed(longer, chunk, "denoise"), longer.params
        moved = control.with_event(world, config.jump.step, tabletop.jump_goal)
        calm = {h: play(jumping[h], world, config.jump.horizon) for h in sorted(jumping)}
        after = {h: play(jumping[h], moved, config.jump.horizon) for h in sorted(jumping)}

    claims = [
        claim(
            "A decision costs N / h evaluations",
            "network evaluations per executed chunk, counted",
            cost[1]["full"].evaluations,
            cost[1]["stream"].evaluations,
            "lower",
            "50 calls instead of 100 (h = 2)",
            factor=1 / chunks,
            margin=1e-6,
        ),
        *(
            claim(
                f"At least three times as many decisions a second: {n} at once",
                f"decisions per second in each of {n} environments, median",
                1 / cost[n]["full"].seconds,
                1 / cost[n]["stream"].seconds,
                "higher",
                "about 1.0 s falls to about 0.1 s as h grows",
                factor=3.0,
                reason="of so small a network an evaluation is short against what each decision costs besides",
            )
            for n in sorted(cost)
        ),
        *if_measured(
            "The success of full re-denoising by a model trained for it",
            "success, at most 3 points lower; the baseline is trained on constant levels",
            success.get("full"),
            success["stream"],
            "higher",
            "score 0.90 on Push-T; scores unchanged as h grows",
            margin=-0.03,
            reason="the first chunk was begun under an older observation, and few steps are left to correct it",
        ),
        *if_measured(
            "The success of full re-denoising by the same model",
            "success, at most 3 points lower; both trained 80/20",
            success.get("full_mixed"),
            success["stream"],
            "higher",
            "scores unchanged as h grows",
            margin=-0.03,
            reason="the first chunk was begun under an older observation, and few steps are left to correct it",
        ),
        *if_measured(
            "A stream keeps to its side",
            "share of episodes in which decisions steer to different sides; the baseline is DDIM at equal cost",
            wavered.get("short"),
            wavered.get("stream"),
            "lower",
            "consecutive plans share partly denoised futures",
        ),
        *if_measured(
            "Constant levels alone do not train a stream",
            "success of a stream, at least 10 points higher; the baseline is trained on constant levels",
            success.get("stream_constant"),
            success["stream"],
            "higher",
            "constant or linear levels alone are poor, 80/20 is best (0.90)",
            margin=0.1,
            reason="so small a network carries over in part to mixed levels that it has not seen",
        ),
        *if_measured(
            "It does not matter how the buffer is begun",
            "success, at most 3 points lower, begun with zeros; the baseline is begun with a whole plan",
            success["stream"],
            success.get("stream_zero"),
            "higher",
            "0.90 with each of the three primers",
            margin=-0.03,
            reason="zeros steer to no side, and the first chunks, at low noise, stay near them",
        ),
        *(jump_claims(calm, after, config.jump, chunks) if config.jump else ()),
    ]
    if config.push_t.episodes and importlib.util.find_spec("gym_pusht"):
        claims += on_push_t(config.push_t, numbers[0])

    files = [workdir / "paths.png"]
    titles = {
        "full": f"{len(constant.grid) - 1} evaluations",
        "short": f"{(len(constant.grid) - 1) // chunks} evaluations",
        "stream": "stream, 80/20",
        "stream_constant": "stream, constant",
    }
    discs = {
        title: outcomes[name].states.disc[0, :24].reshape(-1, 2) for name, title in titles.items() if name in outcomes
    }
    pictures.save_scatter(files[0], discs)
    if not config.jump:
        return Results(claims, files)
    files.append(workdir / "jump.png")
    steps = range(config.jump.step, config.jump.horizon + 1)
    curves = {
        f"h = {h}": (steps, [float((outcome.success & (outcome.time <= step)).mean()) for step in steps])
        for h, outcome in after.items()
    }
    label = f"at the goal (jump: step {config.jump.step})"
    pictures.save_curves(files[1], curves, x_label="step of the episode", y_label=label)
    return Results(claims, files)


def if_measured(name: str, metric: str, baseline: Any, ours: Any, *others: Any, **options: Any) -> list[Claim]:
    """The claim, where both arms of it have acted."""
    return [] if baseline is None or ours is None else [claim(name, metric, baseline, ours, *others, **options)]


def jump_claims(calm: dict[int, Rollout], after: dict[int, Rollout], jump: Any, own: int) -> list[Claim]:
    """The share of success before a deadline that is lost when the goal jumps, each h against h = 1.

    h = 1 is full re-denoising. Shares, because the networks of other h may succeed less often to begin with; those of
    another h than `own` were trained once for all seeds.
    """
    lost = {h: (1 - after[h].success.mean(axis=1) / np.maximum(calm[h].success.mean(axis=1), 1e-3)) for h in after}
    one, *others = sorted(lost)
    return [
        claim(
            f"What was begun earlier reacts later: h = {h}",
            f"share of successes by step {jump.horizon} lost to a jump after step {jump.step}; baseline: h = {one}"
            + ("" if h == own else "; one network for all seeds"),
            lost[one].tolist(),
            lost[h].tolist(),
            "higher",
            "reactivity drops as h grows",
            reason="so few decisions lie between the jump and a plan without traces of the old goal that noise decides",
        )
        for h in others
    ]


def on_push_t(config: ConfigDict, seed: int) -> list[Claim]:
    """Full re-denoising and a stream with one model on the same episodes of Push-T."""
    model, history = planner(config.policy, "sdp-push-t", [seed]), config.policy.data.history
    found = {}
    for name, policy in {"full": replanned(model, config.chunk), "stream": streamed(model, config.chunk)}.items():
        compiled, worlds = policy._replace(act=jax.jit(policy.act)), push_t.simulators(seed, config.episodes)
        found[name] = control.rollout_simulators(
            worlds, compiled, model.params[0], jax.random.key(seed), steps=config.horizon, history=history
        )
    success = {name: float(run.success.mean()) for name, run in found.items()}
    coverage = {name: float(run.score.max(axis=1).mean()) for name, run in found.items()}
    return [
        claim(
            "Push-T: solved at least every second time",
            f"success of a stream, mean of {config.episodes} episodes",
            0.5,
            success["stream"],
            "higher",
            "score 0.90 in simulation whatever the primer",
            reason=f"a small policy, trained for seconds; re-denoised in full it reaches {success['full']:.2f}",
        ),
        claim(
            "Push-T: the best coverage of full re-denoising",
            f"best coverage, mean of {config.episodes} episodes, one model; at most {config.margin:g} lower",
            coverage["full"],
            coverage["stream"],
            "higher",
            "score 0.90 in simulation whatever the primer",
            margin=-config.margin,
            reason="few episodes of a policy that was trained for seconds, so the difference is mostly noise",
        ),
    ]
