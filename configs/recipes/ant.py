"""ANT: five intervals of times as tasks of one transformer on digits, whose gradients or losses are combined."""

from typing import Any

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

CLUSTERS = 5
DISTANCES = {
    "log-SNR": call("timesteps.log_snr_distance", parts=1000),
    "time": call("timesteps.time_distance", parts=1000),
}


def network(steps: int, objective: ConfigDict, **size: Any) -> ConfigDict:
    """A small transformer on digits without labels; as in the reference, batches of 50 and a rate that stays."""
    config = defaults(steps=steps, batch_size=50)
    for name, split in (("data", "train"), ("held_out", "test")):
        config[name] = call("data.unconditional", source=call("data.digits", split=split))
    config.model = call("models.dit", **{"preset": "S/4", "width": 64, "depth": 2, "heads": 4, "qk_norm": True, **size})
    config.process, config.objective = call("processes.vp_linear"), objective
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-3)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    return config


def tasks(distance: str = "log-SNR") -> tuple[ConfigDict, ConfigDict]:
    """The edges of the intervals, and the loss whose batches have equally many examples of each."""
    edges = call("timesteps.interval_clusters", distance=DISTANCES[distance], clusters=CLUSTERS)
    return edges, call("objectives.denoising", draw=call("timesteps.by_cluster", edges=edges))


def combined(combiner: str, distance: str = "log-SNR") -> ConfigDict:
    edges, loss = tasks(distance)
    return call("objectives.multitask", objective=loss, edges=edges, combiner=call(f"objectives.{combiner}"))


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    smoke = variant == "smoke"
    steps, size = (3, {"width": 16, "depth": 1, "heads": 2, "scan": False}) if smoke else (1000, {})
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (100, 101, 102)})
    edges, loss = tasks()
    weighted = call("objectives.uncertainty_weighted", objective=loss, edges=edges)
    arms = {
        "uniform": network(steps, call("objectives.denoising"), **size),
        "equal": network(steps, loss, **size),
        "PCGrad": network(steps, combined("projected"), **size),
        "Nash": network(steps, combined("bargained"), **size),
        "UW": network(steps, weighted, **size),
        "equal, early": network(steps // 3, loss, **size),
        "UW, early": network(steps // 3, weighted, **size),
        # As many operations as PCGrad: a forward and five backward passes of two each, in place of one and one.
        "equal, longer": network(steps * (1 + 2 * CLUSTERS) // 3, loss, **size),
        "Nash, time": network(steps, combined("bargained", "time"), **size),
        "Nash, affinity": network(steps, combined("bargained"), **size),
    }
    config.update({"arms": arms, "edges": edges, "clusters": CLUSTERS, "specialists": (0, 4)})
    config.specialist = network(
        steps, call("objectives.denoising", draw=call("timesteps.restricted", draw=call("timesteps.uniform"))), **size
    )
    # Times, batches and examples of affinities; updates after which those of the ring are taken.
    config.update({"parts": 25, "batches": 4, "affinity_batch": 200})
    config.update({"ring_steps": (300, 1000), "ring_parts": 10, "ring_batch": 1000})
    # Samples and the steps of their runs; copies of the held-out digits; updates that are timed, in so many rounds.
    config.update({"grid": call("timesteps.linspace", steps=25), "count": 1000, "repeats": 5})
    config.update({"ring": ring(0), "updates": 25, "rounds": 5})
    if smoke:
        config.update({"seed_numbers": (0,), "specialists": (4,), "count": 8, "repeats": 1, "rounds": 0})
        config.update({"ring_steps": (0,), "ring_parts": 3, "ring_batch": 8})
        config.arms = {name: arms[name] for name in ("equal", "UW")}
        config.grid.steps, config.ring.model.width, config.ring.model.scan = 2, 8, False
        for one in (*config.arms.values(), config.specialist):
            one.train.steps, one.train.batch_size, one.ema = 0, 10, {}
            one.mesh = call("distributed.make_mesh", devices=1)
    return config


def ring(steps: int) -> ConfigDict:
    """A small MLP on eight Gaussians that stand in a ring."""
    config = defaults(steps=steps, batch_size=256)
    config.data, config.held_out = call("data.unconditional", source=call("data.toys2d", name="gaussians")), None
    config.model, config.process = call("models.mlp", width=64, depth=2), call("processes.vp_linear")
    config.objective = call("objectives.denoising")
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-3)
    return config


def paper() -> ConfigDict:
    """DiT-L/2 on latents of ImageNet of 256 pixels: AdamW at 1e-4, batches of 50, 800,000 updates, EMA 0.9999, weights
    by uncertainty that learn at 0.025."""
    edges, loss = tasks()
    config = network(800_000, call("objectives.uncertainty_weighted", objective=loss, edges=edges))
    conditions = (call("models.label", num_classes=1000),)
    config.model = call("models.dit", preset="L/2", conditions=conditions, learn_sigma=True)
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-4)
    config.ema = {"average": call("training.ema.fixed", decay=0.9999)}
    config.inputs = {"x0": (32, 32, 4), "cond": {"label": ("int",)}}
    return config
