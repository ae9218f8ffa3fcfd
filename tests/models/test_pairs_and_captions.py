"""Vectors of images and texts in one space; texts as continuous latents that are read back token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import models, objectives
from diffusion_jax.errors import InvalidInput
from tests.models.drawn import drawn
from tests.models.shared import changed, compiled, image

KEY = jax.random.key(0)
TEXTS = jnp.array([[1, 2, 3, 5], [2, 2, 1, 5], [3, 1, 1, 5], [1, 2, 3, 5]])
SMALL = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 16}


def pair(projection=8):
    vision = models.clip_vision("small", image_size=8, patch=4, channels=1, projection=8, **SMALL)
    text = models.clip_text("small", vocab_size=6, positions=4, projection=projection, **SMALL)
    return models.dual_encoder(vision, text)


def fitted(loss, params, steps, rate=1e-2):
    optimizer = optax.adam(rate)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0])(params)


def test_images_learn_to_find_their_texts():
    network, x = pair(), {"image": image((4, 8, 8, 1)), "text": TEXTS}
    objective, params = objectives.contrastive(network), network.init(KEY, x)
    assert float(network.scale(params)) == pytest.approx(1 / 0.07, rel=1e-5)

    def loss(params):
        return objective.loss(params, (), {"x0": x}, KEY)[0].mean()

    params = fitted(loss, params, 40)
    value, aux = compiled(lambda params: objective.loss(params, (), {"x0": x}, KEY))(params)
    assert value.shape == (4,) and float(aux.metrics["retrieval"]) == 1.0
    vectors = compiled(network.embed)(params, x)
    np.testing.assert_allclose(np.linalg.norm(vectors["image"], axis=1), 1.0, rtol=1e-5)
    # Images 0 and 3 have the same text, which is a right answer for both: the floor is log 2, of the half that answers.
    np.testing.assert_array_equal(vectors["text"][0], vectors["text"][3])
    assert set(jax.eval_shape(network.embed, params, {"text": TEXTS})) == {"text"}
    assert value[0] > 0.69 and value[1:3].max() < 0.2


def test_pooled_vectors_must_have_one_length():
    with pytest.raises(InvalidInput, match="two of the same length"):
        jax.eval_shape(pair(projection=6).init, KEY, {"image": jnp.zeros((1, 8, 8, 1)), "text": TEXTS[:1]})


def test_texts_are_read_back_from_their_latents():
    network = models.caption_decoder(6, 4, latent_channels=3, **SMALL)
    hidden = jax.device_put(np.asarray(image((6, 16)))[np.asarray(TEXTS)])
    params = network.init(KEY, hidden)
    objective, batch = objectives.caption_loss(network), {"x0": hidden, "cond": {"tokens": TEXTS}}
    params = fitted(lambda params: objective.loss(params, (), batch, KEY)[0].mean(), params, 80)
    loss, aux = compiled(lambda params: objective.loss(params, (), batch, KEY))(params)
    assert loss.shape == (4,) and float(aux.metrics["exact"]) == 1.0
    latents = compiled(network.encode)(params, hidden)
    assert latents.shape == (4, 4, 3)
    np.testing.assert_array_equal(jax.jit(network.decode)(params, latents), TEXTS)


def test_the_decoder_sees_all_latents_and_only_earlier_tokens():
    network = models.caption_decoder(6, 4, latent_channels=3, **SMALL)
    latents, texts, logits = np.asarray(image((1, 2, 3))), np.asarray(TEXTS[:1]), compiled(network.logits)
    params = drawn(jax.eval_shape(network.init, KEY, jnp.zeros((1, 2, 16))))
    plain = logits(params, latents, texts)
    later = logits(params, latents, changed(texts, (0, 2), 0))
    np.testing.assert_array_equal(plain[:, :3], later[:, :3])
    assert not np.allclose(plain[:, 3], later[:, 3])
    other = logits(params, changed(latents, (0, 1), latents[0, 1] + 1.0), texts)
    assert (np.abs(other - plain).max(-1) > 1e-4).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"heads": 3}, "divide by the number of heads"), ({"depth": 0}, "depth is 0"), ({"deep": 1}, "field of caption")],
)
def test_mistakes_are_told(fields, message):
    with pytest.raises(InvalidInput, match=message):
        models.caption_decoder(6, 4, **{**SMALL, **fields})
