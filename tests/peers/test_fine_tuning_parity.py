"""One step of fine-tuning is the peers' own: loss and gradients of diffusers' scripts for the same noise, and a LoRA
that was trained here is theirs.

Needs the peers extra: `make test-peers`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from diffusion_jax import adapters, interop, objectives, timesteps  # noqa: E402
from diffusion_jax.interop.lora_targets import joined_factors, modules_of  # noqa: E402
from diffusion_jax.models import by_path  # noqa: E402
from diffusion_jax.objectives.batches import example_keys  # noqa: E402
from diffusion_jax.randomness import split  # noqa: E402
from tests.peers.comparison import TOLERANCE  # noqa: E402
from tests.peers.figures import record  # noqa: E402
from tests.peers.tiny_pipelines import LATENTS, saved  # noqa: E402

pytestmark = pytest.mark.peers

KEY, SIDES, PROMPTS = jax.random.key(0), (2 * LATENTS, 2 * LATENTS), ["a red value", "two names"]
GAMMA = 5.0


def attached(peer, network, factors):
    """An adapter of peft's on the attention of `peer`, as the scripts make it, with our factors in it."""
    peer.add_adapter(
        peft.LoraConfig(
            r=2, lora_alpha=6, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]
        )
    )
    leaves, theirs = by_path(factors), dict(peer.named_parameters())
    adapted = {name.partition(".lora_")[0] for name in theirs if ".lora_" in name}
    ours = {
        module.name: joined_factors(leaves, module.weight) for module in modules_of(network).values() if module.weight
    }
    assert adapted == {name for name, pair in ours.items() if pair is not None}
    with torch.no_grad():
        for name in adapted:
            for letter, value in zip("AB", ours[name], strict=True):
                theirs[f"{name}.lora_{letter}.default.weight"].copy_(torch.tensor(value))
    return {(name, letter): theirs[f"{name}.lora_{letter}.default.weight"] for letter in "AB" for name in adapted}


def their_loss(pipeline, latents, noise, index, context, added, weighted):
    """The lines of train_text_to_image_lora.py (and _sdxl) from the noise on."""
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    latents, noise = (torch.tensor(np.asarray(value)).movedim(-1, 1) for value in (latents, noise))
    steps = torch.tensor(np.asarray(index)).long()
    noisy = scheduler.add_noise(latents, noise, steps)
    kind = scheduler.config.prediction_type
    target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, steps)
    found = pipeline.unet(noisy, steps, torch.tensor(np.asarray(context)), added_cond_kwargs=added).sample
    if not weighted:
        return torch.nn.functional.mse_loss(found.float(), target.float(), reduction="mean")
    snr = diffusers.training_utils.compute_snr(scheduler, steps)
    weights = torch.stack([snr, GAMMA * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weights = weights / snr if kind == "epsilon" else weights / (snr + 1)
    loss = torch.nn.functional.mse_loss(found.float(), target.float(), reduction="none")
    return (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()


@pytest.mark.parametrize(("name", "weightings"), [("SD 1.5", (False, True)), ("SD 2.1", (True,)), ("SDXL", (False,))])
def test_a_step_is_that_of_their_script(name, weightings, tmp_path):
    """Of noise predictions and velocities, plain and with min-SNR."""
    peer, folder = saved(name, tmp_path)
    pipeline = interop.load_pipeline(folder)
    layers = interop.adapted_layers(pipeline.network)
    pictures = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, *SIDES, 3)), jnp.float32)
    cond = pipeline.prompter.main(PROMPTS, SIDES)
    batch = {"x0": pictures, "cond": cond, "index": jnp.arange(2)}
    errors, rows = {}, None
    for weighted in weightings:
        options = {"weight": timesteps.min_snr_weight(GAMMA)} if weighted else {}
        tuned = interop.fine_tuning(
            pipeline, partial(objectives.denoising, **options), SIDES, pictures=True,
            adapter=partial(adapters.lora, rank=2, alpha=6, select=layers),
        )  # fmt: skip
        learned = jax.tree.map(lambda leaf: leaf + 0.1, tuned.init(KEY))
        state = tuned.objective.init(KEY, learned, batch)
        prepared = tuned.objective.prepare(state, batch, KEY)

        @jax.jit
        def ours(learned, state=state, prepared=prepared, tuned=tuned):
            return jax.value_and_grad(lambda learned: tuned.objective.loss(learned, state, prepared, KEY)[0].mean())(
                learned
            )

        loss, gradients = ours(learned)
        # The noise that was drawn: of the key of each example.
        latents = pipeline.autoencoder.network.encode(pipeline.autoencoder.params, pictures)
        _, noise = tuned.process.corrupt(split(example_keys(KEY, batch["index"]), 3)[0], latents, prepared["t"])
        index = tuned.process.network_time(prepared["t"])
        if rows is None:
            rows = attached(peer.unet, pipeline.network, learned)
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]} if name == "SDXL" else {}
        added = {key: torch.tensor(np.asarray(value)) for key, value in added.items()}
        their = their_loss(peer, latents, noise, index, cond["context"], added, weighted)
        peer.unet.zero_grad()
        their.backward()
        errors[f"loss{weighted}"] = abs(float(loss) - float(their.detach()))
        leaves = by_path(gradients)
        for module in modules_of(pipeline.network).values():
            if (module.name, "A") in rows:
                for letter, value in zip("AB", joined_factors(leaves, module.weight), strict=True):
                    theirs = rows[module.name, letter].grad.numpy()
                    errors[f"{module.name} {letter}"] = np.abs(value - theirs).max()
    record("training", f"a step of LoRA, {name}", float(max(errors.values())))
    assert max(errors.values()) <= TOLERANCE, errors


def test_what_was_trained_here_is_sampled_there(tmp_path):
    peer, folder = saved("SD 1.5", tmp_path)
    pipeline = interop.load_pipeline(folder)
    layers = interop.adapted_layers(pipeline.network)
    tuned = interop.fine_tuning(
        pipeline, objectives.denoising, SIDES, adapter=partial(adapters.lora, rank=2, alpha=6, select=layers)
    )
    learned = jax.tree.map(lambda leaf: leaf + 0.1, tuned.init(KEY))
    noise = np.random.default_rng(1).normal(size=(1, LATENTS, LATENTS, 4)).astype("f")
    options = {"num_steps": 3, "scale": 2.0, "noise": jnp.asarray(noise)}
    expected = np.asarray(interop.generate(tuned.pipeline_of(learned), KEY, ["a red value"], size=SIDES, **options))
    file = tuned.save(tmp_path / "pytorch_lora_weights.safetensors", learned)
    again = interop.generate(
        interop.load_pipeline(folder, loras=[(file, 1.0)]), KEY, ["a red value"], size=SIDES, **options
    )
    np.testing.assert_allclose(again, expected, atol=1e-5)

    plain = interop.generate(pipeline, KEY, ["a red value"], size=SIDES, **options)
    assert np.abs(np.asarray(plain) - expected).max() > 1e-3
    peer.load_lora_weights(str(tmp_path), weight_name=file.name)
    found = peer(
        "a red value", num_inference_steps=3, guidance_scale=2.0, height=SIDES[0], width=SIDES[1], output_type="np",
        latents=torch.tensor(noise).movedim(-1, 1),
    ).images  # fmt: skip
    error = float(np.abs(2 * found - 1 - expected).max())
    record("adapter", "LoRA trained here, sampled there", error)
    assert error <= TOLERANCE
