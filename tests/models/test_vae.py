"""Laws of the KL autoencoder: its Gaussian, its scaling, its sizes, tiles and bands, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.distributed import make_mesh
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import GaussianPosterior, count_params, kl_vae, sharded_rows, tiled
from diffusion_jax.models.tiling import in_tiles
from diffusion_jax.randomness import sample_keys
from tests.models.drawn import drawn
from tests.models.shared import compiled, image

TINY = {"preset": "small", "channels": 8, "groups": 4, "attention": True}
X = image((2, 8, 12, 3))


@pytest.fixture(scope="module")
def tiny():
    vae = kl_vae(**TINY, scaling_factor=0.5, shift_factor=0.25)
    return vae, drawn(jax.eval_shape(vae.init, jax.random.key(0), X))


def test_latents_and_reconstructions_have_their_shapes_also_when_not_square(tiny):
    vae, params = tiny
    posterior = jax.jit(vae.posterior)(params, X)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 6, 4)
    assert jax.jit(vae.decode)(params, posterior.mean).shape == X.shape
    assert vae.module.factor == 2


def test_scaling_is_undone_by_the_decoder(tiny):
    vae, params = tiny
    posterior, latents = jax.jit(lambda p: (vae.posterior(p, X), vae.encode(p, X)))(params)
    np.testing.assert_allclose(latents, 0.5 * (posterior.mean - 0.25), atol=1e-6)
    plain = kl_vae(**TINY)
    expected = jax.jit(plain.decode)(params, posterior.mean)
    np.testing.assert_allclose(jax.jit(vae.decode)(params, latents), expected, atol=1e-5)


def test_each_channel_of_the_latents_has_its_mean_and_deviation(tiny):
    _, params = tiny
    mean, std = np.array([0.5, -1.0, 0.0, 2.0], np.float32), np.array([1.0, 0.5, 2.0, 4.0], np.float32)
    vae = kl_vae(**TINY, scaling_factor=0.5, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))
    z = np.random.default_rng(0).normal(size=(2, 4, 6, 4)).astype(np.float32)
    np.testing.assert_allclose(vae.scale(z), (z - mean) / std * 0.5, rtol=1e-6)
    decoded = compiled(vae.decode)(params, vae.scale(z))
    np.testing.assert_allclose(decoded, compiled(kl_vae(**TINY).decode)(params, z), atol=1e-5)


def test_remat_changes_neither_values_nor_gradients(tiny):
    vae, params = tiny

    def value_and_grad(vae):
        return compiled(jax.value_and_grad(lambda p: jnp.square(vae.posterior(p, X).mean).mean()))(params)

    (expected, gradients), (value, recomputed) = value_and_grad(vae), value_and_grad(kl_vae(**TINY, remat="full"))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), recomputed, gradients)


def test_bfloat16_is_close_and_keeps_float32_outside(tiny):
    vae, params = tiny
    low = kl_vae(**TINY, scaling_factor=0.5, shift_factor=0.25, dtype="bfloat16")
    x, y = jax.jit(lambda p: (low.decode(p, low.encode(p, X)), vae.decode(p, vae.encode(p, X))))(params)
    assert x.dtype == jnp.float32 and 0 < float(jnp.abs(x - y).mean() / y.std()) < 0.05


def test_kl_is_zero_for_the_prior_and_the_integral_elsewhere():
    zero = jnp.zeros((1, 1, 1, 1))
    assert float(GaussianPosterior(zero, zero).kl()[0]) == 0.0
    mean, logvar = 0.7, -0.4
    z = np.linspace(-12, 12, 200001)
    log_q = -0.5 * ((z - mean) ** 2 / np.exp(logvar) + logvar + np.log(2 * np.pi))
    log_p = -0.5 * (z**2 + np.log(2 * np.pi))
    expected = np.trapezoid(np.exp(log_q) * (log_q - log_p), z)
    posterior = GaussianPosterior(jnp.full((2, 2, 3, 4), mean), jnp.full((2, 2, 3, 4), logvar))
    np.testing.assert_allclose(posterior.kl(), [24 * expected] * 2, rtol=1e-5)


def test_samples_have_the_mean_and_variance_of_the_posterior_and_belong_to_their_keys():
    posterior = GaussianPosterior(jnp.full((3, 16, 16, 4), 0.5), jnp.full((3, 16, 16, 4), -1.0))
    keys = sample_keys(jax.random.key(0), jnp.arange(3))
    z = posterior.sample(keys)
    np.testing.assert_allclose(z.mean(), 0.5, atol=4 * np.exp(-0.5) / np.sqrt(z.size))
    np.testing.assert_allclose(z.var(), np.exp(-1.0), rtol=0.1)
    alone = GaussianPosterior(posterior.mean[1:2], posterior.logvar[1:2]).sample(keys[1:2])
    np.testing.assert_array_equal(alone[0], z[1])


def test_published_number_of_parameters():
    """KL-f8 of latent diffusion and Stable Diffusion has 83,653,863 parameters."""
    vae = kl_vae("kl_f8")
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(vae.init, jax.random.key(0), x)
    assert count_params(params) == 83_653_863
    assert jax.eval_shape(vae.encode, params, x).shape == (1, 8, 8, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "kl-f8"}, "did you mean 'kl_f8'"),
        ({"latent_chanels": 4}, "did you mean 'latent_channels'"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"multipliers": (1, 0)}, "multipliers is"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0"),
        ({"latents_mean": (0.0,) * 4}, r"latents_std is \(\)"),
        ({"latents_mean": (0.0,) * 4, "latents_std": (1.0, 1.0, 1.0, 0.0)}, "positive numbers are needed"),
        ({"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4, "shift_factor": 0.1}, "shift_factor must be 0"),
        ({"remat": "yes"}, "remat is 'yes'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
    ],
)
def test_wrong_fields_are_told_at_construction(fields, message):
    with pytest.raises(InvalidInput, match=message):
        kl_vae(**fields)


def test_wrong_inputs_are_told(tiny):
    vae, params = tiny
    for x, message in ((X[:, :7], "divisible by 2"), (X[..., :1], "data_channels=3"), (X[0], r"\[B, H, W, C\]")):
        with pytest.raises(InvalidInput, match=message):
            vae.encode(params, x)
    with pytest.raises(InvalidInput, match="latents"):
        vae.decode(params, X)


@pytest.fixture(scope="module")
def deep():
    vae = kl_vae(**{**TINY, "multipliers": (1, 1.5, 2)}, scaling_factor=0.5)
    x = jax.random.normal(jax.random.key(2), (2, 64, 96, 3))
    z = np.repeat(np.asarray(x)[:, ::4, ::4, :1], 4, axis=-1)
    return vae, drawn(jax.eval_shape(vae.init, jax.random.key(0), x)), x, jax.device_put(z)


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b)


def test_an_image_no_larger_than_a_tile_is_computed_as_without_tiles(deep):
    vae, params, x, z = deep
    big = tiled(vae, 24)
    np.testing.assert_array_equal(jax.jit(big.decode)(params, z), jax.jit(vae.decode)(params, z))
    np.testing.assert_array_equal(jax.jit(big.encode)(params, x), jax.jit(vae.encode)(params, x))


def test_tiles_are_within_a_twentieth_of_the_whole(deep):
    """White noise through random weights; what is left are the statistics of group norms."""
    vae, params, x, z = deep
    big = tiled(vae, 16, 8)
    assert 1e-5 < relative(jax.jit(big.decode)(params, z), jax.jit(vae.decode)(params, z)) < 0.05
    assert 1e-5 < relative(jax.jit(big.encode)(params, x), jax.jit(vae.encode)(params, x)) < 0.05


@pytest.mark.parametrize(("unit_in", "unit_out"), [(1, 2), (2, 1)])
def test_tiles_of_a_local_map_are_exact(unit_in, unit_out):
    """A 3 x 3 window reaches one latent far, the quarter of an overlap without weight is one latent wide."""
    x = jax.random.normal(jax.random.key(3), (2, 11 * unit_in, 16 * unit_in, 2))
    kernel = jax.random.normal(jax.random.key(4), (3, 3, 2, 2))

    def local(h):
        y = jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y.repeat(unit_out, 1).repeat(unit_out, 2)[:, ::unit_in, ::unit_in]

    pieces = jax.jit(lambda x: in_tiles(local, x, 7, 4, unit_in, unit_out))(x)
    np.testing.assert_allclose(pieces, local(x), atol=1e-5)


def test_tiles_take_less_memory(deep):
    vae, params, _, _ = deep
    z = jax.ShapeDtypeStruct((1, 128, 128, 4), jnp.float32)

    def temporary(vae):
        return jax.jit(vae.decode).lower(params, z).compile().memory_analysis().temp_size_in_bytes

    assert temporary(tiled(vae, 32, 8)) < 0.5 * temporary(vae)


def test_bands_of_rows_on_eight_devices_are_the_whole(deep):
    vae, params, x, z = deep
    cut = sharded_rows(vae, make_mesh(data=1, sequence=8))
    decode = jax.jit(cut.decode)
    image = decode(params, z)
    assert image.sharding.spec[1] == "sequence"
    np.testing.assert_allclose(image, jax.jit(vae.decode)(params, z), atol=1e-5)
    np.testing.assert_allclose(jax.jit(cut.encode)(params, x), jax.jit(vae.encode)(params, x), atol=1e-5)
    program = decode.lower(params, z).compile().as_text()
    # Rows at the borders are exchanged; only the keys and values of the middle are gathered.
    assert program.count(" collective-permute(") > 10 and program.count(" all-gather(") <= 2


def test_wrong_tiles_and_bands_are_told(deep):
    vae, params, _, z = deep
    with pytest.raises(InvalidInput, match="overlap is 16"):
        tiled(vae, 16, 16)
    with pytest.raises(InvalidInput, match="tile is 0"):
        tiled(vae, 0)
    mesh = make_mesh(data=1, sequence=8)
    with pytest.raises(InvalidInput, match="did you mean 'sequence'"):
        sharded_rows(vae, mesh, "sequences")
    with pytest.raises(InvalidInput, match="must divide by the 8"):
        sharded_rows(vae, mesh).decode(params, z[:, :12])
