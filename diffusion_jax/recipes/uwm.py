"""UWM (Zhu et al. 2025): actions and the future frame are two processes with a time each, and their roles are the task.

    policy   p(a | o)        actions run along the grid, the frame is ignored (t = 1)
    video    p(o' | o)       the frame runs, the actions are ignored
    forward  p(o' | o, a)    the frame runs, the actions are given (t = 0)
    inverse  p(a | o, o')    the actions run, the frame is given
    joint    p(a, o' | o)    both run

A disc passes an obstacle on either side; what drives it sees pictures only. The arms have one trunk, encoder of frames,
optimiser and number of updates: a policy without tokens of the future ("cloned"), UWM on the same labelled trajectories
("labelled"), UWM on these and many more without actions, whose actions stand at t = 1 ("cotrained"), and the same with
one time for both modalities ("shared"), which never sees a labelled frame at t = 1 beside cleaner actions; labelled and
co-trained once more with few labels. Frames are principal components in place of an autoencoder's latents.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import control, data, metrics, pictures, timesteps
from diffusion_jax.config import build, to_json
from diffusion_jax.data import tabletop
from diffusion_jax.denoisers import denoiser
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.frame import seeds, trained
from diffusion_jax.recipes.parts.latents import LatentSpace, principal_space
from diffusion_jax.recipes.report import Claim, Results, claim
from diffusion_jax.sampling import sample
from diffusion_jax.solvers import ddim
from diffusion_jax.typing import Keys

ROLES = {
    "policy": {"action": "generate", "future": "ignored"},
    "video": {"action": "ignored", "future": "generate"},
    "forward": {"action": "given", "future": "generate"},
    "inverse": {"action": "generate", "future": "given"},
    "joint": {"action": "generate", "future": "generate"},
}

NOTES = (
    "the number of steps, and batches twice as large where there are videos, were set after seeing an earlier "
    "report of the same seeds."
)


class TrainedModel(NamedTuple):
    """ask: `(params, plan, x, cond) -> x` at the end of the run. success: `(params, plan, key) -> share of starts`.

    plan: of a policy.
    """

    experiment: Experiment
    params: Any
    ask: Callable[..., Any]
    success: Callable[..., Any]
    plan: Any


class Windows(NamedTuple):
    """Held-out windows: what is seen, the true state there, what was done and came of it, and where the disc was then.

    known: actions and latents of the future frame. future: the frame itself.
    """

    frames: Any
    state: tabletop.State
    known: Mapping[str, Any]
    future: Any
    disc: Any


def run(config: ConfigDict, workdir: Path) -> Results:
    """Trains the arms, drives with each, and asks the co-trained network in all its modes."""
    space = latent_tokens(config)
    plans = {mode: timesteps.roles(timesteps.linspace(config.solver_steps), roles) for mode, roles in ROLES.items()}
    arms, held_out = prepared_arms(config, space, plans["policy"]), held_out_windows(config, space)
    success, errors = {name: [] for name in arms}, {name: [] for name in held_out}
    if "shared" in arms:
        success["shared, jointly"] = []
    for seed in seeds(config):
        key = jax.random.key(seed)
        for name, arm in arms.items():
            success[name].append(float(arm.success(arm.params, arm.plan, key)))
        if "shared" in arms:
            jointly = arms["shared"].success(arms["shared"].params, plans["joint"], key)
            success["shared, jointly"].append(float(jointly))
        for name, windows in held_out.items():
            answers = modes(arms["cotrained"], plans, windows, key)
            errors[name].append(mistakes(answers, windows, space))
            if seed == config.seed and name == "fork":
                strips(workdir / "modes.png", answers, windows, space)
    # For each comparison the baseline's values and ours, one a seed.
    fork, anywhere = (
        {what: np.transpose([one[what] for one in errors[name]]).tolist() for what in errors[name][0]}
        for name in held_out
    )
    programs = float(arms["cotrained"].ask._cache_size())
    compared = [arms.get(name) for name in ("cloned", "cotrained")]
    costs = [one and 1e3 * latency(one, held_out["fork"].frames) for one in compared]
    return Results(claims(success, fork, anywhere, programs, costs), [workdir / "modes.png"], NOTES)


def latent_tokens(config: ConfigDict) -> LatentSpace:
    """Pictures `[B, H, W, C]` as tokens `[B, N, K]`: their leading principal components, N times K of them."""
    source, count = data.Pictures(build(config.arms.cotrained.data)), config.latents.pictures
    chosen = np.random.default_rng(0).choice(len(source), count, replace=False)
    return principal_space(source.take(chosen)["x0"], config.latents.components, config.latents.tokens)


def prepared_arms(config: ConfigDict, space: LatentSpace, plan: Any) -> dict[str, TrainedModel]:
    """The arms, trained, futures in the latent space. Arms on the same data share it, those of one kind programs."""
    sources, arms = {}, {}
    programs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
    for name, entry in config.arms.items():
        entry = ConfigDict({**entry.to_dict(), "seed": config.seed})
        experiment, windows, model = prepare(entry), to_json(entry.data), to_json(entry.model)
        if windows not in sources:
            sources[windows] = experiment.source.encoded(space.encode) if entry.data.future else experiment.source
        experiment = experiment._replace(source=sources[windows], shape=sources[windows].shape)
        if model not in programs:
            ask = asker(experiment)
            programs[model] = ask, driver(config, experiment)
        params = trained(experiment, "uwm", given=config.latents.to_dict())
        arms[name] = TrainedModel(experiment, params, *programs[model], plan if entry.data.future else plan["action"])
    return arms


def asker(experiment: Experiment) -> Callable[..., Any]:
    """One compiled program for every mode: roles are arrays."""
    made = denoiser(experiment.network, experiment.process)

    def ask(params, plan, x, cond):
        return sample(jax.random.key(0), made, params, ddim(), plan, x_init=x, cond=cond).x

    return jax.jit(ask)


def driver(config: ConfigDict, experiment: Experiment) -> Callable[..., Any]:
    """Receding-horizon control of all environments in one program; what is ignored is drawn once a decision."""
    world = tabletop.environment(tabletop.Tabletop("reach"), config.held_out.image_size)
    made, shape = denoiser(experiment.network, experiment.process), experiment.shape
    modality = "action" if isinstance(shape, Mapping) else None

    def success(params, plan, key):
        policy = control.receding_horizon(made, ddim(), plan, shape=shape, execute=config.execute, modality=modality)
        run = control.rollout(
            world, policy, params, key, episodes=config.starts, steps=config.horizon, history=config.held_out.history
        )
        return run.success.mean()

    return jax.jit(success)


def noise(experiment: Experiment, keys: Keys) -> Any:
    """x at t = 1, one for each key."""
    shape, size = experiment.shape, len(keys)
    whole = {name: (size, *one) for name, one in shape.items()} if isinstance(shape, Mapping) else (size, *shape)
    return experiment.process.prior(keys, whole)


def held_out_windows(config: ConfigDict, space: LatentSpace) -> dict[str, Windows]:
    """Windows at the fork, of those that begin at rest so that nothing tells the side, and as many from anywhere."""
    source = build(config.held_out)
    fork = np.flatnonzero(source.fork & (source.start == 0))
    anywhere = np.random.default_rng(0).choice(len(source), len(fork), replace=False)
    found = {}
    for name, chosen in (("fork", fork), ("anywhere", anywhere)):
        batch = source.take(chosen)
        future = batch["x0"]["future"][:, 0]
        known = {"action": jnp.asarray(batch["x0"]["action"]), "future": space.encode(future)[:, None]}
        state = tabletop.state_of(jnp.asarray(batch["cond"]["observation"][:, -1]))
        after = source.observations[source.episode[chosen], source.start[chosen] + source.chunk]
        found[name] = Windows(batch["cond"]["frames"], state, known, future, tabletop.state_of(after).disc)
    return found


def modes(arm: TrainedModel, plans: Mapping[str, Any], windows: Windows, key: Keys) -> dict[str, Any]:
    """What the network says in each mode, each from noise of its own."""
    process, cond = arm.experiment.process, {"frames": windows.frames}
    keys = dict(zip(plans, jax.random.split(key, len(plans)), strict=True))
    starts = {mode: timesteps.noised_start(keys[mode], process, plan, windows.known) for mode, plan in plans.items()}
    return {mode: arm.ask(arm.params, plan, starts[mode], cond) for mode, plan in plans.items()}


@jax.jit
def led_to(state: tabletop.State, actions: Any) -> tabletop.State:
    """The states to which chunks of actions lead."""
    paths = jax.vmap(partial(tabletop.simulate, tabletop.Tabletop("reach")))(state, actions)
    return jax.tree.map(lambda path: path[:, -1], paths)


def mistakes(answers: Mapping[str, Any], windows: Windows, space: LatentSpace) -> dict[str, tuple[float, float]]:
    """What each mode errs, behind what the one errs that ignores what it is given.

    inverse: of actions, from those that were done. forward: of the disc, from where it came to be. joint: of the disc
    in o' from where the actions lead (behind it: of a video and a policy). Pixels; a disc that the decoded frame does
    not show counts as in the middle of the table.
    """
    pixel = 2 / windows.future.shape[-2]

    def action(mode):
        return float(np.abs(answers[mode]["action"] - windows.known["action"]).mean())

    def shown(mode):
        return np.nan_to_num(tabletop.read(space.decode(answers[mode]["future"][:, 0]))["disc"])

    def pixels(a, b):
        return float(np.linalg.norm(a - b, axis=-1).mean() / pixel)

    return {
        "inverse": (action("policy"), action("inverse")),
        "forward": (pixels(shown("video"), windows.disc), pixels(shown("forward"), windows.disc)),
        "joint": (
            pixels(shown("video"), led_to(windows.state, answers["policy"]["action"]).disc),
            pixels(shown("joint"), led_to(windows.state, answers["joint"]["action"]).disc),
        ),
    }


def latency(arm: TrainedModel, frames: Any) -> float:
    """Seconds that a decision takes for as many environments as there are frames."""
    x = noise(arm.experiment, jax.random.split(jax.random.key(0), len(frames)))
    cost = metrics.sampling_cost(lambda: arm.ask(arm.params, arm.plan, x, {"frames": frames}), len(frames))
    return cost.seconds_per_sample * len(frames)


def strips(path: Path, answers: Mapping[str, Any], windows: Windows, space: LatentSpace, columns: int = 10) -> None:
    """Scenes at the fork, what came of them, and predicted frames; the joint ones above where their actions lead."""
    state = led_to(windows.state, answers["joint"]["action"])
    rows = {
        "o, now": windows.frames[:, -1],
        "o', what came of it": windows.future,
        "video: o' given o": space.decode(answers["video"]["future"][:, 0]),
        "forward: o' given o, a": space.decode(answers["forward"]["future"][:, 0]),
        "joint: o'": space.decode(answers["joint"]["future"][:, 0]),
        "joint: where its a leads": tabletop.render(state, windows.future.shape[-2], block=False),
    }
    pictures.save_strips(path, {name: images[:columns] for name, images in rows.items()}, zoom=4)


def claims(success, fork, anywhere, programs, costs) -> list[Claim]:
    """The comparisons: of arms, where both were trained, of modes at the fork, and what must hold anywhere."""
    share, off, disc = "success of 200 starts, sampling seeds", "mean |a - a_hat|", "disc off, pixels of 16"
    arms = ("cloned", "labelled", "cotrained", "shared", "shared, jointly")
    cloned, labelled, cotrained, twin, jointly = (success.get(name) for name in arms)
    few = success.get("labelled_few"), success.get("cotrained_few")
    bowls, libero, tracking = (
        "0.92 with 2000 videos, 0.86 without",
        "PAD 0.57, UWM 0.79 (LIBERO)",
        "tracking 0.65, 0.47",
    )
    more, less, none = "higher", "lower", "no figure"
    split = "probably that one small network has to learn videos besides, in as many updates; not tested apart"
    short = "a hundred labelled trajectories and minutes of training are probably too few"
    helped, half = {"margin": 0.05, "reason": split}, {"factor": 0.5, "reason": short}
    near = {"margin": -0.03, "reason": short}
    pairs = {
        "factor": 0.5,
        "reason": "predicted frames are still blurred after minutes of training; longer runs were not compared",
    }
    rows = [
        ("videos help by 5 points, 20 labelled trajectories", share, *few, more, bowls, helped),
        ("videos help by 5 points, 100 labelled trajectories", share, labelled, cotrained, more, bowls, helped),
        ("UWM on labels alone: cloning - 3 points", share, cloned, labelled, more, "about equal", near),
        ("a shared time is worse as a policy, (r, 1)", share, twin, cotrained, more, libero, {}),
        ("and better at the times it was trained at, (r, r)", share, twin, jointly, more, none, {}),
        ("fork: inverse dynamics errs half as much as the policy", off, *fork["inverse"], less, tracking, half),
        ("fork: forward dynamics is within a pixel", disc, 1.0, fork["forward"][1], less, none, {"reason": short}),
        ("fork: video is more than two pixels off", disc, 2.0, fork["forward"][0], more, none, {}),
        ("fork: a and o' agree when drawn jointly", disc, *fork["joint"], less, none, pairs),
        ("anywhere: inverse dynamics no worse than the policy", off, *anywhere["inverse"], less, "must hold", {}),
        ("anywhere: forward dynamics no worse than video", disc, *anywhere["forward"], less, "must hold", {}),
        ("one program serves all modes", "compiled programs", 1.0, programs, "equal", "roles are arrays", {}),
        ("a policy pays for ignored tokens, at most 3 times", "ms a decision", *costs, less, none, {"factor": 3.0}),
    ]
    return [claim(*row, **options) for *row, options in rows if row[2] is not None and row[3] is not None]
