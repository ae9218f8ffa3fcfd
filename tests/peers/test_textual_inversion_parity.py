"""Words with embeddings of their own: files of the peer's kinds, and ours in the peer; the conditions agree.

Needs the peers extra: `make test-peers`.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from safetensors.numpy import load_file, save_file  # noqa: E402

from diffusion_jax import interop  # noqa: E402
from tests.peers.comparison import TOLERANCE  # noqa: E402
from tests.peers.figures import record  # noqa: E402
from tests.peers.tiny_pipelines import saved  # noqa: E402

pytestmark = pytest.mark.peers

PROMPTS = ["a <toy> of a cat", "<Toy>, on a red <toy>.", "value<toy>name", "toy"]
SIZE = (16, 16)
rng = np.random.default_rng(0)


@pytest.mark.parametrize("count", [1, 3])
def test_one_encoder(count, tmp_path):
    peer, folder = saved("SD 1.5", tmp_path)
    file = tmp_path / "toy.safetensors"
    save_file({"<toy>": rng.normal(size=(count, 12)).astype(np.float32)}, file)
    taught = interop.with_embeddings(interop.load_pipeline(folder), file)
    again = interop.save_embeddings(tmp_path / "again.safetensors", interop.embedding_of(taught, "<toy>"))
    peer.load_textual_inversion(str(again))
    prompts = PROMPTS if count == 1 else [prompt for prompt in PROMPTS if "Toy" not in prompt]
    with torch.no_grad():
        expected, _ = peer.encode_prompt(prompts, "cpu", 1, False)
    error = float(np.abs(np.asarray(taught.prompter.main(prompts, SIZE)["context"]) - expected.numpy()).max())
    record("adapter", f"textual inversion, {count} vectors", error)
    assert error <= TOLERANCE


def test_two_encoders(tmp_path):
    peer, folder = saved("SDXL", tmp_path)
    file = tmp_path / "toy.safetensors"
    tensors = {name: rng.normal(size=(2, width)).astype(np.float32) for name, width in (("clip_l", 12), ("clip_g", 14))}
    save_file(tensors, file)
    taught = interop.with_embeddings(interop.load_pipeline(folder), file, word="<toy>")
    again = load_file(interop.save_embeddings(tmp_path / "again.safetensors", interop.embedding_of(taught, "<toy>")))
    for name, encoder, tokenizer in (
        ("clip_l", peer.text_encoder, peer.tokenizer),
        ("clip_g", peer.text_encoder_2, peer.tokenizer_2),
    ):
        peer.load_textual_inversion(
            {"<toy>": torch.tensor(again[name])}, token="<toy>", text_encoder=encoder, tokenizer=tokenizer
        )
    prompts = PROMPTS[:1] + PROMPTS[2:]
    with torch.no_grad():
        context, _, pooled, _ = peer.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    found = taught.prompter.main(prompts, SIZE)
    error = float(np.abs(np.asarray(found["context"]) - context.numpy()).max())
    error = max(error, float(np.abs(np.asarray(found["pooled"]) - pooled.numpy()).max()))
    record("adapter", "textual inversion of SDXL", error)
    assert error <= TOLERANCE
