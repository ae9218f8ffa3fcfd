"""ANT: five intervals of times as tasks of one transformer on digits, whose gradients or losses are combined."""

from typing import Any

from diffusion_jax.baselines import digit_transformer, on_garments
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

CLUSTERS = 5


def network(steps: int, objective: ConfigDict, **size: Any) -> ConfigDict:
    """A small transformer on digits without labels; as in the reference, batches of 50 and a rate that stays."""
    config = digit_transformer(max(steps, 2), **{"preset": "S/4", "depth": 2, "conditions": (), **size})
    for name in ("data", "held_out"):
        config[name] = call("data.unconditional", source=config[name])
    config.train.update({"steps": steps, "batch_size": 50})
    config.objective, config.optimizer = objective, call("training.optimizers.adamw", learning_rate=1e-3)
    return config


def tasks(around: str = "", distance: str = "log_snr", **arguments: Any) -> tuple[ConfigDict, ConfigDict]:
    """The edges of the intervals, and the loss with equally many examples of each, or an objective `around` it."""
    parts = call(f"timesteps.{distance}_distance", parts=1000)
    edges = call("timesteps.interval_clusters", distance=parts, clusters=CLUSTERS)
    loss = call("objectives.denoising", draw=call("timesteps.by_cluster", edges=edges))
    return edges, call(f"objectives.{around}", objective=loss, edges=edges, **arguments) if around else loss


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    smoke = variant == "smoke"
    steps, size = (3, {"width": 16, "depth": 1, "heads": 2, "scan": False}) if smoke else (1000, {})
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (100, 101, 102)})
    edges, equal = tasks()
    weighted = tasks("uncertainty_weighted")[1]
    bargained = {"around": "multitask", "combiner": call("objectives.bargained")}
    trained = {
        "uniform": (steps, call("objectives.denoising")),
        "equal": (steps, equal),
        "PCGrad": (steps, tasks("multitask", combiner=call("objectives.projected"))[1]),
        "Nash": (steps, tasks(**bargained)[1]),
        "UW": (steps, weighted),
        "equal, early": (steps // 3, equal),
        "UW, early": (steps // 3, weighted),
        # As many operations as PCGrad: a forward and five backward passes of two each, in place of one and one.
        "equal, longer": (steps * (1 + 2 * CLUSTERS) // 3, equal),
        "Nash, time": (steps, tasks(distance="time", **bargained)[1]),
        "Nash, affinity": (steps, tasks(**bargained)[1]),
    }
    config.arms = {name: network(*arm, **size) for name, arm in trained.items() if not smoke or name in ("equal", "UW")}
    config.update({"edges": edges, "clusters": CLUSTERS, "specialists": (4,) if smoke else (0, 4)})
    specialised = call("objectives.denoising", draw=call("timesteps.restricted", draw=call("timesteps.uniform")))
    config.update({"specialist": network(steps, specialised, **size), "ring": ring()})
    # Times, batches and examples of affinities; updates after which those of the ring are taken.
    config.update({"parts": 25, "batches": 4, "affinity_batch": 200})
    config.update({"ring_steps": (300, 1000), "ring_parts": 10, "ring_batch": 1000})
    # Samples and the steps of their runs; copies of the held-out digits; updates that are timed, in so many rounds.
    config.update({"grid": call("timesteps.linspace", steps=25), "count": 1000, "repeats": 5})
    config.update({"updates": 25, "rounds": 5})
    if smoke:
        config.update({"seed_numbers": (0,), "count": 8, "repeats": 1, "rounds": 0})
        config.update({"ring_steps": (0,), "ring_parts": 3, "ring_batch": 8})
        config.grid.steps, config.ring.model.width, config.ring.model.scan = 2, 8, False
        for one in (*config.arms.values(), config.specialist):
            one.train.steps, one.train.batch_size, one.ema = 0, 10, {}
            one.mesh = call("distributed.make_mesh", devices=1)
    return on_garments(config) if variant == "fashion" else config


def ring() -> ConfigDict:
    """A small MLP on eight Gaussians that stand in a ring."""
    config = defaults(steps=0, batch_size=256)
    config.data, config.held_out = call("data.unconditional", source=call("data.toys2d", name="gaussians")), None
    config.model, config.process = call("models.mlp", width=64, depth=2), call("processes.vp_linear")
    config.objective = call("objectives.denoising")
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-3)
    return config


def paper() -> ConfigDict:
    """DiT-L/2 on latents of ImageNet of 256 pixels: AdamW at 1e-4, batches of 50, 800,000 updates, EMA 0.9999, weights
    by uncertainty that learn at 0.025."""
    config = network(800_000, tasks("uncertainty_weighted")[1])
    conditions = (call("models.label", num_classes=1000),)
    config.model = call("models.dit", preset="L/2", conditions=conditions, learn_sigma=True)
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-4)
    config.ema = {"average": call("training.ema.fixed", decay=0.9999)}
    config.inputs = {"x0": (32, 32, 4), "cond": {"label": ("int",)}}
    return config
