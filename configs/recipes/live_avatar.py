"""Live Avatar: a talking face is streamed by four noise levels at once, each with a history of its own."""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

BLOCK, FRAMES, EVERY = 2, 8, 3


def network(block=0, window=0, frames=FRAMES, others=(), **fields):
    """The transformer of all stages; the picture stands behind the clip, so that it is ahead of every block."""
    conditions = (call("models.reference", at=float(frames)), call("models.audio"), *others)
    whole = {"preset": "S/1", "width": 64, "depth": 4, "heads": 4, "attention": "joint", "qk_norm": True, **fields}
    return call(
        "models.video_dit", **whole, temporal_positions="rotary", conditions=conditions, block=block, window=window
    )


def adamw(rate, steps):
    schedule = call("training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=min(50, steps // 4))
    return call("training.optimizers.adamw", learning_rate=schedule)


def stage(steps, optimizer, draw, block=0, smoke=False):
    """What trains one of the networks; block 0 is bidirectional."""
    small = {"width": 16, "depth": 1, "heads": 2} if smoke else {}
    config = defaults(steps=steps, batch_size=16 if smoke else 64)
    pictures = {"length": 16, "size": 16} if smoke else {"length": 3000}
    source = call("data.talking_faces", frames=3 * FRAMES, **{"size": 24, **pictures})
    config.data = call(
        "data.principal_latents", source=source, components=8 if smoke else 48, first=16 if smoke else 200
    )
    config.held_out, config.frames = None, FRAMES
    config.model = network(block, FRAMES // BLOCK - 1 if block else 0, **small)
    config.process = call("processes.rectified_flow")
    config.objective = call("objectives.denoising", draw=draw, t_shape=2 if block else 1)
    config.optimizer = optimizer
    config.ema = {} if smoke else {"average": call("training.ema.power", sigma_rel=0.05)}
    config.mesh = call("distributed.make_mesh", devices=1)
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    smoke = variant == "smoke"
    teacher, forced, student = (0, 0, 0) if smoke else (1050, 360, 150)
    config = ConfigDict({"seed_numbers": (0,) if smoke else (10, 11, 12, 13, 14), "tuned_on": (0, 1, 2, 100, 101)})
    by_block = call("timesteps.blockwise", draw=call("timesteps.uniform"), block=BLOCK)
    logit, rates = call("timesteps.logit_normal"), {"student": 3e-5, "fake": 1e-4}
    updates = {"student": student // EVERY + 1, "fake": max(student, 1)}
    parts = {name: adamw(rate, updates[name]) for name, rate in rates.items()}
    turns = call("training.optimizers.alternating", parts=parts, every={"student": EVERY})
    config.teacher = stage(teacher, adamw(3e-3, max(teacher, 1)), logit, smoke=smoke)
    config.forcing = stage(forced, adamw(1e-3, max(forced, 1)), by_block, BLOCK, smoke)
    config.student = stage(student, turns, by_block, BLOCK, smoke)
    levels = call("timesteps.linspace", steps=2 if smoke else 4)
    # Distances of the sink in training, and in a stream; the time of the baseline's history.
    config.student.update({"every": EVERY, "sinks": (float(BLOCK), float(FRAMES))})
    config.student.grid = call("timesteps.shift", grid=levels, shift=3.0)
    config.update({"sink_at": 2.0 * BLOCK, "fixed": 0.5, "frames": FRAMES})
    config.teacher_grid = call("timesteps.linspace", steps=16 if smoke else 32)
    # Streams of a seed, their length in training clips, windows in which they are measured; blocks that are in flight
    # and frames of the stream that is timed.
    config.update({"streams": 1, "length": 4, "windows": 2, "window": 8, "flight": 0, "timed": 0} if smoke else
                  {"streams": 8, "length": 100, "windows": 8, "window": 32, "flight": 16, "timed": 200})  # fmt: skip
    config.arms = ("ours",) if smoke else ARMS
    return config


ARMS = (
    *("ours", "teacher, chunks", "teacher, few steps", "not distilled", "trained clean", "clean cache", "fixed noise"),
    *("sink falls back", "picture as sink", "lit", "lit, picture as sink"),
)


def paper() -> ConfigDict:
    """Wan-S2V 14B on 84 frames of 720 x 400, which are 21 latents of 50 x 90 x 16 in blocks of 3; four steps at shift
    3, LoRA of rank 128, 25,000 updates of diffusion forcing and 500 of distribution matching, of five steps each."""
    size = {"width": 5120, "depth": 40, "heads": 40, "mlp_ratio": 2.7, "preset": "S/2", "remat": "full"}
    config = ConfigDict({"block": 3})
    config.model = network(3, 3, 21, (call("models.context"),), dtype="bfloat16", **size)
    latent = (50, 90, 16)
    told = {"audio": (21, 1024), "reference": latent, "context": (512, 4096)}
    config.inputs = {"x0": (21, *latent), "cond": told}
    config.grid = call("timesteps.shift", grid=call("timesteps.linspace", steps=4), shift=3.0)
    config.lora = call("adapters.lora", rank=128, alpha=64)
    return config
