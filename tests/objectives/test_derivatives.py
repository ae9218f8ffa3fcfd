"""Where a loss is finite its gradient is: perfect predictions, empty data, both ends of time; and half precision.

A loss of a network that computes in half precision is that of float32 arithmetic on what the network said.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, objectives, processes, timesteps
from diffusion_jax.models import dual_encoder
from diffusion_jax.models.early_exit import EarlyExit, Layers
from diffusion_jax.models.encoders import Encoded, Encoder
from diffusion_jax.models.vae import Autoencoder, GaussianPosterior
from diffusion_jax.time_axes import expand
from diffusion_jax.training import ema
from diffusion_jax.typing import Network

KEY = jax.random.key(0)
PREDICTIONS = sorted(processes.PARAMETERIZATIONS)
WEIGHTS = {
    "none": None,
    "min_snr": timesteps.min_snr_weight(),
    "elbo": timesteps.elbo_weight(),
}
PARAMS = {"slope": jnp.zeros(()), "said": jnp.zeros(())}
TIMES = jnp.asarray([0.0, 0.0, 0.5, 0.5, 1.0, 1.0])
X0 = jnp.zeros((6, 4)).at[1::2].set(jnp.arange(4.0))
"""At each time an example that is zero, which the network knows, and another, which it does not."""


def apply(params, x, t, cond=None, train=False, key=None):
    return params["slope"] * x + params["said"], {}


NETWORK = Network(lambda *_: PARAMS, apply)
LAYERS = Network(
    lambda *_: PARAMS,
    lambda params, x, t, cond=None, train=False, key=None: (
        Layers(*(jnp.stack([apply(params, x, t)[0], jnp.zeros_like(x)]) + 0 * params["said"] for _ in range(2))),
        {},
    ),
)
EXITS = EarlyExit(None, LAYERS, None, None, None, 2)


def flow(prediction="x0"):
    return processes.rectified_flow(prediction, time="t")


def zero_logits(params, x, t, cond=None, train=False, key=None):
    return jnp.zeros((*x.shape, 5)) + params["said"], {}


def autoencoder():
    def posterior(params, x):
        return GaussianPosterior(params["slope"] * x, jnp.full(x.shape, -1e3) + params["said"])

    return Autoencoder(None, posterior, lambda z: z, None, lambda params, z: z)


def gradient(objective, batch, params=PARAMS):
    """Losses and their gradient, both of which must be finite."""
    state = objective.init(KEY, params, batch)
    losses, backwards = jax.vjp(lambda params: objective.loss(params, state, batch, KEY)[0], params)
    slopes = backwards(jnp.ones_like(losses))[0]
    for leaf in (losses, *jax.tree.leaves(slopes)):
        assert np.isfinite(leaf).all()
    return losses


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_and_weight_has_a_gradient_at_both_ends(prediction):
    batch = {"x0": X0, "t": TIMES}
    for weight in WEIGHTS.values():
        losses = gradient(objectives.denoising(NETWORK, flow(prediction), weight=weight), batch)
        if prediction == "x0":
            # Of all examples that are zero, nothing is wrong.
            np.testing.assert_array_equal(losses[::2], 0)
    gradient(objectives.layerwise(LAYERS, flow(prediction)), {"x0": X0})


@pytest.mark.parametrize("process", [processes.absorbing(5), processes.uniform(5)], ids=["absorbing", "uniform"])
def test_tokens_have_a_gradient_whether_all_or_none_are_lost(process):
    batch = {"x0": jnp.zeros((6, 4), jnp.int32), "t": TIMES}
    for weighting in ("cross_entropy", "nelbo")[: 2 if process.kind == "absorbing" else 1]:
        network = Network(lambda *_: PARAMS, zero_logits)
        losses = gradient(objectives.masked(network, process, weighting=weighting), batch)
        np.testing.assert_allclose(losses[-1], np.log(5), rtol=1e-6)


def test_objectives_have_a_gradient_where_nothing_is_left_to_learn():
    process = flow()
    teacher, batch = denoisers.denoiser(NETWORK, process), {"x0": jnp.zeros((6, 4)), "t": TIMES}
    np.testing.assert_array_equal(gradient(objectives.imitation(NETWORK, process, teacher, PARAMS), batch), 0)
    with_exits = objectives.with_exits(
        lambda network: objectives.imitation(network, process, teacher, PARAMS),
        EXITS,
    )
    np.testing.assert_array_equal(gradient(with_exits, batch), 0)
    matching = objectives.distribution_matching(
        lambda params, batch, key: 0.0 * batch["x0"] + params["said"], teacher, PARAMS, NETWORK, every=1
    )
    both = {"student": PARAMS, "fake": PARAMS}
    np.testing.assert_array_equal(gradient(matching, {"x0": jnp.zeros((6, 4))}, both), 0)
    for reconstruction in ("l1", "l2"):
        losses = gradient(objectives.vae_loss(autoencoder(), 0.0, reconstruction), {"x0": jnp.zeros((2, 4, 4, 1))})
        np.testing.assert_array_equal(losses, 0)


def test_vectors_without_a_length_have_no_direction_and_a_gradient():
    def encode(params, x, mask=None):
        hidden = jnp.zeros((len(x), 1, 3))
        return Encoded(hidden, params["said"] * jnp.ones((len(x), 3)), hidden[None])

    encoder = Encoder(lambda key, x: {}, encode, lambda params, h: h)
    network = dual_encoder(encoder, encoder)
    batch = {"x0": {"image": jnp.zeros((4, 2, 2, 1)), "text": jnp.arange(4)[:, None]}}
    for said in (0.0, 1.0):
        params = {"image": {"said": jnp.float32(said)}, "text": {"said": jnp.float32(said)}, "log_scale": jnp.zeros(())}
        np.testing.assert_allclose(gradient(objectives.contrastive(network), batch, params), np.log(4), rtol=1e-5)


def half(function):
    """A network that computes in bfloat16."""

    def apply(params, x, t, cond=None, train=False, key=None):
        return function(x, expand(t, x)).astype(jnp.bfloat16), {}

    return Network(lambda *_: PARAMS, apply)


def test_losses_of_a_network_in_half_precision_are_those_of_float32():
    """The mean of many small squares in half precision would be off in the third digit."""
    rng, process = np.random.default_rng(1), flow()
    x0 = jnp.asarray(0.1 * rng.standard_normal((3, 4000)), jnp.float32)
    network, batch = half(lambda x, t: 1.001 + 0.0 * x), {"x0": x0, "t": jnp.full(3, 0.5)}
    said = float(jnp.bfloat16(1.001))
    exact = np.square(said - np.asarray(x0, np.float64)).mean(1)
    # The teacher of the second says zero.
    imitated = objectives.imitation(network, process, denoisers.denoiser(NETWORK, process), PARAMS)
    for objective, expected in ((objectives.denoising(network, process), exact), (imitated, said**2)):
        losses = objective.loss(PARAMS, objective.init(KEY, PARAMS, batch), batch, KEY)[0]
        assert losses.dtype == jnp.float32
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
    blurred = autoencoder()._replace(decode=lambda params, z: jnp.ones(z.shape, jnp.bfloat16))
    images = x0.reshape(3, 20, 20, 10).astype(jnp.bfloat16)
    losses = objectives.vae_loss(blurred, 0.0, "l2").loss(PARAMS, (), {"x0": images}, KEY)[0]
    exact = 0.5 * np.square(1 - np.asarray(images, np.float64)).reshape(3, -1).mean(1)
    np.testing.assert_allclose(losses, exact, rtol=1e-5)


def test_an_average_of_parameters_in_half_precision_moves():
    """What a step adds is less than half of the last bit of bfloat16: the average would stay where it began."""
    tracks = {"slow": ema.fixed(0.999)}
    averages, params = ema.init(tracks, {"w": jnp.ones(3, jnp.bfloat16)}), {"w": jnp.full(3, 2.0, jnp.bfloat16)}
    for count in range(1, 101):
        averages = ema.update(tracks, averages, params, count)
    np.testing.assert_allclose(averages["slow"]["w"], 2 - 0.999**100, rtol=1e-5)
