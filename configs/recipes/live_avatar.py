"""Live Avatar: a talking face is streamed by four noise levels at once, each with a history of its own."""

from diffusion_jax.baselines import TALKING_FRAMES, talking_transformer
from diffusion_jax.config import ConfigDict, call

BLOCK, EVERY, RATES = 2, 3, {"student": 3e-5, "fake": 1e-4}


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12, 13, 14), "tuned_on": (0, 1, 2, 100, 101, 102)})
    smoke = variant == "smoke"
    fields: dict = {"width": 16, "depth": 1, "heads": 2} if smoke else {}
    if smoke:
        source = call("data.talking_faces", frames=3 * TALKING_FRAMES, length=16, size=16)
        fields["data"] = {"source": source, "components": 8, "first": 16}
    teacher, forced, student = (0, 0, 0) if smoke else (1050, 360, 150)
    by_block = call("timesteps.blockwise", draw=call("timesteps.uniform"), block=BLOCK)
    config.teacher = talking_transformer(teacher, **fields)
    config.forcing = talking_transformer(forced, BLOCK, rate=1e-3, draw=by_block, **fields)
    config.student = talking_transformer(student, BLOCK, draw=by_block, **fields)
    parts = {name: talking_transformer(student // EVERY + 1 if name == "student" else student, rate=rate).optimizer
             for name, rate in RATES.items()}  # fmt: skip
    config.student.optimizer = call("training.optimizers.alternating", parts=parts, every={"student": EVERY})
    # Distances of the sink in training, and in a stream; the time of the baseline's history.
    config.student.update({"every": EVERY, "sinks": (float(BLOCK), float(TALKING_FRAMES))})
    levels = call("timesteps.linspace", steps=2 if smoke else 4)
    config.student.grid = call("timesteps.shift", grid=levels, shift=3.0)
    config.update({"sink_at": 2.0 * BLOCK, "fixed": 0.5, "frames": TALKING_FRAMES, "arms": ARMS})
    config.teacher_grid = call("timesteps.linspace", steps=16 if smoke else 32)
    # Streams of a seed, their length in training clips, windows in which they are measured; blocks that are in flight
    # and frames of the stream that is timed.
    config.update({"streams": 8, "length": 100, "windows": 8, "window": 32, "flight": 16, "timed": 200})
    return shortened(config) if smoke else config


ARMS = (
    *("ours", "teacher, chunks", "teacher, few steps", "not distilled", "trained clean", "clean cache", "fixed noise"),
    *("sink falls back", "picture as sink", "lit", "lit, picture as sink"),
)


def shortened(config: ConfigDict) -> ConfigDict:
    config.update({"seed_numbers": (0,), "streams": 1, "length": 4, "windows": 2, "window": 8, "timed": 0})
    config.arms = ("ours",)
    for part in (config.teacher, config.forcing, config.student):
        part.mesh, part.ema = call("distributed.make_mesh", devices=1), {}
    return config


def paper() -> ConfigDict:
    """Wan-S2V 14B on 84 frames of 720 x 400, which are 21 latents of 50 x 90 x 16 in blocks of 3; four steps at shift
    3, LoRA of rank 128, 25,000 updates of diffusion forcing and 500 of distribution matching, of five steps each."""
    size = {"width": 5120, "depth": 40, "heads": 40, "mlp_ratio": 2.7, "dtype": "bfloat16", "qk_norm": True}
    told = (call("models.reference", at=21.0), call("models.audio"), call("models.context"))
    causal = {"attention": "joint", "temporal_positions": "rotary", "block": 3, "window": 3}
    config = ConfigDict({"lora": call("adapters.lora", rank=128, alpha=64)})
    config.model = call("models.video_dit", preset="S/2", **size, **causal, conditions=told)
    cond = {"audio": (21, 1024), "reference": (50, 90, 16), "context": (512, 4096)}
    config.inputs = {"x0": (21, 50, 90, 16), "cond": cond}
    config.grid = call("timesteps.shift", grid=call("timesteps.linspace", steps=4), shift=3.0)
    return config
