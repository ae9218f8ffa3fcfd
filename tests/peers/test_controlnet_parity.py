"""A U-Net with ControlNets equals diffusers' `ControlNetModel` in front of its U-Net."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import interop
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.families import network_fields
from diffusion_jax.models import controlled
from diffusion_jax.models.controlnet import control_from_unet

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from tests.peers.comparison import TOLERANCE, check_true_size, randomised  # noqa: E402
from tests.peers.figures import record  # noqa: E402
from tests.peers.test_unet_parity import CASES, SD15, SDXL, T, case, peer_arguments  # noqa: E402

pytestmark = pytest.mark.peers

OWN = ("up_block_types", "out_channels", "time_embedding_dim")
CONTROL = {"conditioning_channels": 2, "conditioning_embedding_out_channels": (4, 5, 6)}


def channels_first(value):
    return torch.as_tensor(value).permute(0, 3, 1, 2)


def pictures(count=1):
    return np.random.default_rng(3).uniform(size=(count, 2, 16, 24, 2)).astype(np.float32)


def peers(name, count=1):
    """A U-Net of the peer and ControlNets for it."""
    shared = {key: value for key, value in CASES[name].items() if key not in OWN}
    made = [diffusers.ControlNetModel(**shared, **CONTROL) for _ in range(count)]
    controls = [randomised(each, seed + 1) for seed, each in enumerate(made)]
    return randomised(diffusers.UNet2DConditionModel(**CASES[name])), controls


def peer_controlled(unet, controls, scales, x, arguments, hints):
    """The peer's prediction, `[B, H, W, C]`, with its ControlNets' residuals added up."""
    down, mid = None, 0
    for control, scale, hint in zip(controls, scales, hints, strict=True):
        more, last = control(x, torch.tensor(T), controlnet_cond=channels_first(hint), conditioning_scale=scale,
                             **arguments, return_dict=False)  # fmt: skip
        down = more if down is None else [a + b for a, b in zip(down, more, strict=True)]
        mid = mid + last
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return unet(x, torch.tensor(T), **arguments, **residuals).sample.permute(0, 2, 3, 1)


@pytest.mark.parametrize(("name", "scales"), [("sdxl", (0.7,)), ("classes", (0.5, 1.3))])
def test_the_controlled_network_is_the_peers(name, scales, tmp_path):
    torch.set_num_threads(1)
    one, hints = case(name), pictures(len(scales))
    unet, controls = peers(name, len(scales))
    x = torch.tensor(one.x, requires_grad=True)
    arguments = peer_arguments(one.cond)
    expected = peer_controlled(unet, controls, scales, channels_first(x), arguments, hints)
    plain = unet(channels_first(x), torch.tensor(T), **arguments).sample.permute(0, 2, 3, 1)
    assert float((expected - plain).detach().abs().max()) > 0.1
    weights = np.random.default_rng(7).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()

    loaded = []
    for i, peer in enumerate((unet, *controls)):
        peer.save_pretrained(tmp_path / str(i))
        loaded.append(interop.load_pretrained(tmp_path / str(i)))
    single = len(scales) == 1
    others = [each.network for each in loaded[1:]]
    network = controlled(loaded[0].network, others[0] if single else others, scales[0] if single else scales)
    names = ["control"] if single else [f"control_{i}" for i in range(len(scales))]
    params = dict(zip(["unet", *names], (each.params for each in loaded), strict=True))
    cond = jax.tree.map(jnp.asarray, {**one.cond, "control": hints[0] if single else tuple(hints)})
    call = jax.jit(lambda x: network.apply(params, x, jnp.asarray(T), cond)[0])
    found, pullback = jax.vjp(call, jnp.asarray(one.x))
    error = float(np.abs(found - expected.detach().numpy()).max())
    assert error <= TOLERANCE, error
    record("network", "ControlNetModel", error)
    np.testing.assert_allclose(pullback(jnp.asarray(weights))[0], x.grad.numpy(), atol=TOLERANCE)

    interop.save_pretrained(tmp_path / "ours", loaded[1])
    back = diffusers.ControlNetModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        again = peer_controlled(unet, [back, *controls[1:]], scales, channels_first(one.x), arguments, hints)
    np.testing.assert_allclose(again.numpy(), expected.detach().numpy(), atol=TOLERANCE)


def test_a_controlnet_begins_as_the_way_down_of_its_unet(tmp_path):
    unet, _ = peers("sd1")
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=2)
    for name, peer in (("unet", unet), ("control", control)):
        peer.save_pretrained(tmp_path / name)
    ours, theirs = interop.load_pretrained(tmp_path / "unet"), interop.load_pretrained(tmp_path / "control")
    zeros = jax.tree.map(jnp.zeros_like, theirs.params)
    begun = control_from_unet(ours.params, zeros)
    for name, entry in begun.items():
        if not name.startswith(("control", "zero")):
            chex.assert_trees_all_equal(entry, theirs.params[name])


def test_names_and_shapes_of_the_published_sizes():
    """lllyasviel/sd-controlnet-* and diffusers/controlnet-*-sdxl-1.0."""
    for config in (SD15, SDXL):
        shared = {name: value for name, value in config.items() if name not in (*OWN, "sample_size")}
        check_true_size(diffusers.ControlNetModel, shared, "ControlNetModel")


def test_options_that_there_are_not_are_told():
    with pytest.raises(InvalidInput, match="controlnet_conditioning_channel_order='bgr'"):
        network_fields("ControlNetModel", {"controlnet_conditioning_channel_order": "bgr"})
    with pytest.raises(InvalidInput, match="global_pool_conditions=True"):
        network_fields("ControlNetModel", {"global_pool_conditions": True})
