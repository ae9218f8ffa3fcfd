"""Live Avatar: a talking face is streamed by four noise levels at once, each with a history of its own.

    python -m diffusion_jax.recipes live_avatar

Four trainings, about seven minutes on one core, then two for the streams.
"""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.errors import unknown
from diffusion_jax.experiment import defaults

FRAMES, BLOCK, LEVELS, EVERY = 8, 2, 4, 3
VARIANTS = ("full", "smoke", "paper")


def network(width, depth, heads, frames=FRAMES, others=(), **fields):
    """The transformer of all stages; the picture stands behind the clip, so that it is ahead of every block."""
    return {
        "preset": "S/1",
        "width": width,
        "depth": depth,
        "heads": heads,
        "attention": "joint",
        "temporal_positions": "rotary",
        "conditions": (call("models.reference", at=float(frames)), call("models.audio"), *others),
        "qk_norm": True,
        **fields,
    }


def adamw(rate, steps):
    schedule = call("training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=min(50, steps // 4))
    return call("training.optimizers.adamw", learning_rate=schedule)


def stage(steps, batch_size, fields, optimizer, objective, block=0, window=0):
    """What trains one of the networks; block 0 is bidirectional."""
    config = defaults(steps=steps, batch_size=batch_size)
    config.data = call("data.talking_faces", length=64, frames=3 * FRAMES)
    config.held_out = None
    config.model = call("models.video_dit", **fields, block=block, window=window)
    config.process = call("processes.rectified_flow")
    config.objective = objective
    config.optimizer = optimizer
    config.ema.average = call("training.ema.power", sigma_rel=0.05)
    return config


def forcing(block):
    """Diffusion forcing: every block of frames has a level of its own."""
    levels = call("timesteps.blockwise", draw=call("timesteps.uniform"), block=block)
    return call("objectives.denoising", t_shape=2, draw=levels)


def in_turns(student, fake, every):
    return call("training.optimizers.alternating", parts={"student": student, "fake": fake}, every={"student": every})


def get_config(variant: str = "full") -> ConfigDict:
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)
    if variant == "paper":
        return paper()
    smoke = variant == "smoke"
    fields = network(16, 1, 2) if smoke else network(64, 4, 4)
    size, window = 16 if smoke else 64, FRAMES // BLOCK - 1
    teacher, forced, student = (6, 6, 6) if smoke else (1050, 360, 240)
    plain = call("objectives.denoising", draw=call("timesteps.logit_normal"))
    turns = in_turns(adamw(3e-5, student // EVERY + 1), adamw(1e-4, student), EVERY)
    config = ConfigDict({"seed": 0, "seeds": 1 if smoke else 3})
    pictures = {"length": 16, "size": 16} if smoke else {"length": 3000}
    config.clips = call("data.talking_faces", frames=3 * FRAMES, **pictures)
    config.update({"known": 16 if smoke else 600, "components": 8 if smoke else 48, "frames": FRAMES})
    config.teacher = stage(teacher, size, fields, adamw(3e-3, teacher), plain)
    config.forcing = stage(forced, size, fields, adamw(1e-3, forced), forcing(BLOCK), BLOCK, window)
    config.student = stage(student, size, fields, turns, plain, BLOCK, window)
    config.every = EVERY
    levels = call("timesteps.linspace", steps=2 if smoke else LEVELS)
    config.grid = call("timesteps.shift", grid=levels, shift=3.0)
    config.teacher_grid = call("timesteps.linspace", steps=8 if smoke else 32)
    # Frames that the sink is ahead of a block, in a stream and in training; the time of the baseline's history.
    config.update({"sink_at": 2.0 * BLOCK, "fixed": 0.5, "sinks": (float(BLOCK), float(FRAMES))})
    # Streams of a seed, their length in training clips, frames of the one that is timed, blocks on several devices, and
    # windows in which streams are measured.
    arms = ("teacher, chunks", "clean cache", "fixed noise", "sink falls back", "picture as sink", "not distilled")
    config.arms = () if smoke else arms
    # Whether blocks are also made on several devices, as many as there are levels and one to decode, and
    # whether streams are timed.
    config.on_devices = not smoke
    config.clock = not smoke
    if smoke:
        # Diffusion forcing alone is trained; its teacher is fresh, and the student what it begins with.
        config.teacher.train.steps = config.student.train.steps = 0
        config.forcing.optimizer = call("training.optimizers.sgd")
        for part in (config.teacher, config.forcing, config.student):
            part.mesh, part.ema = call("distributed.make_mesh", devices=1), {}
    config.update({"streams": 1, "length": 4, "spoken": 32, "flight": 4, "windows": 2, "window": 8} if smoke else
                  {"streams": 8, "length": 100, "spoken": 200, "flight": 16, "windows": 8, "window": 32})  # fmt: skip
    return config


def paper() -> ConfigDict:
    """What is published: Wan-S2V 14B on 84 frames of 720 x 400, which are 21 latents of 50 x 90 x 16 in blocks of 3."""
    frames, block = 21, 3
    text = (call("models.context"),)
    fields = network(5120, 40, 40, frames, text, preset="S/2", mlp_ratio=2.7, remat="full", dtype="bfloat16")
    config = ConfigDict({"seed": 0, "frames": frames, "sink_at": 10.0})
    rates = {"student": 1e-5, "fake": 2e-6}
    student, fake = (call("training.optimizers.adamw", learning_rate=rate) for rate in rates.values())
    config.forcing = stage(25_000, 128, fields, student, forcing(block), block, window=3)
    config.student = stage(500 * 5, 128, fields, in_turns(student, fake, 5), forcing(block), block, window=3)
    config.every = 5
    config.lora = call("adapters.lora", rank=128, alpha=64)
    config.grid = call("timesteps.shift", grid=call("timesteps.linspace", steps=LEVELS), shift=3.0)
    return config
