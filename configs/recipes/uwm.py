"""UWM on a tabletop: actions and the future frame with a time each, pretrained on videos without actions.

    python -m diffusion_jax.recipes uwm

Six networks of 2000 steps each, with as many labelled windows in each: a quarter of an hour on one core.
"""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

LABELLED, FEW, FREE = 100, 20, 1000
"""Trajectories with actions, few of them in the low-label regime, and without: half of the published 2000 videos."""

SIZE, CHUNK = 16, 10
"""Pixels of a picture's side, and actions of a chunk."""


def get_config(variant: str = "small") -> ConfigDict:
    smoke = variant == "smoke"
    # Seeds of sampling and of starts; networks are trained once, with the first.
    config = ConfigDict({"seed": 0, "seeds": 1 if smoke else 3})
    config.latents = {"components": 16 if smoke else 128, "tokens": 4, "pictures": 256 if smoke else 4096}
    config.solver_steps = 2 if smoke else 10
    grid = call("timesteps.linspace", steps=config.solver_steps)
    shared = call("timesteps.on_grid", grid=grid, last=True)
    own = {"action": _often_at_the_ends(shared, 0.2), "future": _often_at_the_ends(shared, 0.4)}
    labelled, both = _windows(smoke), _windows(smoke, free=True)
    config.arms = (
        {"cotrained": _arm(smoke, both, own)}
        if smoke
        else {
            "cloned": _arm(smoke, _windows(smoke, future=0), call("timesteps.on_grid", grid=grid)),
            "labelled": _arm(smoke, labelled, own),
            "cotrained": _arm(smoke, both, own),
            "shared": _arm(smoke, both, shared),
            "labelled_few": _arm(smoke, _windows(smoke, labelled=FEW), own),
            "cotrained_few": _arm(smoke, _windows(smoke, labelled=FEW, free=True), own),
        }
    )
    if variant == "paper":
        config.arms.cotrained = _published(both)
    config.held_out = _windows(smoke, split="test", episodes=12 if smoke else 300)
    config.execute = 8
    config.horizon = 16 if smoke else 48
    config.starts = 4 if smoke else 200
    return config


def _often_at_the_ends(draw, ignored):
    """Times of a run, of which more than their share have a modality given or ignored: a short training asks for it."""
    given = call("timesteps.pinned", draw=draw, value=0.0, probability=0.15, weight=1.0)
    return call("timesteps.pinned", draw=given, value=1.0, probability=ignored, weight=1.0)


def _windows(smoke, split="train", future=1, labelled=LABELLED, free=False, episodes=None):
    labelled, others = (4, 8) if smoke else (labelled, FREE)
    known = {"labelled": episodes or labelled} if future else {}
    return call(
        "data.tabletop_demonstrations",
        split=split,
        episodes=episodes or labelled + others * free,
        task="reach",
        chunk=CHUNK,
        future=future,
        image_size=8 if smoke else SIZE,
        noise=0.1,
        share=0.5 if free else None,
        **known,
    )


def _arm(smoke, windows, draw):
    """One network; the arms share trunk, encoder of frames, optimiser and number of updates."""
    joint = windows.future > 0
    # Videos come on top: with and without them an update sees as many labelled windows.
    batch_size = (8 if smoke else 64) * (2 if windows.get("share") else 1)
    config = defaults(steps=3 if smoke else 2000, batch_size=batch_size)
    config.data, config.held_out = windows, None
    size = {"width": 16, "depth": 1, "heads": 2} if smoke else {"width": 64, "depth": 3, "heads": 4}
    trunk = call(
        "models.joint_transformer",
        modalities={"action": (2,), "future": (1, 1)} if joint else (2,),
        preset="uwm",
        registers=2,
        conditions=(call("models.pooled"),),
        **size,
    )
    config.model = call("models.watching", network=trunk)
    # Of 128 components most are noise at most times: the network tells what is clean.
    flow = call("processes.rectified_flow", prediction="x0")
    config.process = call("processes.JointProcess", processes={"action": flow, "future": flow}) if joint else flow
    config.objective = call("objectives.denoising", draw=draw)
    config.optimizer = call("training.optimizers.sgd") if smoke else _optimizer(config.train.steps, 3e-3)
    config.ema = {} if smoke else {"average": call("training.ema.power", sigma_rel=0.1)}
    return config


def _optimizer(steps, peak):
    rate = call("training.optimizers.cosine", peak=peak, total_steps=steps, warmup_steps=min(100, steps // 3))
    return call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)


def _published(windows):
    """Zhu et al. 2025: 100k steps on four A100, latents of SDXL; pooled are features of a ResNet-18 of two frames."""
    config = defaults(steps=100_000, batch_size=144)
    config.data, config.held_out = windows, None
    config.data.update(chunk=16, future=2)
    config.model = call(
        "models.joint_transformer",
        modalities={"action": (1,), "future": (2, 4, 4)},
        preset="uwm",
        conditions=(call("models.pooled"),),
    )
    noise = call("processes.vp_cosine", num_steps=100, prediction="epsilon")
    config.process = call("processes.JointProcess", processes={"action": noise, "future": noise})
    index = call("timesteps.on_grid", grid=call("timesteps.linspace", steps=100))
    config.objective = call("objectives.denoising", draw={"action": index, "future": index}, missing_weight=1.0)
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-4, weight_decay=1e-6)
    config.sampling.update(
        solver=call("solvers.ddim"),
        grid=call("timesteps.linspace", steps=10, num_train_steps=100),
        transformations={"clipped": call("denoisers.clipped")},
    )
    return config
