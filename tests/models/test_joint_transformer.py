"""The joint transformer: parts meet in attention alone, times of any shape, one program for every task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import config, distributed, models, objectives, processes, timesteps
from diffusion_jax.adapters import lora
from diffusion_jax.denoisers import denoiser, jointly_guided
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import make_sampler, sample
from diffusion_jax.solvers import ddim
from diffusion_jax.timesteps import linspace, roles
from tests.models.drawn import drawn
from tests.models.shared import T, image

PATCHES = {"text": (1,), "image": (2, 2), "clip": (1, 2, 2), "vector": ()}
X = {
    "text": image((2, 3, 5)),
    "image": image((2, 4, 6, 3)),
    "clip": image((2, 3, 2, 4, 1)),
    "vector": image((2, 4)),
}
TIMES = {"text": T, "image": T[::-1], "clip": jnp.array([0.0, 1000.0]), "vector": jnp.array([5.0, 300.0])}
KINDS = {
    "adaln": {"registers": 2},
    "global": {"times": "global", "registers": 2},
    "tokens": {"times": "tokens", "skips": True, "positions": "sincos"},
}
FLOW = processes.rectified_flow()
PAIR = {"image": (2, 2), "text": (1,)}
PROCESS = processes.JointProcess({"image": FLOW, "text": FLOW})
SHAPES = {"image": (4, 4, 4, 1), "text": (4, 3, 2)}


def tiny(modalities=PATCHES, **fields):
    return models.joint_transformer(modalities, **{"width": 16, "depth": 3, "heads": 2, **fields})


@functools.cache
def case(kind):
    """(network, params, jitted apply of x and t)"""
    network = tiny(**KINDS[kind])
    params = drawn(models.param_shapes(network, jax.tree.map(jnp.shape, X, is_leaf=lambda leaf: hasattr(leaf, "ndim"))))
    return network, params, jax.jit(lambda x, t: network.apply(params, x, t)[0])


@functools.cache
def alone(kind):
    """The same without attention."""
    network, params, _ = case(kind)
    inside = models.intercepted(network, models.edit("attention", lambda run, data, h, *_: jnp.zeros_like(h)))
    return jax.jit(lambda x, t: inside.apply(params, {}, x, t)[0])


def moved(one, other):
    """The largest change of each example, by part."""
    return {name: np.abs(one[name] - other[name]).reshape(2, -1).max(1) for name in one}


@pytest.mark.parametrize("kind", ["adaln", "tokens"])
def test_outputs_have_the_shapes_of_the_parts_and_begin_at_zero(kind):
    network = tiny(**KINDS[kind])
    output = jax.jit(lambda key: network.apply(network.init(key, X, T, None), X, T)[0])(jax.random.key(0))
    assert jax.tree.map(jnp.shape, output) == jax.tree.map(jnp.shape, X)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in output.values())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_known_by_name_and_examples_do_not_see_each_other(kind):
    network, _, apply = case(kind)
    turned = dict(reversed(PATCHES.items()))
    assert models.joint_transformer(turned, width=16, depth=3, heads=2, **KINDS[kind]).module == network.module
    output = apply(X, TIMES)
    again = apply(dict(reversed(X.items())), dict(reversed(TIMES.items())))
    jax.tree.map(np.testing.assert_array_equal, output, again)
    other = {name: leaf.at[1].add(1.0) for name, leaf in X.items()}
    times = {name: leaf.at[1].set(42.0) for name, leaf in TIMES.items()}
    for change in moved(apply(other, times), output).values():
        assert change[0] == 0 and change[1] > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_parts_meet_in_attention_alone(kind):
    _, _, apply = case(kind)
    times = {**TIMES, "text": jnp.full((2,), 1000.0)}
    other = {**X, "text": X["text"] + 1.0}
    apart = moved(alone(kind)(other, times), alone(kind)(X, times))
    together = moved(apply(other, times), apply(X, times))
    for name in PATCHES:
        assert together[name].min() > 1e-4
        assert (apart[name].min() > 1e-4) if name == "text" else (apart[name].max() == 0)
    # A part's time is told to its own tokens, but for the one vector that is told to all.
    change = moved(alone(kind)(X, {**times, "text": T}), alone(kind)(X, times))
    for name in PATCHES:
        told = {"adaln": name == "text", "global": True, "tokens": False}[kind]
        assert (change[name].min() > 1e-4) if told else (change[name].max() == 0)


def test_equal_entries_of_a_vector_time_are_the_scalar_time():
    _, _, apply = case("adaln")
    wide = {
        "text": jnp.broadcast_to(TIMES["text"][:, None], (2, 3)),
        "image": jnp.broadcast_to(TIMES["image"][:, None, None], (2, 4, 6)),
        "clip": jnp.broadcast_to(TIMES["clip"][:, None], (2, 3)),
        "vector": TIMES["vector"],
    }
    expected = apply(X, TIMES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), apply(X, wide), expected)
    shared = apply(X, T)
    jax.tree.map(np.testing.assert_array_equal, shared, apply(X, dict.fromkeys(X, T)))


def test_a_tokens_time_is_its_own():
    """Frames of a clip and entries of a text, where they do not mix."""
    apply = alone("adaln")
    wide = {**TIMES, "text": jnp.full((2, 3), 300.0), "clip": jnp.full((2, 3), 300.0)}
    before = apply(X, wide)
    after = apply(X, {**wide, "text": wide["text"].at[0, 1].set(900.0), "clip": wide["clip"].at[1, 2].set(900.0)})
    text, clip = (np.abs(after[name] - before[name]).reshape(2, 3, -1).max(-1) > 1e-5 for name in ("text", "clip"))
    np.testing.assert_array_equal(text, [[False, True, False], [False] * 3])
    np.testing.assert_array_equal(clip, [[False] * 3, [False, False, True]])


def test_joined_times_are_one_vector_of_the_times_of_all_tokens():
    network = tiny((2,), times="joined", registers=1)
    params = drawn(models.param_shapes(network, (2, 6, 3)))
    apply = jax.jit(lambda x, t: network.apply(params, x, t)[0])
    x, whole = image((2, 6, 3)), jnp.array([100.0, 700.0])
    equal = apply(x, jnp.broadcast_to(whole[:, None], (2, 6)))
    np.testing.assert_array_equal(equal, apply(x, whole))
    # The last patch's time is told to all tokens, even where they do not meet; and in their order.
    inside = models.intercepted(network, models.edit("attention", lambda run, data, h, *_: jnp.zeros_like(h)))
    alone = jax.jit(lambda t: inside.apply(params, {}, x, t)[0])
    rising = jnp.array([100.0, 100, 300, 300, 700, 700]) * jnp.ones((2, 1))
    assert (np.abs(alone(rising) - alone(rising.at[:, 4:].set(900.0))).max(axis=-1) > 1e-4).all()
    assert (np.abs(alone(rising) - alone(rising[:, ::-1])).max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("kind", ["global", "tokens"])
def test_gradients_reach_every_parameter(kind):
    parts = {"words": 7, "image": (2, 2)}
    x = {"words": jnp.array([[0, 3, 7], [1, 2, 5]]), "image": X["image"]}
    fields = {"num_classes": 3, "pooled": True, "context": True, "positions": "learned", "skips": True}
    network = tiny(parts, **{**KINDS[kind], **fields})
    cond = {"label": jnp.array([0, 2]), "pooled": image((2, 5)), "context": image((2, 4, 9))}
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, T, cond)

    @jax.jit
    @jax.grad
    def gradient(params):
        output, _ = network.apply(params, x, {"words": T, "image": T[::-1]}, cond)
        assert output["words"].shape == (2, 3, 7)
        return sum((leaf * image(leaf.shape, 7)).sum() for leaf in output.values())

    for path, leaf in models.by_path(gradient(drawn(shapes))).items():
        # A bias of the keys moves all logits of a query alike. Of an embedding, the rows that x has are trained.
        size = float(jnp.abs(leaf).reshape(-1, leaf.shape[-1]).max(0).min())
        assert size > 1e-6 or path.endswith("/k/bias"), (path, size)


def test_long_skips_of_weight_zero_are_a_plain_stack():
    shapes = {"image": (2, 4, 4, 1), "text": (2, 3, 2)}
    x = {name: image(shape) for name, shape in shapes.items()}
    plain, skipped = tiny(PAIR), tiny(PAIR, skips=True)
    params = drawn(models.param_shapes(skipped, shapes))
    assert params["blocks"]["block"]["mlp"]["modulation"]["dense"]["bias"].shape[0] == 2
    assert params["skip_blocks"]["block"]["skip"]["linear"]["kernel"].shape == (1, 32, 16)
    apply = jax.jit(skipped.apply)
    connected = apply(params, x, T)[0]
    zero = {
        **params["skip_blocks"]["block"],
        "skip": jax.tree.map(jnp.zeros_like, params["skip_blocks"]["block"]["skip"]),
    }
    without = apply({**params, "skip_blocks": {"block": zero}}, x, T)[0]
    later = {name: leaf for name, leaf in zero.items() if name != "skip"}
    blocks = jax.tree.map(lambda *halves: jnp.concatenate(halves), params["blocks"], {"block": later})
    rest = {name: leaf for name, leaf in params.items() if name != "skip_blocks"}
    expected = jax.jit(plain.apply)({**rest, "blocks": blocks}, x, T)[0]
    for name in x:
        np.testing.assert_allclose(without[name], expected[name], atol=2e-5)
        assert float(jnp.abs(connected[name] - without[name]).max()) > 1e-2


@pytest.mark.parametrize("kind", ["adaln", "tokens"])
def test_scan_remat_and_dtype_are_not_part_of_the_function(kind):
    _, params, apply = case(kind)
    output = apply(X, TIMES)
    unrolled = tiny(**KINDS[kind], remat="full", scan=False)
    low = tiny(**KINDS[kind], dtype="bfloat16")
    for network, error in ((unrolled, 1e-5), (low, 0.03)):
        found, _ = jax.jit(network.apply)(params, X, TIMES)
        for name, leaf in found.items():
            assert leaf.dtype == jnp.float32
            assert float(jnp.linalg.norm(leaf - output[name])) <= error * float(jnp.linalg.norm(output[name]))


def test_one_array_is_one_part_with_times_of_its_own():
    """Actions under a streaming policy: a level for each, what is observed as a condition."""
    x, cond = image((2, 6, 3)), {"pooled": image((2, 4)), "context": image((2, 5, 7))}
    fields = {"depth": 2, "pooled": True, "context": True, "positions": "sincos"}
    bare, named = tiny((1,), **fields), tiny({"data": (1,)}, **fields)
    levels = jnp.broadcast_to(jnp.arange(6.0) * 100, (2, 6))
    params = drawn(models.param_shapes(bare, x.shape, cond))
    output, extras = jax.jit(bare.apply)(params, x, levels, cond)
    assert output.shape == x.shape and extras == {}
    other = jax.jit(named.apply)(params, {"data": x}, {"data": levels}, cond)[0]["data"]
    np.testing.assert_array_equal(output, other)
    # Fixed positions take other horizons.
    assert jax.eval_shape(bare.apply, params, x[:, :4], levels[:, :4], cond)[0].shape == (2, 4, 3)


def test_it_is_opened_by_interception_like_all_networks():
    network, params, apply = case("tokens")
    tapped = models.intercepted(network, models.taps("attention"), models.gates("skip"))
    collections = tapped.init(jax.random.key(1), params, X, TIMES)
    output, extras, _ = jax.jit(tapped.apply)(params, collections, X, TIMES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), output, apply(X, TIMES))
    told = extras["taps"]
    # 3 words, 6 patches, 6 patches of the clip, 1 vector, and a time for each part.
    assert told["blocks"]["block"]["attention"]["output"].shape == (2, 2, 3 + 6 + 6 + 1 + 4, 16)
    assert told["skip_blocks"]["block"]["attention"]["output"].shape[0] == 1
    adapted = lora(network, 2)
    factors = jax.tree.map(lambda leaf: leaf + 0.1, adapted.init(jax.random.key(2), params, X, TIMES, None))
    low, _ = jax.jit(adapted.network.apply)({"params": params, "lora": factors}, X, TIMES)
    merged, _ = jax.jit(network.apply)(adapted.merge(params, factors), X, TIMES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), low, merged)
    assert max(change.max() for change in moved(low, output).values()) > 1e-3


TASKS = [
    {"image": "generate", "text": "generate"},
    {"image": "generate", "text": "given"},
    {"image": "given", "text": "generate"},
    {"image": "generate", "text": "ignored"},
    {"image": "ignored", "text": "generate"},
]


def test_one_program_serves_all_tasks_on_one_device_and_on_a_mesh():
    network, calls = tiny(PAIR, depth=2), []
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
    network = models.joint_transformer({"x": (), "y": ()}, width=32, depth=2, heads=2)
    process = processes.JointProcess({"x": FLOW, "y": FLOW})
    objective = objectives.denoising(network, process, {"x": timesteps.uniform(), "y": timesteps.uniform()})
    optimizer = optax.adam(3e-3)

    def pairs(key, size):
        sign = jax.random.rademacher(key, (size, 1), jnp.float32)
        noise = jax.random.normal(jax.random.fold_in(key, 1), (2, size, 2))
        return {"x": sign + 0.2 * noise[0], "y": sign * jnp.array([1.0, -1.0]) + 0.2 * noise[1]}

    def step(carry, key):
        params, state = carry
        batch = {"x0": pairs(key, 128)}
        loss, gradient = jax.value_and_grad(lambda p: objective.loss(p, {"x": (), "y": ()}, batch, key)[0].mean())(
            params
        )
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def train(key):
        params = network.init(key, pairs(key, 2), jnp.zeros(2), None)
        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 300))

    (params, _), losses = train(jax.random.key(0))
    assert float(losses[-50:].mean()) < 0.6 * float(losses[:10].mean())
    known = pairs(jax.random.key(9), 256)
    noise = process.prior(jax.random.key(8), {"x": (256, 2), "y": (256, 2)})
    made = denoiser(network, process)
    run = jax.jit(lambda plan, x: sample(jax.random.key(1), made, params, ddim(), plan, x_init=x).x)

    def agreement(task, x):
        out = run(roles(linspace(16), task), x)
        return float((jnp.sign(out["x"][:, 0]) == jnp.sign(out["y"][:, 0])).mean()), out

    for given, other in (("y", "x"), ("x", "y")):
        share, out = agreement({given: "given", other: "generate"}, {**noise, given: known[given]})
        assert share > 0.9
        share, out = agreement({given: "ignored", other: "generate"}, noise)
        positive = float((out[other][:, 0] > 0).mean())
        assert abs(share - 0.5) < 0.15 and 0.3 < positive < 0.7
    assert agreement({"x": "generate", "y": "generate"}, noise)[0] > 0.9


def test_published_sizes():
    """UniDiffuser has about a billion parameters, of which the text encoders and autoencoders are no part."""
    network = models.joint_transformer({"image": (2, 2), "clip": (), "text": (1,)}, "unidiffuser")
    shapes = models.param_shapes(network, {"image": (1, 64, 64, 4), "clip": (1, 512), "text": (1, 77, 64)})
    assert models.count_params(shapes) == pytest.approx(0.95e9, rel=0.01)
    policy = models.joint_transformer({"action": (1,), "future": (2, 4, 4)}, "uwm", pooled=True)
    cond = {"pooled": jax.ShapeDtypeStruct((1, 512), jnp.float32)}
    shapes = models.param_shapes(policy, {"action": (1, 16, 7), "future": (1, 2, 28, 28, 4)}, cond)
    assert shapes["registers"].shape == (8, 768)
    assert models.count_params(shapes) == pytest.approx(130e6, rel=0.05)


def test_a_config_describes_it():
    entry = config.call(
        "models.joint_transformer", modalities={"image": (2, 2), "text": (1,)}, width=16, depth=3, heads=2
    )
    assert config.build(entry).module == tiny(PAIR).module
    assert config.build(config.call("models.joint_transformer", modalities=[1], preset="S")).module.modalities == (
        ("", (1,)),
    )


def test_mistakes_are_told_in_one_sentence():
    network, params, _ = case("global")
    single = tiny((1,))
    wrong = [
        (lambda: tiny(preset="uvit"), "preset is 'uvit'"),
        (lambda: tiny(timse="adaln"), "did you mean 'times'"),
        (lambda: tiny(times="adalm"), "did you mean 'adaln'"),
        (lambda: tiny(positions="learnt"), "did you mean 'learned'"),
        (lambda: tiny(registers=-1), "registers is -1"),
        (lambda: tiny(depth=1, skips=True), "at least 2 blocks"),
        (lambda: tiny(times="tokens", swiglu=True), "swiglu is True"),
        (lambda: tiny({}), "at least one modality"),
        (lambda: tiny({"image": (2, 0)}), r"modalities\['image'\] is \(2, 0\)"),
        (lambda: tiny({"words": 1}), "a vocabulary"),
        (lambda: network.apply(params, X, {**TIMES, "text": jnp.zeros((2, 3))}), "times='global' takes one time"),
        (lambda: network.apply(params, X["text"], T), "needs a dict"),
        (lambda: network.apply(params, {"text": X["text"]}, T), r"x has the parts \['text'\]"),
        (lambda: network.apply(params, X, {"text": T}), r"t has the parts \['text'\]"),
        (lambda: network.apply(params, {**X, "image": X["image"][:, :3]}, T), "divide by the patch"),
        (lambda: network.apply(params, {**X, "image": X["text"]}, T), r"x\['image'\].shape"),
        (lambda: network.apply(params, {**X, "text": X["text"][:, :2]}, T), "learned for 3 tokens"),
        (lambda: single.apply({}, X, T), "is one array"),
        (lambda: tiny({"words": 5}).apply({}, {"words": jnp.zeros((2, 3))}, T), "integer tokens"),
        (lambda: tiny(PATCHES).apply(case("adaln")[1], X, {**TIMES, "vector": jnp.zeros((2, 4))}), r"takes \[B\]"),
    ]
    for call, message in wrong:
        with pytest.raises(InvalidInput, match=message):
            call()
