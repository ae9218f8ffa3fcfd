"""References: encoded once, they say what they would say in every step, and nothing about each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax import acceleration, denoisers, models, processes, sampling, solvers, timesteps
from diffusion_jax.distributed import make_mesh
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.interception import Edit, intercepted
from tests.models.shared import changed, compiled, drawn_params, image

BATCH, COUNT, KINDS = 2, 3, 5
GRID = timesteps.linspace(steps=3)
FLOW = processes.rectified_flow(prediction="x0")
NETWORKS = ("unet", "dit")


def plain(name):
    if name == "dit":
        return models.dit(patch=4, width=16, depth=2, heads=2, qk_norm=True)
    sizes = {"multipliers": (1, 2), "num_residual": 1, "attention": (0, 1), "mid_attention": 0, "mid_residual": 0}
    return models.unet(channels=8, **sizes, groups=4, heads=2, conditions=(models.concat(2),))


def inputs(batch=BATCH):
    kinds = np.arange(batch * COUNT, dtype=np.int32).reshape(batch, COUNT) % KINDS
    cond = {
        "concat": image((batch, 8, 8, 2), 0),
        "references": image((batch, COUNT, 8, 8, 3), 1),
        "items": jax.device_put(kinds),
        "present": jax.device_put(changed(np.ones((batch, COUNT), bool), (0, 2), False)),
    }
    return image((batch, 8, 8, 3), 2), jnp.linspace(200.0, 700.0, batch), cond


def opened(name, network):
    """All forms, with x as the network takes it: a transformer has mask and image among its channels."""
    return models.referenced(network, KINDS, concat=name == "dit")


@functools.cache
def made(name):
    """The forms, compiled, and parameters without the zeros that networks begin with."""
    forms = opened(name, plain(name))
    x, t, cond = inputs()
    params = drawn_params(forms.encoding, x, t, cond)
    networks = {
        field: getattr(forms, field)._replace(apply=jax.jit(getattr(forms, field).apply))
        for field in forms._fields
        if field != "encode"
    }
    return forms._replace(encode=jax.jit(forms.encode), **networks), params


def encoded(forms, params, cond):
    return models.cache_references(forms, params, cond)["cache"]


def with_caches(forms, params, cond):
    return models.cache_references(forms, params, cond, null=True)


def ask(form, *args):
    return jax.device_get(form.apply(*args))


@pytest.mark.parametrize("name", NETWORKS)
def test_encoded_once_in_every_call_or_along_with_x_is_the_same(name):
    forms, params = made(name)
    x, t, cond = inputs()
    anew = ask(forms.encoding, params, x, t, cond)[0]
    cache = encoded(forms, params, cond)
    once = ask(forms.cached, params, x, t, {"concat": cond["concat"], "cache": cache})[0]
    joint, extras = ask(forms.joint, params, x, t, cond)
    assert anew.shape == x.shape and np.abs(anew).max() > 0.1
    np.testing.assert_allclose(once, anew, atol=1e-6)
    np.testing.assert_allclose(joint, anew, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), extras["cache"], cache)
    assert np.abs(ask(forms.coupled, params, x, t, cond)[0] - anew).max() > 1e-3


@pytest.mark.parametrize(
    "name, solver, scale", [("unet", solvers.ddim(), 1.0), ("dit", solvers.dpm_solver_pp(), 2.5)], ids=NETWORKS
)
def test_a_run_with_a_cache_is_the_run_without(name, solver, scale):
    forms, params = made(name)
    x, _, cond = inputs()

    def run(network, null, cond):
        guided = denoisers.guided(denoisers.denoiser(network, FLOW), scale, null=null)
        return sampling.sample(jax.random.key(0), guided, params, solver, GRID, x_init=x, cond=cond)

    once = jax.jit(lambda cond: run(forms.cached, models.null_cache, cond))(with_caches(forms, params, cond))
    anew = jax.jit(lambda cond: run(forms.encoding, {"references": 0.0}, cond))(cond)
    np.testing.assert_allclose(once.x, anew.x, atol=2e-6 if scale == 1 else 1e-5)
    assert float(once.cost.evaluations) == 3 * (1 if scale == 1 else 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_kept_of_a_reference_depends_on_nothing_else_unless_all_is_coupled(name):
    forms, params = made(name)
    x, t, cond = inputs()
    references = np.asarray(cond["references"])
    other = {**cond, "references": changed(references, np.s_[:, 1], references[:, 1] + 1.0)}
    changes = {
        "time": (x, np.asarray(t) + 100, cond),
        "x": (np.asarray(x) + 1, t, cond),
        "another reference": (x, t, other),
    }

    def first(cache):
        return [leaf[:, :, 0] for leaf in jax.tree.leaves(cache.layers)]

    def moved(form, changed):
        caches = [ask(getattr(forms, form), params, *given)[1]["cache"] for given in ((x, t, cond), changed)]
        return max(np.abs(a - b).max() for a, b in zip(*map(first, caches), strict=True))

    for what, given in changes.items():
        assert moved("joint", given) == 0, what
        assert moved("coupled", given) > 1e-4, what
    a, b = (jax.device_get(encoded(forms, params, one)) for one in (cond, other))
    for one, two in zip(jax.tree.leaves(a.layers), jax.tree.leaves(b.layers), strict=True):
        np.testing.assert_array_equal(one[:, :, ::2], two[:, :, ::2])
        assert np.abs(one[:, :, 1] - two[:, :, 1]).max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_order_does_not_matter_and_what_is_absent_is_not_there(name):
    forms, params = made(name)
    x, t, cond = inputs()

    def answer(**changes):
        return ask(forms.encoding, params, x, t, {**cond, **changes})[0]

    told = {name: np.asarray(cond[name]) for name in ("references", "items", "present")}
    np.testing.assert_allclose(answer(**{n: leaf[:, [2, 0, 1]] for n, leaf in told.items()}), answer(), atol=1e-5)
    without = {**{n: leaf[:, :2] for n, leaf in told.items()}, "present": np.ones((BATCH, 2), bool)}
    hidden = answer(present=np.array([[True, True, False]] * BATCH))
    np.testing.assert_allclose(hidden, answer(**without), atol=1e-5)
    assert np.abs(hidden - answer())[1].max() > 1e-3
    nothing = answer(present=np.zeros((BATCH, COUNT), bool))
    network = models.concatenating(plain(name)) if name == "dit" else plain(name)
    np.testing.assert_allclose(
        nothing, jax.jit(network.apply)(params["network"], x, t, {"concat": cond["concat"]})[0], atol=1e-5
    )


def test_the_null_branch_knows_the_kinds_but_not_the_pixels():
    forms, params = made("dit")
    x, _, cond = inputs()
    other = {**cond, "references": np.asarray(cond["references"]) + 1}
    denoiser = denoisers.denoiser(forms.cached, FLOW)

    def runs(denoiser):
        key, solver = jax.random.key(0), solvers.ddim()
        return compiled(lambda cond: sampling.sample(key, denoiser, params, solver, GRID, x_init=x, cond=cond).x)

    null, once = (runs(denoisers.guided(denoiser, scale, null=models.null_cache)) for scale in (0.0, 1.0))
    told, others = (with_caches(forms, params, one) for one in (cond, other))
    np.testing.assert_array_equal(null(told), null(others))
    kinds = with_caches(forms, params, {**cond, "items": (np.asarray(cond["items"]) + 1) % KINDS})
    assert np.abs(null(kinds) - null(told)).max() > 1e-4
    np.testing.assert_array_equal(once(told), runs(denoiser)(told))


def test_references_are_encoded_once_in_a_run():
    rows = []

    def counted(site, h):
        jax.debug.callback(lambda: rows.append(h.shape[0]))
        return site.run(h)

    network = intercepted(plain("dit"), Edit(lambda module: module.path == ("patch_embed",), counted)).network
    forms = opened("dit", network)
    x, t, cond = inputs()
    params = drawn_params(forms.encoding, x, t, cond)

    def count(form, told):
        # What was called before may still be on its way to the host.
        jax.effects_barrier()
        rows.clear()
        denoiser = denoisers.denoiser(form, FLOW)
        run = sampling.sample(jax.random.key(0), denoiser, params, solvers.ddim(), GRID, x_init=x, cond=told())
        jax.block_until_ready(run.x)
        jax.effects_barrier()
        return sum(rows)

    once = count(forms.cached, lambda: {"concat": cond["concat"], "cache": encoded(forms, params, cond)})
    assert once == BATCH * (COUNT + 3)
    assert count(forms.encoding, lambda: cond) == 3 * BATCH * (COUNT + 1)


def test_a_cache_is_split_with_the_batch_and_over_heads():
    forms, params = made("dit")
    x, t, cond = inputs(8)
    told = with_caches(forms, params, cond)
    denoiser = denoisers.guided(denoisers.denoiser(forms.cached, FLOW), 2.0, null=models.null_cache)
    found = []
    for mesh in (None, make_mesh(data=8)):
        sampler = sampling.make_sampler(denoiser, solvers.ddim(), shape=x.shape[1:], mesh=mesh)
        found.append(sampler(jax.random.key(0), params, GRID, told, jnp.arange(8), x).x)
    np.testing.assert_allclose(*found, atol=1e-5)
    heads = NamedSharding(make_mesh(data=4, tensor=2), P("data", None, None, None, "tensor"))
    spread = told["cache"]._replace(layers=jax.device_put(told["cache"].layers, heads))
    whole, split = (
        forms.cached.apply(params, x, t, {"concat": cond["concat"], "cache": cache})[0]
        for cache in (told["cache"], spread)
    )
    np.testing.assert_allclose(split, whole, atol=1e-5)


def test_whole_outputs_are_kept_on_top():
    forms, params = made("dit")
    x, _, cond = inputs()
    denoiser = denoisers.denoiser(forms.cached, FLOW)
    told = with_caches(forms, params, cond)

    @functools.partial(jax.jit, static_argnums=0)
    def run(denoiser):
        return sampling.sample(
            jax.random.key(0), denoiser, params, solvers.ddim(), timesteps.linspace(steps=4), x_init=x, cond=told
        )

    every, second = (run(acceleration.cached_outputs(denoiser, acceleration.every(n))) for n in (1, 2))
    np.testing.assert_allclose(every.x, run(denoiser).x, atol=1e-6)
    assert float(every.cost.evaluations) == 4 > float(second.cost.evaluations)


def test_one_form_is_a_network_for_a_config():
    forms, params = made("dit")
    x, t, cond = inputs()
    network = models.with_references(plain("dit"), KINDS, "joint", concat=True)
    answer = jax.jit(network.apply)(params, x, t, cond)[0]
    np.testing.assert_array_equal(answer, ask(forms.joint, params, x, t, cond)[0])
    with pytest.raises(InvalidInput, match="did you mean 'encoding'"):
        models.with_references(plain("dit"), KINDS, "encode")


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidInput, match="unet or a dit"):
        models.referenced(models.mlp(width=8, depth=1), 2)
    with pytest.raises(InvalidInput, match="items"):
        models.referenced(plain("dit"), 0)
    forms, params = made("dit")
    x, t, cond = inputs()
    with pytest.raises(InvalidInput, match="cache"):
        forms.cached.apply(params, x, t, {"concat": cond["concat"]})
    with pytest.raises(InvalidInput, match="present"):
        forms.encoding.apply(params, x, t, {name: cond[name] for name in ("concat", "references", "items")})
    with pytest.raises(InvalidInput, match="items"):
        forms.encoding.apply(params, x, t, {**cond, "items": cond["items"][:, :1]})
    with pytest.raises(InvalidInput, match="channels"):
        forms.encoding.apply(params, x, t, {**cond, "references": jnp.zeros((BATCH, COUNT, 8, 8, 6))})
    with pytest.raises(InvalidInput, match="concat"):
        forms.cached.apply(params, x, t, {})
