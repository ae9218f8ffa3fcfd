"""UWM (Zhu et al. 2025): actions and the future frame are two processes with a time each, and their roles are the task.

A disc passes an obstacle on either side; what drives it sees pictures only. All arms have one trunk, one encoder of
frames, the same optimiser and number of updates: "cloned" has no tokens of the future, "labelled" is UWM on the same
trajectories, "cotrained" on many more without actions besides, whose actions stand at t = 1, and "shared" has one time
for both modalities. Frames are principal components in place of an autoencoder's latents.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import control, pictures, timesteps
from diffusion_jax.config import build
from diffusion_jax.data import tabletop
from diffusion_jax.denoisers import denoiser
from diffusion_jax.metrics import interleaved
from diffusion_jax.models import LatentSpace
from diffusion_jax.recipes.study import Results, Study, by_seed
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.sampling import make_role_sampler
from diffusion_jax.solvers import ddim
from diffusion_jax.stages import Stage

MODES = {
    "policy": {"action": "generate", "future": "ignored"},
    "video": {"action": "ignored", "future": "generate"},
    "forward": {"action": "given", "future": "generate"},
    "inverse": {"action": "generate", "future": "given"},
    "joint": {"action": "generate", "future": "generate"},
}
"""p(a | o), p(o' | o), p(o' | o, a), p(a | o, o') and p(a, o' | o)."""

WORLD = tabletop.Tabletop("reach")


class Windows(NamedTuple):
    """Held-out windows. frames: what is seen, in the true state. known: actions and the future's latents. future: the
    frame itself. disc: where the disc was then."""

    frames: Any
    state: tabletop.State
    known: Mapping[str, Any]
    future: Any
    disc: Any


def study(s: Study) -> Results:
    config = s.config
    stages = {
        name: {i: s.stage(name, entry, seed=s.seeds[0] if name in config.once else i) for i in s.seeds}
        for name, entry in config.arms.items()
    }
    first = {name: made[s.seeds[0]] for name, made in stages.items()}
    experiment = first["cotrained"].trained
    made, space = denoiser(experiment.network, experiment.process), experiment.source.space
    ask = make_role_sampler(made, ddim(), timesteps.linspace(config.steps), shape=experiment.shape)
    policies = {name: policy_of(stage, config) for name, stage in first.items()}
    if "shared" in first:
        policies["shared, jointly"] = policy_of(first["shared"], config, "joint")
    programs = {name: driven(policy, config) for name, policy in policies.items()}
    held_out, answers = held_out_windows(config, space), {}

    def measured(seed: int) -> dict[str, float]:
        key, params = jax.random.key(seed), {name: made[seed].value for name, made in stages.items()}
        figures = {name: float(program(params[name.partition(",")[0]], key)) for name, program in programs.items()}
        keys = dict(zip(MODES, jax.random.split(key, len(MODES)), strict=True))
        for where, windows in held_out.items():
            asked = partial(ask, params=params["cotrained"], known=windows.known, cond={"frames": windows.frames})
            said = {mode: jax.device_get(asked(keys[mode], roles=roles).x) for mode, roles in MODES.items()}
            answers.setdefault(where, said)
            figures |= {f"{where}: {what}": value for what, value in mistakes(said, windows, space).items()}
        return figures

    found = by_seed(s.seeds, measured)
    rows = rows_of(found)
    if "cloned" in first:
        rows.append(cost_row(first, policies, held_out["fork"].frames, config))
    strips(s.picture("modes"), answers["fork"], held_out["fork"], space)
    caption = "At the fork: what is seen, what came of it, and the frames that each mode predicts."
    return Results(rows, {s.picture("modes"): caption}, "training (once for: shared), starts and noise")


def policy_of(stage: Stage, config: Any, mode: str = "policy") -> control.Policy:
    """Receding-horizon control by a network of actions, or of both modalities in one of its modes."""
    experiment, plan = stage.trained, timesteps.linspace(config.steps)
    made, how = denoiser(experiment.network, experiment.process), {"execute": config.execute}
    if isinstance(experiment.shape, Mapping):
        plan, how["modality"] = timesteps.roles(plan, MODES[mode]), "action"
    return control.receding_horizon(made, ddim(), plan, shape=experiment.shape, **how)


def driven(policy: control.Policy, config: Any) -> Callable[..., Any]:
    """The share of starts from which a policy reaches the goal, as a program of parameters and key."""
    world = tabletop.environment(WORLD, config.held_out.image_size)
    size = {"episodes": config.starts, "steps": config.horizon, "history": config.held_out.history}
    return jax.jit(lambda params, key: control.rollout(world, policy, params, key, **size).success.mean())


def held_out_windows(config: Any, space: LatentSpace) -> dict[str, Windows]:
    """Windows at the fork, of those that begin at rest so that nothing tells the side, and as many from anywhere."""
    source = build(config.held_out)
    fork = np.flatnonzero(source.fork & (source.start == 0))
    anywhere = np.random.default_rng(0).choice(len(source), len(fork), replace=False)

    def windows(chosen):
        batch = source.take(chosen)
        future, seen = batch["x0"]["future"], batch["cond"]
        known = {"action": batch["x0"]["action"], "future": np.asarray(space.encode(future))}
        after = source.observations[source.episode[chosen], source.start[chosen] + source.chunk]
        state = tabletop.state_of(jnp.asarray(seen["observation"][:, -1]))
        return Windows(seen["frames"], state, known, future[:, 0], tabletop.state_of(after).disc)

    return {"fork": windows(fork), "anywhere": windows(anywhere)}


@jax.jit
def led_to(state: tabletop.State, actions: Any) -> tabletop.State:
    """The states to which chunks of actions lead."""
    paths = jax.vmap(partial(tabletop.simulate, WORLD))(state, actions)
    return jax.tree.map(lambda path: path[:, -1], paths)


def mistakes(answers: Mapping[str, Any], windows: Windows, space: LatentSpace) -> dict[str, float]:
    """What modes err: of actions, from those that were done; of the disc, in pixels, from where it came to be; and of
    the disc in o' from where the actions lead, drawn jointly or apart.

    A disc that the decoded frame does not show counts as in the middle of the table.
    """

    def action(mode):
        return float(np.abs(answers[mode]["action"] - windows.known["action"]).mean())

    def shown(mode):
        return np.nan_to_num(tabletop.read(space.decode(answers[mode]["future"])[:, 0])["disc"])

    def pixels(a, b):
        return float(np.linalg.norm(a - b, axis=-1).mean() * windows.future.shape[-2] / 2)

    ends = {mode: led_to(windows.state, answers[mode]["action"]).disc for mode in ("policy", "joint")}
    return {
        **{mode: action(mode) for mode in ("policy", "inverse")},
        **{mode: pixels(shown(mode), windows.disc) for mode in ("video", "forward")},
        "apart": pixels(shown("video"), ends["policy"]),
        "jointly": pixels(shown("joint"), ends["joint"]),
    }


DRIVES, ACTS, DISC = "success from random starts", "mean |a - a_hat|", "distance of the disc, pixels of 16"

CLAIMS = (
    ("Videos help by 5 points", DRIVES, "cotrained", "labelled", "higher", "0.92 with, 0.86 without", 1.0, 0.05),
    ("UWM on labels alone: cloning, up to 3 points", DRIVES, "labelled", "cloned", "higher", "equal", 1.0, -0.03),
    ("Co-trained UWM: cloning, up to 3 points", DRIVES, "cotrained", "cloned", "higher", "0.92, 0.48", 1.0, -0.03),
    ("One time for both is a worse policy (r, 1)", DRIVES, "cotrained", "shared", "higher", "0.79, 0.57", 1.0, 0.0),
    ("And better where it was trained, (r, r)", DRIVES, "shared, jointly", "shared", "higher", "", 1.0, 0.0),
    ("Fork: inverse errs half of policy", ACTS, "fork: inverse", "fork: policy", "lower", "expected", 0.5, 0.0),
    ("Fork: forward is within a pixel", DISC, "fork: forward", 1.0, "lower", "expected", 1.0, 0.0),
    ("Fork: video cannot tell the side", DISC, "fork: video", 2.0, "higher", "expected", 1.0, 0.0),
    ("Fork: a and o' agree, drawn jointly", DISC, "fork: jointly", "fork: apart", "lower", "expected", 0.5, 0.0),
    ("Anywhere: inverse beats policy", ACTS, "anywhere: inverse", "anywhere: policy", "lower", "must hold", 1.0, 0.0),
    ("Anywhere: forward beats video", DISC, "anywhere: forward", "anywhere: video", "lower", "must hold", 1.0, 0.0),
)
"""Title, figure, ours, against, direction, published, factor, margin."""


def rows_of(found: Mapping[str, list[float]]) -> list[Row]:
    """The claims of which both sides were measured."""
    rows = []
    for title, figure, ours, against, direction, published, factor, margin in CLAIMS:
        other = found.get(against) if isinstance(against, str) else against
        if ours in found and other is not None:
            rows.append(Row(title, figure, found[ours], other, direction, published, factor, margin))
    return rows


def cost_row(stages: Mapping[str, Stage], drives: Mapping[str, control.Policy], frames: Any, config: Any) -> Row:
    """A policy of UWM pays for tokens that it ignores."""
    thunks = {}
    for name in ("cloned", "cotrained"):
        act = partial(jax.jit(drives[name].act), stages[name].value, drives[name].init(None, None, None))
        thunks[name] = partial(act, {"frames": frames}, jax.random.key(0))
    took = interleaved(thunks, config.rounds)
    figure = f"seconds a decision, {len(frames)} at once, by round"
    title = "A policy pays at most twice for ignored tokens"
    return Row(title, figure, took["cotrained"], took["cloned"], "lower", "no figure", factor=2.0)


def strips(path: Any, answers: Mapping[str, Any], windows: Windows, space: LatentSpace, columns: int = 10) -> None:
    """Scenes at the fork and predicted frames; the joint ones above where their actions lead."""
    state = led_to(windows.state, answers["joint"]["action"])
    rows = {"o, now": windows.frames[:, -1], "o', what came of it": windows.future}
    named = {"video": "video: o' given o", "forward": "forward: o' given o, a", "joint": "joint: o'"}
    rows |= {title: space.decode(answers[mode]["future"])[:, 0] for mode, title in named.items()}
    rows["joint: where its a leads"] = tabletop.render(state, windows.future.shape[-2], block=False)
    pictures.save_strips(path, {name: images[:columns] for name, images in rows.items()}, title="Predicted frames")
