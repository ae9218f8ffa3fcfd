"""AccVideo (Zhang et al. 2025): a student learns to make in one step what its teacher makes in ten, on stored runs.

In the plane the teacher is exact: what is off then comes from the steps alone, and from where a student learns. On
moving shapes a small video transformer with guidance is the teacher, its student asks once a step, and a discriminator
of the teacher's features is added where the stored runs are few.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, denoisers, metrics, objectives, pictures, processes, solvers, timesteps
from diffusion_jax.clock import single_step
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.randomness import normal, sample_keys, split
from diffusion_jax.recipes.study import Arm, Drawn, Results, Study, Tabulated, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.sampling import sample
from diffusion_jax.stages import Stage
from diffusion_jax.typing import Denoiser, Network, Params

FLOW, DDIM = processes.rectified_flow(), solvers.ddim()
END: dict[str, Any] = {"figure": "endpoint error to the run of 50 steps"}


def study(s: Study) -> Results:
    ring, clips = ring_table(s), clip_table(s)
    return Results([*ring_rows(s, ring), *clip_rows(clips)], {draw_clips(s, clips): CAPTION}, "training and noise")


def ring_world() -> tuple[Any, Any]:
    """The exact denoiser of a ring of eight Gaussians."""
    density = data.toys2d("gaussians", num_examples=1).density
    return denoisers.analytic(FLOW), denoisers.gaussian_mixture(density.means, covariances=density.covariances)


def corrected(network: Network) -> Network:
    """The exact velocity of the ring and, added to it, `network`, which begins at zero."""
    exact, ring = ring_world()

    def apply(params, x, t, cond=None, train=False, key=None):
        output, extras = network.apply(params, x, t, cond, train=train, key=key)
        time = t / FLOW.network_time(1.0)
        said, _ = exact.apply(ring, (), x, single_step(time), cond)
        return FLOW.output(said, time) + output, extras

    return Network(network.init, apply)


def kept_runs(config: ConfigDict, denoiser: Denoiser, params: Params, shape: Any, conditions: Any = None):
    """Runs of a teacher at every `config.every`-th time."""
    key, keep = jax.random.key(config.seed), tuple(range(0, config.grid.grid.steps + 1, config.every))
    how = {"shape": shape, "keep": keep, "conditions": conditions}
    draw = data.trajectories(key, denoiser, params, DDIM, build(config.grid), **how)
    return data.Collection(draw, config.count, min(config.count, config.at_once), config.count)


def ring_runs(config: ConfigDict) -> data.Collection:
    return kept_runs(config, *ring_world(), (2,))


def displaced_steps(config: ConfigDict) -> data.Collection:
    """As many steps of the teacher that begin at noised data, which are displaced outwards: as noise and data."""
    exact, ring = ring_world()
    grid, every, key = jnp.asarray(build(config.grid)), config.every, jax.random.key(config.seed)
    steps = (len(grid) - 1) // every

    @jax.jit
    def draw(index):
        own, noise = split(sample_keys(key, index), 2)
        chol = jnp.linalg.cholesky(ring.covariances[index % 8])
        x0 = ring.means[index % 8] + jnp.einsum("nij,nj->ni", chol, normal(own, (len(index), 2)))
        x0 *= 1 + config.displacement / jnp.linalg.norm(x0, axis=1, keepdims=True)
        times = grid[index // 8 % steps * every + jnp.arange(every + 1)[:, None]]
        x = FLOW.marginal(x0, normal(noise, x0.shape), times[0])
        end = sample(key, exact, ring, DDIM, times, x_init=x).x
        said = objectives.secant(FLOW, x, times[0], end, times[-1])
        return {"x0": said.x0, "noise": said.eps, "t": times[0]}

    return data.Collection(draw, config.count * steps, config.count, config.count * steps)


def ring_student(config: ConfigDict, runs: Stage) -> Experiment:
    """The teacher and a correction of it, learned on stored runs, or on stored steps."""
    network = corrected(build(config.model))
    objective = objectives.denoising(network, FLOW)
    if "states" in runs.value[0]:
        objective = objectives.on_trajectories(objective, FLOW, build(config.few))
    return prepare(config, source=runs.value, network=network, process=FLOW, objective=objective)


def ring_table(s: Study) -> Tabulated:
    """The teacher in many and in few steps, the student, and students that learned on steps from noised data."""
    config, (exact, ring) = s.config.ring, ring_world()
    student, few = denoisers.denoiser(corrected(build(config.student.model)), FLOW), build(config.student.few)

    def arms(seed):
        starts = {"runs": s.stage("ring: runs", config.runs, seed=seed, collect=ring_runs)}
        for m in config.displaced:
            made = {**config.runs, "displacement": m}
            starts[f"M = {m:g}"] = s.stage(f"ring: M = {m:g}", made, seed=seed, collect=displaced_steps)
        found = {"teacher": Arm(exact, ring, DDIM, build(config.runs.grid))}
        found["teacher, few steps"] = Arm(exact, ring, DDIM, few)
        for name, where in starts.items():
            made = s.stage(f"ring: student, {name}", config.student, where, seed=seed, prepare=ring_student)
            found[name] = Arm(student, made.value, DDIM, few)
        return found

    def measure(drawn: Drawn):
        true = data.toys2d("gaussians", "test", len(drawn.x), seed=drawn.seed).x0
        distance = metrics.sliced_wasserstein(drawn.x, true)
        return {"distance": distance, "endpoint": metrics.endpoint_error(drawn.x, drawn.reference)}

    return table(arms, s.seeds, measure, shape=(2,), count=config.count, reference="teacher")


def ring_rows(s: Study, found: Tabulated) -> list[Row]:
    """The card's claims in the plane."""
    far: dict[str, Any] = {"figure": "sliced Wasserstein distance"}
    few, starts = "teacher, few steps", ["runs", *(f"M = {m:g}" for m in s.config.ring.displaced)]
    published = ("0.135, 0.143", "0.143, 0.173")
    rows = [
        found.row("ring: 5 steps are as good as the teacher's 50", "distance", "runs", "teacher", "lower",
                  "0.041, 0.040 (+ 15 %)", 1.15, **far),
        found.row("ring: five times better than the teacher's 5", "distance", "runs", few, "lower", "0.041, 0.459",
                  0.2, **far),
        found.row("ring: ends where the teacher does, from new noise", "endpoint", "runs", few, "lower",
                  "0.034, 0.657", 0.2, **END),
    ]  # fmt: skip
    return rows + [
        found.row(f"ring: learning on {ours} beats {other}", "endpoint", ours, other, "lower", said, **END)
        for ours, other, said in zip(starts, starts[1:], published, strict=False)
    ]


def clip_runs(config: ConfigDict, base: Stage) -> data.Collection:
    """Runs of the guided transformer, of every class equally often."""
    conditions = data.cycled_labels(base.trained.source.num_classes)
    return kept_runs(config, guided(base, config.guidance), base.value, base.trained.shape, conditions)


def guided(base: Stage, scale: float) -> Denoiser:
    inner = denoisers.denoiser(base.trained.network, base.trained.process)
    return denoisers.guided(inner, scale, {"label": base.trained.source.num_classes})


def clip_student(config: ConfigDict, base: Stage, runs: Stage) -> Experiment:
    """The transformer, trained on the first `config.runs` stored runs; with `config.width` against heads."""
    network, process, few = base.trained.network, base.trained.process, build(config.few)
    part = data.stacked_examples(runs.value, range(min(config.runs, len(runs.value))))
    source = data.ArraySource(part["x0"], part["cond"], "runs", beside={"states": part["states"]})
    objective, begin = objectives.on_trajectories(objectives.denoising(network, process), process, few), base.value
    if config.width:
        judge = objectives.feature_discriminator(network, process, few, config.width)
        student = denoisers.denoiser(network, process)
        objective = objectives.adversarial(objective, student, judge, base.value, weight=config.weight, r1=config.r1)
        heads = judge.init(jax.random.key(config.seed), base.value, part["x0"][:1], base.trained.example()["cond"])
        begin = {"student": base.value, "heads": heads}
    return prepare(
        config, source=source, network=network, process=process, objective=objective, begin=lambda key: begin
    )


def clip_imitator(config: ConfigDict, base: Stage) -> Experiment:
    """The baseline: the transformer learns what the guided one predicts at the key times, at noised data."""
    one, draw = base.trained, timesteps.on_grid(build(config.few))
    objective = objectives.imitation(one.network, one.process, guided(base, config.guidance), base.value, draw)
    parts = {"source": one.source, "network": one.network, "process": one.process}
    return prepare(config, objective=objective, begin=lambda key: base.value, **parts)


def clip_table(s: Study) -> Tabulated:
    config = s.config.clips
    base = s.stage("clips: teacher", config.base)
    runs = s.stage("clips: runs", config.runs, base, collect=clip_runs)
    teacher = guided(base, config.runs.guidance)
    plain = denoisers.denoiser(base.trained.network, base.trained.process)
    many, few = build(config.runs.grid), build(config.student.few)
    space, classes = base.trained.source.space, base.trained.source.num_classes
    cond = {"label": np.arange(config.count, dtype=np.int32) % classes}
    real = np.asarray(space.decode(space.encode(base.trained.held_out.take(range(config.count))["x0"])))

    def arms(seed):
        def trained(name):
            return s.stage(f"clips: {name}", config[name], base, runs, seed=seed, prepare=clip_student).value

        students = {"student": trained("student"), "few runs": trained("few")}
        students["few runs, adversarial"] = trained("adversarial")["student"]
        imitator = s.stage("clips: imitation", config.imitator, base, seed=seed, prepare=clip_imitator)
        students["imitation"] = imitator.value
        found: dict[str, Any] = {name: Arm(plain, params, DDIM, few, cond) for name, params in students.items()}
        found["teacher"] = Arm(teacher, base.value, DDIM, many, cond)
        return found | {"teacher, few steps": Arm(teacher, base.value, DDIM, few, cond)}

    def measure(drawn: Drawn):
        clips = np.asarray(space.decode(drawn.x))
        read = data.moving.verify(clips, cond["label"], config.classes)
        end = metrics.endpoint_error(drawn.x, drawn.reference)
        return read | metrics.clip_distances(clips, real) | {"endpoint": end}

    return table(arms, s.seeds, measure, shape=base.trained.shape, count=config.count, reference="teacher")


def clip_rows(found: Tabulated) -> list[Row]:
    """What the paper says of its videos, and what it says of the adversarial loss."""
    right: dict[str, Any] = {"figure": "frames that show an object of the class"}
    far: dict[str, Any] = {"figure": "Fréchet distance of frames"}
    jump: dict[str, Any] = {"figure": "error of the next place, pixels"}
    few, some, against = "teacher, few steps", "few runs, adversarial", "few runs"
    return [
        found.row("clips: eight times as fast", "seconds", "student", "teacher", "lower", "91 s, 704 s", 1 / 8),
        found.row("clips: as right as the teacher", "adherence", "student", "teacher", "higher",
                  "VBench 83.3, 82.7 (- 5 %)", 0.95, **right),
        found.row("clips: as near to true clips as the teacher", "frames", "student", "teacher", "lower",
                  "quality 84.6, 84.4 (+ 15 %)", 1.15, **far),
        found.row("clips: no more flicker than the teacher", "next_position_error", "student", "teacher", "lower",
                  "no figure (+ 15 %)", 1.15, **jump),
        found.row("clips: nearer than the teacher in 5 steps", "frames", "student", few, "lower",
                  "unusable at 5", **far),
        found.row("clips: nearer than with what the teacher says at noised data", "frames", "student", "imitation",
                  "lower", "useless points", **far),
        found.row("clips: few runs: the adversarial loss brings nearer", "frames", some, against, "lower",
                  "fewer artefacts", **far),
        found.row("clips: few runs: it moves no end by more than 20 %", "endpoint", some, against, "lower", "no figure",
                  1.2, **END),
    ]  # fmt: skip


CAPTION = (
    "Clips from the same noise. What the teacher makes in 50 steps should be found again in its student's 5, as sharp; "
    "in the teacher's own 5 steps and its imitation it is fainter, or lost."
)


def draw_clips(s: Study, found: Tabulated) -> Any:
    space, rows = s.stage("clips: teacher", s.config.clips.base).trained.source.space, range(s.config.clips.shown)
    strips = {name: np.asarray(space.decode(jnp.asarray(x[np.asarray(rows)]))) for name, x in found.samples.items()}
    pictures.save_strips(s.picture("clips"), strips, title="Moving shapes, 50 and 5 steps", along="time")
    return s.picture("clips")
