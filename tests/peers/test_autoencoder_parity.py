"""The KL autoencoder equals diffusers' `AutoencoderKL`, encoder and decoder, in both directions."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax import interop
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.families import network_fields
from diffusion_jax.models import kl_vae

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from tests.peers.comparison import TOLERANCE, check_true_size, randomised  # noqa: E402
from tests.peers.figures import record  # noqa: E402
from tests.peers.test_unet_parity import check_low  # noqa: E402

pytestmark = pytest.mark.peers


def blocks(*features, **others):
    """A config of as many levels."""
    kinds = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    return {
        "block_out_channels": list(features),
        **{name: kind * len(features) for name, kind in kinds.items()},
        **others,
    }


CASES = {
    "sd": blocks(8, 12, norm_num_groups=4, layers_per_block=1, scaling_factor=0.3),
    # As the autoencoders with 16 channels; the second level is smaller than the first.
    "16ch": blocks(
        12, 6, 6,
        norm_num_groups=3, layers_per_block=2, latent_channels=5, scaling_factor=1.5305, shift_factor=0.0609,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, in_channels=2, out_channels=2,
    ),
}  # fmt: skip


def first(value):
    return torch.as_tensor(value).permute(0, 3, 1, 2)


def last(value):
    return value.permute(0, 2, 3, 1).detach().numpy()


@pytest.mark.parametrize("name", CASES)
def test_the_autoencoder_is_the_peers(name, tmp_path):
    torch.set_num_threads(1)
    config = CASES[name]
    peer = randomised(diffusers.AutoencoderKL(**config))
    peer.save_pretrained(tmp_path / "peer")
    loaded = interop.load_pretrained(tmp_path / "peer")
    rng = np.random.default_rng(1)
    scale, shift = config["scaling_factor"], config.get("shift_factor", 0.0)
    x = rng.normal(size=(2, 16, 24, config.get("in_channels", 3))).astype(np.float32)
    small = 2 ** (len(config["block_out_channels"]) - 1)
    latents = rng.normal(size=(2, 16 // small, 24 // small, config.get("latent_channels", 4))).astype(np.float32)

    def theirs(peer, x, latents):
        posterior = peer.encode(first(x)).latent_dist
        image = peer.decode(first(latents) / scale + shift).sample
        return (posterior.mean - shift) * scale, posterior.logvar, image

    def ours(vae):
        def call(x, latents):
            posterior = vae.posterior(loaded.params, x)
            return vae.scale(posterior.mean), posterior.logvar, vae.decode(loaded.params, latents)

        return jax.jit(call)

    inputs = [torch.tensor(value, requires_grad=True) for value in (x, latents)]
    expected = theirs(peer, *inputs)
    weights = [rng.normal(size=last(value).shape).astype(np.float32) for value in expected]
    sum((value * first(w)).sum() for value, w in zip(expected, weights, strict=True)).backward()
    found, pullback = jax.vjp(ours(loaded.network), jnp.asarray(x), jnp.asarray(latents))
    errors = [float(np.abs(a - last(b)).max()) for a, b in zip(found, expected, strict=True)]
    assert max(errors) <= TOLERANCE
    record("network", loaded.family, max(errors))
    for ours_gradient, value in zip(pullback(tuple(map(jnp.asarray, weights))), inputs, strict=True):
        np.testing.assert_allclose(ours_gradient, value.grad.numpy(), atol=TOLERANCE)

    interop.save_pretrained(tmp_path / "ours", loaded)
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours").eval()
    assert (back.config.scaling_factor, back.config.shift_factor or 0.0) == (scale, shift)
    for a, b in zip(theirs(back, x, latents), expected, strict=True):
        np.testing.assert_allclose(last(a), last(b), atol=TOLERANCE)


def test_the_mean_and_deviation_of_each_channel_of_the_latents(tmp_path):
    """As the peer's pipelines of XL apply them, around a network that knows nothing of them."""
    mean, std = [0.4, -0.2, 1.0, 0.0], [0.5, 2.0, 1.25, 0.1]
    peer = randomised(diffusers.AutoencoderKL(**CASES["sd"], latents_mean=mean, latents_std=std))
    peer.save_pretrained(tmp_path / "peer")
    loaded = interop.load_pretrained(tmp_path / "peer")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 16, 24, 3)).astype(np.float32)
    latents = rng.normal(size=(2, 8, 12, 4)).astype(np.float32)
    scale = CASES["sd"]["scaling_factor"]
    m, s = (torch.tensor(value).reshape(1, 4, 1, 1) for value in (mean, std))
    with torch.no_grad():
        encoded = (peer.encode(first(x)).latent_dist.mean - m) * scale / s
        decoded = peer.decode(first(latents) * s / scale + m).sample
    vae = loaded.network
    np.testing.assert_allclose(vae.encode(loaded.params, x), last(encoded), atol=TOLERANCE)
    np.testing.assert_allclose(vae.decode(loaded.params, latents), last(decoded), atol=TOLERANCE)
    interop.save_pretrained(tmp_path / "ours", loaded)
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert (list(back.config.latents_mean), list(back.config.latents_std)) == (mean, std)


def test_bfloat16_is_as_near_to_float32_as_the_peers(tmp_path):
    peer = randomised(diffusers.AutoencoderKL(**CASES["sd"]))
    peer.save_pretrained(tmp_path)
    half = interop.load_pretrained(tmp_path, dtype="bfloat16")
    rng = np.random.default_rng(1)
    x, z = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 16, 24, 3), (2, 8, 12, 4)))
    scale = peer.config.scaling_factor

    def theirs(dtype):
        mean = peer.to(dtype).encode(first(x).to(dtype)).latent_dist.mean
        return [last(value.float()) for value in (mean * scale, peer.decode(first(z).to(dtype) / scale).sample)]

    found = jax.jit(lambda x, z: (half.network.encode(half.params, x), half.network.decode(half.params, z)))(x, z)
    expected = theirs(torch.float32)
    check_low(found, theirs(torch.bfloat16), expected)


def test_old_names_of_attention_are_read(tmp_path):
    peer = randomised(diffusers.AutoencoderKL(**CASES["sd"]))
    for name in ("new", "old"):
        peer.save_pretrained(tmp_path / name)
    file = tmp_path / "old" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    rename = re.compile(r"attentions\.0\.(to_q|to_k|to_v|to_out\.0)")
    stored = {rename.sub(lambda m: f"attentions.0.{old[m[1]]}", name): value for name, value in load_file(file).items()}
    assert any("proj_attn" in name for name in stored)
    save_file(stored, file)
    new, again = (interop.load_pretrained(tmp_path / name).params for name in ("new", "old"))
    chex.assert_trees_all_equal(new, again)


# The config.json files of the published folders: stable-diffusion-v1-5 (vae), sdxl-vae, stable-diffusion-3 (vae).
BASE = blocks(128, 256, 512, 512, layers_per_block=2, norm_num_groups=32)
PUBLISHED = {
    "kl_f8": {**BASE, "sample_size": 512, "scaling_factor": 0.18215},
    "sdxl": {**BASE, "sample_size": 1024, "scaling_factor": 0.13025},
    "kl_f8_16ch": {
        **BASE,
        "sample_size": 1024,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_the_published_sizes(name):
    autoencoder = check_true_size(diffusers.AutoencoderKL, PUBLISHED[name], "AutoencoderKL")
    assert autoencoder.module == kl_vae(name).module


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv=False"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "latents_mean"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 2.0, 0.0, 1.0]}, "latents_std"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1}, "shift_factor=0.1"),
        ({"norm_num_groups": 3}, "norm_num_groups=3, but it must divide"),
        ({"out_channels": 6}, "out_channels=6"),
    ],
)
def test_options_that_there_are_not_are_told(option, message):
    with pytest.raises(InvalidInput, match=message):
        network_fields("AutoencoderKL", {**CASES["sd"], **option})
