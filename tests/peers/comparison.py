"""What the parity tests of transformers share: peers with weights that are nowhere trivial, and the comparisons.

Imported by tests of the peers extra only.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from diffusion_jax import interop
from diffusion_jax.interop.families import network_fields
from diffusion_jax.interop.tables import slots, their_shapes
from diffusion_jax.models import by_path
from tests.peers.figures import record

TOLERANCE = 1e-4
LOW = 1e-2
"""Largest relative error of bfloat16."""


class Case(NamedTuple):
    """A peer's class and config, and a call of both: `peer_call(peer, x)` and `cond`, `t`, with x `[B, H, W, C]`.

    The peer's answer is channels-last, all its channels.
    """

    peer_class: Any
    config: dict
    peer_call: Any
    x: np.ndarray
    t: np.ndarray
    cond: dict


def randomised(peer, seed=0):
    """The peer with random parameters throughout: zero-initialised ones, biases and the scales of norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise * weight[0].numel() ** -0.5)
            else:
                weight.copy_(0.1 * noise + name.endswith("weight"))
    return peer.eval()


def ours(pretrained, case, **fields):
    """`x -> output [B, H, W, K]`: prediction and log-variance side by side."""
    network = pretrained.network
    t, cond = jnp.asarray(case.t, jnp.float32), jax.tree.map(jnp.asarray, case.cond)

    @jax.jit
    def call(x):
        output, extras = network.apply(pretrained.params, x, t, cond)
        return jnp.concatenate([output, *extras.values()], axis=-1)

    return call


def check_parity(case, peer, tmp_path, low=False, **options):
    """Outputs, input gradients, the way back, and with `low` bfloat16; returns the network and the largest error."""
    torch.set_num_threads(1)
    peer.save_pretrained(tmp_path / "peer")
    pretrained = interop.load_pretrained(tmp_path / "peer", **options)
    x = torch.tensor(case.x, requires_grad=True)
    expected = case.peer_call(peer, x)
    weights = np.random.default_rng(7).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()
    call = ours(pretrained, case)
    found, pullback = jax.vjp(call, jnp.asarray(case.x))
    expected = expected.detach().numpy()
    error = float(np.abs(found - expected).max())
    assert error <= TOLERANCE, error
    record("network", pretrained.family, error)
    np.testing.assert_allclose(pullback(jnp.asarray(weights))[0], x.grad.numpy(), atol=TOLERANCE)
    assert np.abs(expected).max() > 0.1

    interop.save_pretrained(tmp_path / "ours", pretrained)
    back = case.peer_class.from_pretrained(tmp_path / "ours").eval()
    again = peer.state_dict()
    assert {name: value.shape for name, value in back.state_dict().items()} == {n: v.shape for n, v in again.items()}
    with torch.no_grad():
        np.testing.assert_allclose(case.peer_call(back, torch.tensor(case.x)).numpy(), expected, atol=TOLERANCE)
    if low:
        half = interop.load_pretrained(tmp_path / "peer", dtype="bfloat16", **options)
        difference = np.asarray(ours(half, case)(jnp.asarray(case.x))) - expected
        relative = float(np.linalg.norm(difference) / np.linalg.norm(expected))
        assert relative <= LOW, relative
    return pretrained, error


def check_true_size(peer_class, config, family, ignored=(), **overrides):
    """Names and shapes of a published config: the peer's on the meta device are those that the table maps."""
    with torch.device("meta"):
        peer = peer_class(**config)
    entry = interop.FAMILIES[family]
    network = entry.make(**{**network_fields(family, config), **overrides})
    shapes = {path: leaf.shape for path, leaf in by_path(entry.shapes(network)).items()}
    expected = {name: tuple(value.shape) for name, value in peer.state_dict().items() if name not in ignored}
    assert their_shapes(slots(entry.table(network.module), shapes)) == expected
    return network
