"""Forward passes of every family of published networks, on the peer's own weights: saved there, loaded here.

Sizes fit two cores; shapes (patches, heads, levels, context) are those of the published configs.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import interleave, ratio, summarise
from benchmarks.report import Row


class Case(NamedTuple):
    """One forward pass on both sides.

    peer: makes the peer's module. theirs: (module) -> output. ours: (network, params) -> output, to be compiled.
    aim: how many times faster we want to be. smaller: fields of the peer's config for a run that only shows that it
    works.
    """

    peer: Callable[..., Any]
    theirs: Callable[[Any], Any]
    ours: Callable[[Any, Any], Any]
    aim: float
    smaller: dict


def _normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _first(x):
    """A batch of images as torch has them."""
    import torch

    return torch.tensor(x).movedim(-1, 1)


def cases() -> dict[str, Case]:
    """By name. Peers are imported here, so that the list of benchmarks needs no torch."""
    import diffusers
    import torch
    import transformers

    latents, times = _normal(4, 32, 32, 4), np.linspace(1.0, 999.0, 4, dtype=np.float32)
    labels, captions, prompts = np.arange(4), _normal(4, 120, 1024), _normal(2, 77, 768)
    tokens = np.random.default_rng(1).integers(5, 900, (4, 77))
    pictures = _normal(2, 224, 224, 3)
    long = torch.tensor(tokens)

    def dit(**fields):
        base = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "sample_size": 32}
        return diffusers.DiTTransformer2DModel(**{**base, "out_channels": 8, **fields})

    def pixart(**fields):
        base = {"num_attention_heads": 8, "attention_head_dim": 72, "num_layers": 12, "sample_size": 32}
        base |= {"cross_attention_dim": 576, "caption_channels": 1024}
        return diffusers.PixArtTransformer2DModel(**{**base, **fields})

    def sd(**fields):
        base = {"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 768, "attention_head_dim": 8}
        return diffusers.UNet2DConditionModel(sample_size=32, **{**base, **fields})

    def sdxl(**fields):
        base = {
            "block_out_channels": (128, 256, 512),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (2, 4, 8),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 1280,
            "cross_attention_dim": 768,
        }
        return diffusers.UNet2DConditionModel(sample_size=32, **{**base, **fields})

    def vae(**fields):
        base = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        return diffusers.AutoencoderKL(**{**base, **kinds, **fields})

    def clip_text(**fields):
        base = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**base, **fields}))

    def t5(**fields):
        base = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
        base |= {"vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
        return transformers.T5EncoderModel(transformers.T5Config(**{**base, **fields}))

    def clip_vision(**fields):
        base = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        config = transformers.CLIPVisionConfig(**{**base, "patch_size": 16, "image_size": 224, **fields})
        return transformers.CLIPVisionModel(config)

    def dinov2(**fields):
        base = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224}
        return transformers.Dinov2Model(transformers.Dinov2Config(**{**base, **fields}))

    sizes = np.tile(np.array([256, 256, 0, 0, 256, 256], np.float32), (2, 1))
    pooled = _normal(2, 1280)
    added = {"text_embeds": torch.tensor(pooled), "time_ids": torch.tensor(sizes)}
    time, two = torch.tensor(times), torch.tensor(times[:2])
    text, caption = torch.tensor(prompts), torch.tensor(captions)

    def network(x, t, cond):
        return lambda net, params: net.apply(params, x, t, jax.tree.map(jnp.asarray, cond))[0]

    shallow = {"num_layers": 1}
    return {
        "DiT 12×384, 4 of 32×32×4": Case(
            dit, lambda m: m(_first(latents), time, torch.tensor(labels)).sample,
            network(latents, times, {"label": labels}), 1.0, shallow,
        ),
        "PixArt 12×576, 4 of 32×32×4, 120 tokens": Case(
            pixart,
            lambda m: m(_first(latents), encoder_hidden_states=caption, timestep=time).sample,
            network(latents, times, {"context": captions}), 1.0, shallow,
        ),
        "SD U-Net 128 (1, 2, 4, 4), 2 of 32×32×4, 77 tokens": Case(
            sd, lambda m: m(_first(latents[:2]), two, text).sample,
            network(latents[:2], times[:2], {"context": prompts}), 0.8, {"layers_per_block": 1},
        ),
        "SDXL U-Net 128 (1, 2, 4), 2 of 32×32×4, 77 tokens": Case(
            sdxl, lambda m: m(_first(latents[:2]), two, text, added_cond_kwargs=added).sample,
            network(latents[:2], times[:2], {"context": prompts, "pooled": pooled, "time_ids": sizes}), 0.8,
            {"layers_per_block": 1, "transformer_layers_per_block": (1, 1, 1)},
        ),
        "KL-f8 decoder, 1 of 32×32×4": Case(
            vae, lambda m: m.decode(_first(latents[:1]) / m.config.scaling_factor).sample,
            lambda net, params: net.decode(params, jnp.asarray(latents[:1])), 0.8,
            {"block_out_channels": (32, 32, 32, 32)},
        ),
        "CLIP text 12×768, 4 of 77 tokens": Case(
            clip_text, lambda m: m(long).last_hidden_state,
            lambda net, params: net.apply(params, jnp.asarray(tokens)).hidden, 1.0, {"num_hidden_layers": 1},
        ),
        "T5 encoder 12×768, 4 of 77 tokens": Case(
            t5, lambda m: m(long).last_hidden_state,
            lambda net, params: net.apply(params, jnp.asarray(tokens)).hidden, 1.0, shallow,
        ),
        "CLIP vision 12×768, 2 of 224×224": Case(
            clip_vision, lambda m: m(_first(pictures)).last_hidden_state,
            lambda net, params: net.apply(params, jnp.asarray(pictures)).hidden, 1.0, {"num_hidden_layers": 1},
        ),
        "DINOv2 12×384, 2 of 224×224": Case(
            dinov2, lambda m: m(_first(pictures)).last_hidden_state,
            lambda net, params: net.apply(params, jnp.asarray(pictures)).hidden, 1.0, {"num_hidden_layers": 1},
        ),
    }  # fmt: skip


CONVOLUTIONAL = ("UNet2DConditionModel", "AutoencoderKL")


def _faster_layout(module: Any, call: Callable[[], Any]) -> Any:
    """The memory layout in which the peer's call is faster."""
    import torch

    seconds = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        module.to(memory_format=layout)
        call()
        turns = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            turns.append(time.perf_counter() - start)
        seconds[layout] = min(turns)
    return min(seconds, key=seconds.get)


def families(rounds: int, smoke: bool, compiled_peers: bool) -> list[Row]:
    """One forward pass of each family, ours loaded from what the peer saved."""
    del compiled_peers
    import torch

    from benchmarks import ours, peers
    from diffusion_jax import interop
    from diffusion_jax.models import count_params

    peers.same_threads()
    rows = []
    for name, case in cases().items():
        torch.manual_seed(0)
        module = case.peer(**(case.smaller if smoke else {})).eval()
        with tempfile.TemporaryDirectory() as folder:
            module.save_pretrained(folder)
            pretrained = interop.load_pretrained(folder)
        network = pretrained.network
        program, seconds = ours.compiled(lambda params, n=network, c=case: c.ours(n, params), pretrained.params)

        @torch.inference_mode()
        def theirs(module=module, case=case):
            return case.theirs(module)

        if type(module).__name__ in CONVOLUTIONAL:
            module.to(memory_format=_faster_layout(module, theirs))

        def mine(program=program, params=pretrained.params):
            return jax.block_until_ready(program(params))

        expected = theirs().numpy()
        expected = np.moveaxis(expected, 1, -1) if expected.ndim == 4 else expected
        found = np.asarray(mine())
        error = float(np.abs(found - expected[..., : found.shape[-1]]).max())
        times = interleave({"ours": mine, "peer": theirs}, rounds)
        rows.append(
            Row(
                case=name,
                ours=summarise(times["ours"]),
                peer=type(module).__name__,
                theirs=summarise(times["peer"]),
                ratio=ratio(times["peer"], times["ours"]),
                aim=case.aim,
                compile_seconds=seconds,
                note=f"{count_params(pretrained.params) / 1e6:.0f} M parameters, largest difference {error:.0e}",
            )
        )
        print(f"  {name}: {rows[-1].ratio.value:.2f}×, largest difference {error:.1e}", flush=True)
    return rows
