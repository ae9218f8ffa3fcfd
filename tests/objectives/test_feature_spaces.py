"""Feature spaces: what each of them can and cannot see, random features as kernels, conditions, banks of data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import objectives
from diffusion_jax.errors import InvalidInput
from diffusion_jax.objectives import gaussian_kernel, linear_kernel, polynomial_kernel, squared_mmd

KEY = jax.random.key(0)
PAIRED = objectives.paired(objectives.raw_space(gaussian_kernel()), 2)


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def between(space, x, y, unbiased=False, cond=(None, None)):
    """MMD^2 of two sets in a space."""
    parts = (space.describe(space.params, one, c) for one, c in zip((x, y), cond, strict=True))
    return float(squared_mmd(*parts, space.kernel, unbiased))


def test_random_fourier_features_are_the_gaussian_kernel():
    x, y = drawn(0, 16, 2), drawn(1, 16, 2) + 0.5
    fourier = objectives.fourier_space(linear_kernel(), 2, count=40_000, bandwidth=0.7)
    features = fourier.features(fourier.params, x)
    gram = np.asarray(features @ features.T) / features.shape[1]
    np.testing.assert_allclose(gram, gaussian_kernel((0.7,))(x, x), atol=0.03)
    exact = between(objectives.raw_space(gaussian_kernel((0.7,))), x, y)
    np.testing.assert_allclose(between(fourier, x, y) / features.shape[1], exact, atol=0.02)


def test_a_cubic_kernel_of_the_entries_sees_three_moments_and_rich_features_more():
    """+-1, and 0 and +-sqrt(3 / 2) alike: their moments of the orders 1 to 3 agree."""
    x, y = np.float32([[-1], [1], [-1], [1], [-1], [1]]), np.float32(np.sqrt(1.5) * np.array([[-1], [0], [1]] * 2))
    assert abs(between(objectives.raw_space(polynomial_kernel(3)), x, y)) < 1e-5
    assert between(objectives.raw_space(polynomial_kernel(4)), x, y) > 0.1
    assert between(objectives.raw_space(gaussian_kernel((0.5,))), x, y) > 0.1
    assert between(objectives.fourier_space(polynomial_kernel(3), 1), x, y) > 0.1


def test_pairs_are_told_from_sets():
    """Samples of the right classes, exchanged: as sets they are the data."""
    x = np.float32([[-1], [-1], [1], [1]])
    asked, exchanged = {"label": np.array([0, 0, 1, 1])}, {"label": np.array([1, 1, 0, 0])}
    plain = objectives.raw_space(gaussian_kernel())
    paired = objectives.paired(plain, 2, 2.0)
    assert between(plain, x, x, cond=(asked, exchanged)) == pytest.approx(0.0, abs=1e-6)
    assert between(paired, x, x, cond=(asked, asked)) == pytest.approx(0.0, abs=1e-6)
    assert between(paired, x, x, cond=(asked, exchanged)) > 0.1
    same, other = paired.describe((), x[:1], {"label": np.array([0])}), paired.describe((), x[:1], {"label": [1]})
    np.testing.assert_allclose(paired.kernel(same, other), np.exp(-4.0), rtol=1e-5)


def test_standardised_features_have_one_scale_and_a_bank_is_the_data():
    x = 3.0 + 5.0 * drawn(0, 10, 3)
    x[:, 1] = 7.0
    space = objectives.standardised(objectives.raw_space(polynomial_kernel()), x, batch_size=4)
    bank = objectives.banked(space, x, batch_size=4).bank
    np.testing.assert_allclose(bank, space.describe(space.params, x, None), atol=1e-6)
    np.testing.assert_allclose(bank.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(bank.std(0), [1, 0, 1], atol=1e-5)
    again = objectives.standardised(objectives.banked(PAIRED, x, {"label": np.zeros(10, int)}), x)
    assert again.bank is None and again.condition is PAIRED.condition


def test_samples_data_and_banks_are_of_their_own_conditions():
    x, cond = drawn(0, 6, 2), {"label": np.array([0, 1, 1, 0, 1, 0])}
    bank = objectives.banked(PAIRED, x, cond, batch_size=4).bank
    np.testing.assert_allclose(bank, np.concatenate([x, np.eye(2)[cond["label"]]], axis=1), atol=1e-6)
    objective = objectives.kernel_matching(lambda params, batch, key: batch["x0"] + params, [PAIRED])
    batch = {"x0": x, "cond": cond}
    losses, _ = objective.loss(0.3, objective.init(KEY, 0.3, batch), batch, KEY)
    moved = np.concatenate([x + np.float32(0.3), bank[:, 2:]], axis=1)
    np.testing.assert_allclose(losses, squared_mmd(moved, bank, PAIRED.kernel), rtol=1e-4)


def test_random_convolutions_have_biases():
    """Without them a picture of zeros would have no features."""
    space = objectives.convolution_space(gaussian_kernel(), (4, 4, 1), channels=(3,))
    assert np.abs(space.features(space.params, np.zeros((1, 4, 4, 1), np.float32))).max() > 1e-3


def test_a_loss_against_a_bank_is_in_the_mean_that_against_all_of_it():
    plain = objectives.paired(objectives.raw_space(gaussian_kernel((1.0,))), 2)
    data = {"x0": drawn(0, 40, 2), "cond": {"label": np.arange(40) % 2}}
    made, cond = drawn(1, 8, 2), {"label": np.arange(8) % 2}
    space = objectives.banked(plain, data["x0"], data["cond"])
    objective = objectives.kernel_matching(lambda params, batch, key: made + params, [space])
    # Another x0, which does not count.
    batch = {"x0": np.full((8, 2), 100.0, np.float32), "cond": cond}
    state = objective.init(KEY, jnp.zeros(2), batch)

    @jax.jit
    def losses(keys):
        return jax.vmap(lambda key: objective.loss(jnp.zeros(2), state, batch, key)[0][0])(keys)

    found = np.asarray(losses(jax.random.split(KEY, 100)))
    expected = squared_mmd(plain.describe((), made, cond), space.bank, plain.kernel)
    assert abs(found.mean() - expected) < 4 * found.std() / 10 and found.std() > 0.01
    # As many samples as rows: each row is there once.
    every = {**data, "index": jnp.arange(40)}
    whole = objectives.kernel_matching(lambda params, batch, key: 2 * data["x0"], [space])
    loss = whole.loss((), whole.init(KEY, (), every), every, KEY)[0][0]
    expected = squared_mmd(plain.describe((), 2 * data["x0"], data["cond"]), space.bank, plain.kernel)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    grads = jax.grad(lambda params: objective.loss(params, state, batch, KEY)[0].mean())(jnp.zeros(2))
    assert float(jnp.abs(grads).min()) > 1e-3


def test_random_convolutions_see_every_pixel_of_every_image_by_itself():
    space, x = objectives.convolution_space(polynomial_kernel(), (6, 5, 2), (4, 8)), drawn(0, 3, 6, 5, 2)
    features, pull = jax.vjp(lambda x: space.features(space.params, x), x)
    assert features.shape == (3, 3 * 3 * 8)
    (grads,) = pull(jnp.zeros_like(features).at[1].set(1.0))
    assert float(jnp.abs(grads[1]).min()) > 0 and float(jnp.abs(grads[::2]).max()) == 0


IMAGES = objectives.convolution_space(linear_kernel(), (2, 2, 1), (1,))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: objectives.fourier_space(linear_kernel(), 2, bandwidth=0.0), "bandwidth"),
        (lambda: between(objectives.fourier_space(linear_kernel(), 2), drawn(0, 4, 3), drawn(0, 4, 3)), "drawn for 2"),
        (lambda: objectives.fourier_space(linear_kernel(), 2, bandwidth=np.nan), "bandwidth"),
        (lambda: between(IMAGES, drawn(0, 4, 2), drawn(0, 4, 2)), r"drawn for \(2, 2, 1\)"),
        (lambda: objectives.standardised(objectives.raw_space(linear_kernel()), drawn(0, 0, 2)), "x0 is empty"),
        (lambda: objectives.convolution_space(linear_kernel(), (8,)), "of an image"),
        (lambda: objectives.convolution_space(linear_kernel(), (8, 8, 1), ()), "channels"),
        (lambda: objectives.paired(PAIRED, 0), "classes"),
        (lambda: PAIRED.condition({"text": 1}), "no such entry"),
        (lambda: objectives.banked(objectives.raw_space(linear_kernel()), drawn(0, 1, 2)), "at least"),
        (lambda: PAIRED.describe((), drawn(0, 4, 2), None), "no 'cond'"),
    ],
)  # fmt: skip
def test_wrong_calls_are_told(call, told):
    with pytest.raises(InvalidInput, match=told):
        call()
