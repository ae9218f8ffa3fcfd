"""LoHa, LoKr and DoRA of PEFT, and what its LoRA may train beside the factors: the adapted networks agree.

Needs the peers extra: `make test-peers`.
"""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from diffusion_jax import adapters, interop  # noqa: E402
from tests.peers.comparison import TOLERANCE  # noqa: E402
from tests.peers.figures import record  # noqa: E402
from tests.peers.test_lora_parity import CONTEXT, MODULES, T, X, ours, theirs  # noqa: E402
from tests.peers.tiny_pipelines import unet  # noqa: E402

pytestmark = pytest.mark.peers

LORA = {"r": 3, "lora_alpha": 5, "target_modules": MODULES}
OTHER = {"r": 3, "alpha": 5, "target_modules": MODULES, "rank_pattern": {"conv1": 2}}
KINDS = {
    "DoRA": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "DoRA, rank stabilised": lambda: peft.LoraConfig(**LORA, use_dora=True, use_rslora=True),
    "LoRA with biases": lambda: peft.LoraConfig(**LORA, bias="all", alpha_pattern={"attentions.*to_q": 2}),
    "LoRA with a bias of B": lambda: peft.LoraConfig(
        **{**LORA, "target_modules": ["to_out.0", "conv1"]}, lora_bias=True
    ),
    "LoRA and whole modules": lambda: peft.LoraConfig(**LORA, modules_to_save=["conv_out", "conv_norm_out"]),
    "LoHa": lambda: peft.LoHaConfig(**OTHER),
    "LoHa with cores": lambda: peft.LoHaConfig(**OTHER, use_effective_conv2d=True),
    "LoKr": lambda: peft.LoKrConfig(**OTHER),
    "LoKr with cores": lambda: peft.LoKrConfig(**OTHER, use_effective_conv2d=True, decompose_factor=2),
    "LoKr, both sides cut": lambda: peft.LoKrConfig(**{**OTHER, "r": 1, "rank_pattern": {}}, decompose_both=True),
}

ATTACHED = ("DoRA", "LoRA and whole modules")
"""Also run beside the network's parameters, as changes of them."""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    unet(12).save_pretrained(folder)
    return interop.load_pretrained(folder)


@pytest.fixture(scope="module")
def apply(pretrained):
    return jax.jit(pretrained.network.apply)


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves(kind, pretrained, apply, tmp_path):
    peer = peft.get_peft_model(unet(12), KINDS[kind]())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in peer.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    peer.save_pretrained(tmp_path)
    factors = interop.load_lora(tmp_path, pretrained)
    expected = theirs(peer.eval().base_model.model)
    answers = [apply(adapters.merged(pretrained.params, factors), X, T, {"context": CONTEXT})[0]]
    if kind in ATTACHED:
        answers.append(ours(pretrained, factors, {"context": CONTEXT}))
    scale = np.abs(expected).max()
    assert np.abs(expected - theirs(unet(12))).max() > 0.05 * scale
    error = max(float(np.abs(np.asarray(found) - expected).max()) for found in answers) / max(scale, 1.0)
    record("adapter", kind, error)
    assert error <= TOLERANCE
    # kohya's files have a place for all of it.
    file = interop.save_lora(tmp_path / "again.safetensors", pretrained, factors, dialect="kohya")
    again = interop.load_lora(file, pretrained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, factors)
