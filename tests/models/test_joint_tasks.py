"""The joint transformer at work: one program serves every task, and it learns what is said of each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import distributed, models, objectives, processes, timesteps
from diffusion_jax.denoisers import denoiser, jointly_guided
from diffusion_jax.sampling import make_sampler, sample
from diffusion_jax.solvers import ddim
from diffusion_jax.timesteps import linspace, roles
from tests.models.drawn import drawn
from tests.models.shared import compiled, image

FLOW = processes.rectified_flow()
PROCESS = processes.JointProcess({"image": FLOW, "text": FLOW})
SHAPES = {"image": (4, 4, 4, 1), "text": (4, 3, 2)}
TASKS = [
    {"image": "generate", "text": "generate"},
    {"image": "generate", "text": "given"},
    {"image": "given", "text": "generate"},
    {"image": "generate", "text": "ignored"},
    {"image": "ignored", "text": "generate"},
]


def test_one_program_serves_all_tasks_on_one_device_and_on_a_mesh():
    network, calls = models.joint_transformer({"image": (2, 2), "text": (1,)}, width=16, depth=2, heads=2), []
    params = drawn(models.param_shapes(network, SHAPES))

    def counted(*args, **options):
        calls.append(1)
        return network.apply(*args, **options)

    made = jointly_guided(denoiser(network._replace(apply=counted), PROCESS), 1.5)
    x = {name: image(shape) for name, shape in SHAPES.items()}
    run = jax.jit(lambda plan: sample(jax.random.key(0), made, params, ddim(), plan, x_init=x))
    out, traced = {}, 0
    for number, task in enumerate(TASKS):
        out[number] = run(roles(linspace(4), task))
        traced = traced or len(calls)
        for name, role in task.items():
            same = np.array_equal(out[number].x[name], x[name])
            assert same == (role != "generate") and np.isfinite(out[number].x[name]).all()
    assert run._cache_size() == 1 and len(calls) == traced
    assert [float(result.cost.evaluations) for result in out.values()] == [12, 8, 8, 8, 8]

    mesh = distributed.make_mesh(data=2, devices=jax.devices()[:2])
    shape = {name: size[1:] for name, size in SHAPES.items()}
    sampler = make_sampler(made, ddim(), shape=shape, mesh=mesh)
    spread = sampler(jax.random.key(0), params, roles(linspace(4), TASKS[0]), None, jnp.arange(4), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), spread.x, out[0].x)


def test_it_learns_to_pair_and_every_task_is_a_grid():
    """x and y have one sign; 300 steps, then x given y agrees in more than 90 of 100 (50 by chance)."""
    network = models.joint_transformer({"x": (), "y": ()}, width=16, depth=2, heads=2)
    process = processes.JointProcess({"x": FLOW, "y": FLOW})
    objective = objectives.denoising(network, process, {"x": timesteps.uniform(), "y": timesteps.uniform()})
    optimizer = optax.adam(1e-2)

    def pairs(key, size):
        sign = jax.random.rademacher(key, (size, 1), jnp.float32)
        noise = jax.random.normal(key, (2, size, 2))
        return {"x": sign + 0.2 * noise[0], "y": sign * jnp.array([1.0, -1.0]) + 0.2 * noise[1]}

    def step(carry, key):
        params, state = carry
        batch = {"x0": pairs(key, 64)}
        loss, gradient = jax.value_and_grad(lambda p: objective.loss(p, {"x": (), "y": ()}, batch, key)[0].mean())(
            params
        )
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), loss

    @compiled
    def train(key):
        x = pairs(key, 2)
        params = network.init(key, x, jnp.zeros(2), None)
        untrained = network.apply(params, x, jnp.ones(2))[0]
        return untrained, *jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 300))

    untrained, (params, _), losses = train(jax.random.key(0))
    assert all(np.abs(leaf).max() == 0 for leaf in untrained.values())
    assert losses[-50:].mean() < 0.6 * losses[:10].mean()
    rng = np.random.default_rng(9)
    sign, spread = rng.choice([-1.0, 1.0], (256, 1)), 0.2 * rng.standard_normal((2, 256, 2))
    known = {"x": np.float32(sign + spread[0]), "y": np.float32(sign * [1.0, -1.0] + spread[1])}
    noise = {"x": image((256, 2), 8), "y": image((256, 2), 9)}
    made = denoiser(network, process)
    run = compiled(lambda plan, x: sample(jax.random.key(1), made, params, ddim(), plan, x_init=x).x)

    def agreement(task, x):
        out = run(roles(linspace(16), task), x)
        return (np.sign(out["x"][:, 0]) == np.sign(out["y"][:, 0])).mean(), out

    for given, other in (("y", "x"), ("x", "y")):
        share, out = agreement({given: "given", other: "generate"}, {**noise, given: known[given]})
        assert share > 0.9
        share, out = agreement({given: "ignored", other: "generate"}, noise)
        positive = (out[other][:, 0] > 0).mean()
        assert abs(share - 0.5) < 0.15 and 0.3 < positive < 0.7
    assert agreement({"x": "generate", "y": "generate"}, noise)[0] > 0.9
