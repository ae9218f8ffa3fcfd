"""Laws of streams of blocks: a history of each level, what gradients reach, the sink, and blocks in flight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models, streaming
from diffusion_jax.distributed import make_mesh, sequential
from diffusion_jax.errors import InvalidInput
from diffusion_jax.pipelined import caching_stage, clip_of
from diffusion_jax.solvers import flow_euler
from diffusion_jax.streaming import block_stream, in_flight, sample_stream, self_rollout
from diffusion_jax.timesteps import linspace
from tests.portraits import BLOCKS, DENOISER, FLOW, KEY, LEVELS, NETWORK, REFERENCE, SHAPE, cut, portrait

CLIP = (SHAPE[0], BLOCKS * SHAPE[1], *SHAPE[2:])
COND = {"audio": np.asarray(clip_of(portrait()[3]["audio"])), "reference": REFERENCE}
PLAIN, ADAPTIVE = (
    block_stream(NETWORK, FLOW, linspace(LEVELS), sink_at=3.0, adaptive_sink=adaptive) for adaptive in (False, True)
)


@functools.cache
def whole(adaptive=False):
    """`(x, cost, caches)` of the stream, as a program of `(params, cond, exit)`."""

    @jax.jit
    def run(params, cond, exit):
        made = sample_stream(KEY, ADAPTIVE if adaptive else PLAIN, params, shape=CLIP, cond=cond, exit=exit)
        return made.x, made.cost.evaluations, made.run.carry

    return lambda params, cond=COND, exit=LEVELS - 1: jax.device_get(run(params, cond, np.int32(exit)))


def test_each_level_has_a_history_of_its_own():
    params, empty, noise, cond = portrait()
    stage = caching_stage(DENOISER, flow_euler(), linspace(LEVELS))
    there, kept = jax.jit(sequential(stage, LEVELS))(params, empty, noise, cond)
    x, evaluations, caches = whole()(params)
    np.testing.assert_allclose(x, clip_of(there.run.x), atol=1e-5)
    for a, b in zip(jax.tree.leaves(caches), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert evaluations == BLOCKS * LEVELS
    # Left early, only the levels before have seen anything.
    _, evaluations, caches = whole()(params, exit=1)
    np.testing.assert_array_equal(caches.count, [BLOCKS, BLOCKS, 0])
    assert evaluations == BLOCKS * 2


@pytest.mark.parametrize("history", [None, 0.0])
def test_gradients_reach_one_evaluation_of_each_block_and_not_the_history(history):
    params, _, _, cond = portrait()
    stream = block_stream(NETWORK, FLOW, linspace(LEVELS), sink_at=3.0, history=history)
    exit = np.int32(1)

    @jax.jit
    def slope(params, state, first, told):
        """The gradient of what one of two blocks from `first` on has become, and the state after the first of them."""

        def loss(params):
            after, one = stream.advance(params, state, {"audio": cut(cond["audio"], first, 1)[0]}, exit)
            _, other = stream.advance(params, after, {"audio": cut(cond["audio"], first + 1, 1)[0]}, exit)
            return (jnp.where(told, other, one) ** 2).sum(), after

        return jax.grad(loss, has_aux=True)(params)

    begin = {"audio": cond["audio"][0], "reference": REFERENCE}
    state = jax.jit(lambda params: stream.prime(KEY, params, SHAPE, begin))(params)
    both, given = slope(params, state, 0, True)
    alone, _ = slope(params, given, 1, False)
    both, alone = jax.device_get((both, alone))
    norm = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(alone))
    assert norm > 0
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * norm)


def test_one_level_with_a_clean_history_is_plain_autoregression():
    params, _, noise, _ = portrait()
    stream = block_stream(NETWORK, FLOW, linspace(1), history=0.0)
    # Three blocks, of which the last sees both others: the window is not felt.
    told = {"audio": COND["audio"][:, :6], "reference": REFERENCE}
    shape = (SHAPE[0], 6, *SHAPE[2:])
    x0, evaluations = jax.device_get(
        jax.jit(
            lambda params: (
                (made := sample_stream(KEY, stream, params, shape=shape, cond=told)).x,
                made.cost.evaluations,
            )
        )(params)
    )
    x = np.asarray(clip_of(noise.run.x))[:, :6]
    assert evaluations == 3 * 2
    network = jax.jit(lambda params, x, t: NETWORK.apply(params, x, FLOW.network_time(t), told)[0])
    for i in range(0, 6, 2):
        # The whole clip at once: clean blocks at time 0, the next one at time 1, and what it does not see.
        clip = np.concatenate([x0[:, :i], x[:, i:]], axis=1)
        t = np.tile((np.arange(6) >= i).astype(np.float32), (2, 1))
        output = np.asarray(network(params, clip, t))
        np.testing.assert_allclose(x0[:, i : i + 2], (clip - output)[:, i : i + 2], atol=2e-5)


def test_the_streams_own_first_frame_takes_the_place_of_the_picture():
    params = portrait()[0]
    plain, _, _ = whole()(params)
    adapted, _, caches = whole(True)(params)
    np.testing.assert_allclose(adapted[:, :2], plain[:, :2], atol=1e-6)
    assert np.abs(adapted[:, 2:] - plain[:, 2:]).max() > 1e-3
    own = {**COND, "audio": COND["audio"][:, :2], "reference": adapted[:, 0]}
    sink = jax.jit(lambda params: DENOISER.init(params, jnp.zeros(SHAPE), own).sink)(params)
    for a, b in zip(jax.tree.leaves(caches.sink), jax.tree.leaves(sink), strict=True):
        for level in range(LEVELS):
            np.testing.assert_allclose(a[level], b, atol=1e-5)


def test_what_is_heard_later_does_not_reach_earlier_blocks():
    params = portrait()[0]
    later = COND["audio"] + (np.arange(CLIP[1]) >= 4)[:, None].astype(np.float32)
    plain, other = (whole(True)(params, {**COND, "audio": audio})[0] for audio in (COND["audio"], later))
    np.testing.assert_array_equal(other[:, :4], plain[:, :4])
    assert np.abs(other[:, 4:] - plain[:, 4:]).max() > 1e-3


def decode(x):
    return jnp.tanh(x[..., :1])


@pytest.mark.parametrize(("adaptive", "decoded"), [(True, True), (False, False)])
def test_blocks_in_flight_are_those_made_one_after_the_other(adaptive, decoded):
    params = portrait()[0]
    devices = LEVELS + decoded
    mesh = make_mesh(data=1, pipe=devices, devices=jax.devices()[:devices])
    fly = in_flight(ADAPTIVE if adaptive else PLAIN, decode=decode if decoded else None, mesh=mesh)
    flown = jax.device_get(jax.jit(lambda params: fly(KEY, params, shape=CLIP, cond=COND))(params))
    x, _, _ = whole(adaptive)(params)
    np.testing.assert_allclose(flown.x, x, atol=1e-5)
    if decoded:
        np.testing.assert_allclose(flown.shown, np.tanh(x[..., :1]), atol=1e-5)
    # The others wait for the first block where they must know its first frame.
    assert flown.ticks == BLOCKS + (2 if adaptive else 1) * (devices - 1)
    np.testing.assert_array_equal(flown.evaluations, BLOCKS)


def test_a_students_own_clips_pass_gradients_but_not_through_the_sink():
    params = portrait()[0]
    generate = self_rollout(NETWORK, FLOW, linspace(LEVELS), sink=(2.0, 8.0))
    batch = {"x0": np.zeros((SHAPE[0], 4, *SHAPE[2:]), np.float32), "index": np.arange(SHAPE[0])}
    batch["cond"] = {**COND, "audio": COND["audio"][:, :4]}

    @jax.jit
    def slope(params, key):
        def size(params):
            x = generate(params, batch, key)
            return jnp.mean(jnp.square(x)), x

        grads, x = jax.grad(size, has_aux=True)(params)
        return x, jax.tree.map(lambda leaf: jnp.abs(leaf).max(), grads)

    results = [jax.device_get(slope(params, jax.random.key(seed))) for seed in range(2)]
    assert results[0][0].shape == batch["x0"].shape
    assert np.abs(results[0][0] - results[1][0]).max() > 1e-2
    for _, grads in results:
        # Only the sink is marked as a reference, and the sink passes no gradient.
        assert grads.pop("reference_mark") == 0
        assert all(leaf > 0 for leaf in jax.tree.leaves(grads))


def test_what_cannot_be_streamed_is_refused():
    make = functools.partial(block_stream, NETWORK, FLOW)
    with pytest.raises(InvalidInput, match="history"):
        make(linspace(2), history=1.5)
    with pytest.raises(InvalidInput, match="grid"):
        make(np.ones((3, 1, 2)))
    with pytest.raises(InvalidInput, match="blocks of 2 frames"):
        sample_stream(KEY, PLAIN, {}, shape=(2, 5, 4, 4, 3), cond=COND)
    with pytest.raises(InvalidInput, match="an entry a frame"):
        sample_stream(KEY, PLAIN, {}, shape=(2, 4, 4, 4, 3), cond=COND)
    with pytest.raises(InvalidInput, match="reference"):
        sample_stream(KEY, ADAPTIVE, {}, shape=CLIP, cond={"audio": COND["audio"]})
    with pytest.raises(InvalidInput, match="history of each level"):
        in_flight(make(linspace(2), history=0.0))
    with pytest.raises(InvalidInput, match="video_dit"):
        streaming.block_stream(models.mlp(width=8, depth=1), FLOW, linspace(2))
