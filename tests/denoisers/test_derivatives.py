"""Where an answer is finite its derivatives are: equal branches, constant and empty images, both ends of time.

All degenerate cases are samples of one batch, each with a time of its own; nothing is jitted, so that operations are
compiled once for all transformations.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes
from diffusion_jax.denoisers import analytic, gaussian_mixture, posterior
from diffusion_jax.errors import InvalidInput
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Network, Step

FLOW = processes.rectified_flow(time="t")
ZERO, CONSTANT, ANY, OTHER = range(4)
"""Labels: a network that says nothing, one that says a constant, one that says anything, and its null."""
RNG = np.random.default_rng(0)
IMAGES = [np.zeros((4, 4, 1)), np.full((4, 4, 1), 0.3), RNG.standard_normal((4, 4, 1))]
CASES = list(itertools.product((ZERO, CONSTANT, ANY), range(len(IMAGES)), (0.0, 0.5, 1.0)))
LABELS = jnp.asarray([label for label, _, _ in CASES])
X = jnp.asarray(np.stack([IMAGES[image] for _, image, _ in CASES]), jnp.float32)
TIMES = jnp.asarray([t for _, _, t in CASES], jnp.float32)
PARAMS = {"slope": jnp.array([0.0, 0.0, 0.7, -0.4]), "said": jnp.array([0.0, 0.3, 0.1, 0.6])}


def apply(params, x, t, cond, train=False, key=None):
    slope, said = (expand(params[name][cond["label"]], x) for name in ("slope", "said"))
    return slope * x + said, {}


def null(cond):
    """Another answer for ANY, the same one for what is degenerate."""
    return {**cond, "label": jnp.where(cond["label"] == ANY, OTHER, cond["label"])}


def energy(prediction, t, cond):
    return jnp.sum(prediction.x0**2, axis=(1, 2, 3))


PLAIN = denoisers.denoiser(Network(lambda *_: PARAMS, apply), FLOW)
LEVELS = jnp.asarray([[1.0, 0.5, 0.0, 0.2]])
TRANSFORMED = {
    "plain": PLAIN,
    "guided": denoisers.guided(PLAIN, 3.0, null),
    "rescaled": denoisers.guided(PLAIN, 3.0, null, rescale=0.7),
    "by step": denoisers.guided(PLAIN, jnp.array([3.0, 1.0]), null, interval=(0.2, 0.8)),
    "projected": denoisers.projected_guided(PLAIN, 5.0, null, threshold=1.0, eta=0.3, momentum=-0.5),
    "cfg++": denoisers.cfg_plus_plus(PLAIN, 0.6, null),
    "contrasted": denoisers.contrasted(PLAIN, null, null, 2.0),
    "clipped": denoisers.clipped(PLAIN),
    "thresholded": denoisers.thresholded(PLAIN, 0.9),
    "energy": denoisers.energy_guided(PLAIN, energy, 0.5),
    "raised": denoisers.combined(PLAIN, [(-1.0, LEVELS)]),
    "zero terminal": denoisers.on_process(PLAIN, processes.vp_cosine(20, zero_terminal_snr=True)),
    "flow map": denoisers.flow_map(PLAIN, 2),
}


def answer(denoiser, cond):
    def function(params, x, t):
        step = Step(jnp.int32(0), t, 0.5 * t, jnp.int32(2), None, jax.random.split(jax.random.key(0), len(x)))
        found = denoiser.apply(params, denoiser.init(params, x, cond), x, step, cond)[0]
        return found.x0, found.eps

    return function


def check(function, *inputs):
    values, backwards = jax.vjp(function, *inputs)
    for leaf in jax.tree.leaves(values):
        assert np.isfinite(leaf).all()
    for name, part in zip(("params", "x", "t"), backwards(jax.tree.map(jnp.ones_like, values)), strict=True):
        for leaf in jax.tree.leaves(part):
            wrong = np.argwhere(~np.isfinite(leaf))[:, 0]
            assert not wrong.size, f"with respect to {name}, at {[CASES[i] for i in wrong if i < len(CASES)]}"
    return values


@pytest.mark.parametrize("name", TRANSFORMED)
def test_every_transformation_of_every_degenerate_answer_has_derivatives(name):
    check(answer(TRANSFORMED[name], {"label": LABELS}), PARAMS, X, TIMES)


@pytest.mark.parametrize(
    "mixture",
    [
        gaussian_mixture(10 * RNG.standard_normal((3, 4, 4, 1)), 0.0),
        gaussian_mixture(np.stack(IMAGES), [0.0, 0.5, 1.0]),
        gaussian_mixture(np.stack(IMAGES), covariances=np.stack([0.1 * np.eye(16) + 0.9] * 3)),
    ],
    ids=["points", "spherical", "dense"],
)
def test_the_exact_denoiser_has_derivatives_where_its_components_are_points(mixture):
    check(answer(analytic(FLOW), None), mixture._replace(labels=None), X, TIMES)
    gradient = jax.grad(lambda t: posterior(mixture, FLOW, X, t).log_density.sum())(TIMES)
    assert np.isfinite(gradient).all()


def test_nothing_is_restored_of_a_constant_image_and_what_rounding_leaves_of_it_does_not_count():
    """The whole of v is multiplied by the ratio of deviations: of two roundings, that would be any number."""
    rescaled = denoisers.guided(PLAIN, 3.0, {"label": OTHER}, rescale=1.0)
    x, label, t = jnp.full((1, 16, 16, 3), 0.7), jnp.array([ANY]), jnp.array([0.37])
    plain = answer(denoisers.guided(PLAIN, 3.0, {"label": OTHER}), {"label": label})(PARAMS, x, t)
    found = answer(rescaled, {"label": label})(PARAMS, x, t)
    np.testing.assert_allclose(found, plain, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: denoisers.guided(PLAIN, np.nan, null), "scale"),
        (lambda: denoisers.guided(PLAIN, np.inf, null), "scale"),
        (lambda: denoisers.guided(PLAIN, [1.0, np.nan], null), "scale"),
        (lambda: denoisers.guided(PLAIN, 2.0, null, rescale=np.nan), "rescale"),
        (lambda: denoisers.guided(PLAIN, 2.0, null, interval=(0.1, np.nan)), "interval"),
        (lambda: denoisers.autoguided(PLAIN, PLAIN, 2.0, guide_compute=np.nan), "guide_compute"),
        (lambda: denoisers.projected_guided(PLAIN, 2.0, null, eta=np.nan), "eta"),
        (lambda: denoisers.projected_guided(PLAIN, 2.0, null, threshold=np.nan), "threshold"),
        (lambda: denoisers.contrasted(PLAIN, null, null, np.nan), "scale"),
        (lambda: denoisers.energy_guided(PLAIN, energy, np.nan), "scale"),
        (lambda: denoisers.clipped(PLAIN, np.nan), "low"),
        (lambda: denoisers.thresholded(PLAIN, floor=np.nan), "floor"),
        (lambda: denoisers.thresholded(PLAIN, ceiling=np.nan), "ceiling"),
        (lambda: denoisers.averaged([PLAIN, PLAIN], [1.0, np.nan]), "weights"),
        (lambda: denoisers.by_share(np.nan), "shares"),
        (lambda: denoisers.by_time(np.nan), "boundaries"),
        (lambda: gaussian_mixture(np.zeros((2, 2)), np.nan), "stds"),
        (lambda: gaussian_mixture(np.zeros((1, 2)), covariances=[[[1.0, 2.0], [2.0, 1.0]]]), "eigenvalue"),
        (lambda: gaussian_mixture(np.zeros((1, 2)), covariances=[[[1.0, 0.5], [0.0, 1.0]]]), "symmetric"),
        (lambda: gaussian_mixture(np.zeros((1, 2)), covariances=[[[1.0, np.nan], [np.nan, 1.0]]]), "symmetric"),
    ],
)
def test_what_is_not_a_number_is_refused(make, part):
    with pytest.raises(InvalidInput, match=part):
        make()
