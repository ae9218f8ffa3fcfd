"""What the study of AccVideo stores: steps of the exact teacher, from where they are said to begin; its settings."""

import jax
import numpy as np

from diffusion_jax import timesteps
from diffusion_jax.config import ConfigDict, build, load
from diffusion_jax.recipes import accvideo
from diffusion_jax.recipes.__main__ import main
from tests.models.shared import compiled

FILE = "configs/recipes/accvideo.py"


def test_the_published_keys_are_every_tenth_time_and_the_network_has_thirteen_billion_parameters(capsys):
    config = load(FILE)
    np.testing.assert_allclose(build(config.ring.student.few), build(config.ring.runs.grid)[::10], atol=1e-6)
    np.testing.assert_allclose(build(config.clips.student.few), timesteps.shift(timesteps.linspace(5), 7), atol=1e-6)
    main(["accvideo:paper"])
    assert 5000 < float(capsys.readouterr().out.split("network: ")[1].split()[0].replace(",", "")) < 15_000


def test_displaced_steps_begin_further_out_and_are_steps_of_the_teacher():
    """From nearly clean data the teacher's step leads to its data: the displacement is what is left of M."""
    config = ConfigDict({"grid": load(FILE).ring.runs.grid, "every": 10, "count": 32, "seed": 0, "displacement": 1.5})
    draw = accvideo.displaced_steps(config).draw
    index = np.arange(160, dtype=np.int32)
    far = jax.device_get(draw(index))
    near = jax.device_get(accvideo.displaced_steps(ConfigDict({**config, "displacement": 0.0})).draw(index))
    t = far["t"][:, None]
    np.testing.assert_allclose(sorted(set(far["t"])), build(config.grid)[:-1:10][::-1], atol=1e-6)
    moved = ((1 - t) * far["x0"] + t * far["noise"] - (1 - t) * near["x0"] - t * near["noise"]) / (1 - t + 1e-9)
    inner = far["t"] < 1
    np.testing.assert_allclose(np.linalg.norm(moved[inner], axis=1), 1.5, atol=1e-3)
    # The last step ends at data of the ring, whatever it began with.
    last = np.isclose(far["t"], 0.6364, atol=1e-3)
    ring = np.linalg.norm(far["x0"][last], axis=1)
    assert last.sum() == 32 and (np.abs(ring - 1.4) < 0.7).all()


def test_a_student_in_the_plane_begins_as_the_teacher():
    exact, ring = accvideo.ring_world()
    network = accvideo.corrected(build(load(FILE).ring.student.model))
    x, t = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32), np.full(4, 0.4, np.float32)

    @compiled
    def both():
        params = network.init(jax.random.key(0), x, t, None)
        said, _ = exact.apply(ring, (), jax.numpy.asarray(x), accvideo.single_step(t), None)
        return network.apply(params, x, 1000 * t, None)[0], said.eps - said.x0

    ours, theirs = both()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
