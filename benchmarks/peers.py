"""The other side: diffusers' networks and scheduler on PyTorch, given every advantage that its users would give it.

Attention is PyTorch's fused one, AdamW its fused one, inference runs in inference mode, and convolutional networks get
the faster of the two memory layouts.
"""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from diffusers.utils import logging

from benchmarks.workload import Workload

logging.set_verbosity_error()


class Peer(NamedTuple):
    """call: does the work. parameters: how many."""

    call: Callable[[], Any]
    parameters: int


def same_threads() -> int:
    """Gives PyTorch every core that this process may use, as XLA takes; returns how many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores)
    return cores


def network(work: Workload) -> torch.nn.Module:
    """diffusers' network of the same width, depth, heads and attention."""
    torch.manual_seed(0)
    if work.model == "dit":
        return DiTTransformer2DModel(
            num_attention_heads=work.heads,
            attention_head_dim=work.width // work.heads,
            in_channels=work.channels,
            out_channels=work.channels,
            num_layers=work.depth,
            sample_size=work.size,
            patch_size=2,
            num_embeds_ada_norm=work.classes,
        )
    down = tuple("AttnDownBlock2D" if depth else "DownBlock2D" for depth in work.attention)
    return UNet2DModel(
        sample_size=work.size,
        in_channels=work.channels,
        out_channels=work.channels,
        block_out_channels=tuple(work.width * multiplier for multiplier in work.multipliers),
        layers_per_block=work.depth,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        attention_head_dim=work.head_dim,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=work.classes,
    )


def build(work: Workload, compile: bool = False) -> Peer:
    """The peer's program of a workload; `compile` puts the network through torch.compile."""
    model = network(work)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if work.model == "unet":
        model = model.to(memory_format=_faster_layout(work, model))
    if compile:
        model = torch.compile(model)
    return Peer({"forward": forward, "train": train, "sample": sampling}[work.part](work, model), parameters)


def inputs(work: Workload) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, timesteps and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(work.batch, work.channels, work.size, work.size, generator=generator)
    return x, torch.linspace(1, 999, work.batch).long(), torch.arange(work.batch) % work.classes


def forward(work: Workload, model: torch.nn.Module) -> Callable:
    """One evaluation of the network."""
    x, t, labels = inputs(work)
    model.eval()

    @torch.inference_mode()
    def call():
        return model(x, t, class_labels=labels).sample

    return call


def train(work: Workload, model: torch.nn.Module) -> Callable:
    """Noise, forward, backward, AdamW."""
    x, _, labels = inputs(work)
    model.train()
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.01, fused=True)

    def call():
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (work.batch,))
        output = model(scheduler.add_noise(x, noise, t), t, class_labels=labels).sample
        loss = torch.nn.functional.mse_loss(output, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return call


def sampling(work: Workload, model: torch.nn.Module) -> Callable:
    """A DDIM run as in diffusers' pipelines, without guidance."""
    _, _, labels = inputs(work)
    model.eval()
    scheduler = DDIMScheduler(clip_sample=False)

    @torch.inference_mode()
    def call():
        scheduler.set_timesteps(work.steps)
        x = torch.randn(work.batch, work.channels, work.size, work.size)
        for t in scheduler.timesteps:
            output = model(x, t.expand(work.batch), class_labels=labels).sample
            x = scheduler.step(output, t, x).prev_sample
        return x

    return call


def _faster_layout(work: Workload, model: torch.nn.Module) -> torch.memory_format:
    """The memory layout in which the part that is timed, or one evaluation for a whole run, is faster."""
    seconds = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=layout)
        call = (train if work.part == "train" else forward)(work, model)
        call()
        turns = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            turns.append(time.perf_counter() - start)
        seconds[layout] = min(turns)
    model.zero_grad(set_to_none=True)
    return min(seconds, key=seconds.get)
