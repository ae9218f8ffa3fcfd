"""UniDiffuser on digits and their spelled-out names: one network, and baselines of its size trained as long."""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return _paper()
    free = call("timesteps.uniform")
    given = call("timesteps.pinned", draw=free, value=0.0)
    # s and t apart; s = t; and one of them always clean, as in a network for one task.
    draws = {
        "unidiffuser": {"image": free, "text": free},
        "together": free,
        "image_given_text": {"image": free, "text": given},
        "text_given_image": {"image": given, "text": free},
    }
    config = ConfigDict({"seed_numbers": (10, 11, 12, 13, 14), "tuned_on": (0, 1, 2, 100, 101, 102)})
    config.update({"steps": 12, "count": 250, "scale": 2.0, "compared": True})
    config.judge = call("metrics.feature_network", world="digits")
    pair, parts = {"image": (4, 4), "text": (1,)}, {"image": (2, 2), "vector": (), "text": (1,)}
    config.networks = {name: _joint(pair, draw) for name, draw in draws.items()}
    draw = {"image": free, "vector": "image", "text": free}
    config.latent = {**_encoders(), "joint": _joint(parts, draw, steps=800)}
    if variant == "smoke":
        # One network, hardly trained, stands for all; modalities are not replaced, and losses not compared.
        one = _joint(pair, draws["unidiffuser"], 2, 16, width=16, depth=1, scan=False, skips=False)
        one.optimizer, one.ema = call("training.optimizers.sgd"), {}
        config.networks = dict.fromkeys(draws, one)
        config.update({"seed_numbers": (0,), "steps": 2, "count": 20, "compared": False})
        config.judge.steps, config.latent = 2, {}
    return config


def _run(steps, batch_size, rate, **source):
    """What all runs here share: data and optimiser."""
    config = defaults(steps=steps, batch_size=batch_size)
    config.data, config.held_out = (call("data.named_digits", split=split, **source) for split in ("train", "test"))
    rate = call("training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=min(100, steps // 2))
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    return config


def _joint(modalities, draw, steps=2400, batch_size=64, **size):
    """A U-ViT of four blocks over the `modalities`, each noised on the straight path at the times of `draw`."""
    config = _run(steps, batch_size, 6e-3)
    size = {"preset": "unidiffuser", "heads": 4, "width": 64, "depth": 4, "remat": "dots_no_batch", **size}
    config.model = call("models.joint_transformer", modalities=modalities, **size)
    flow = call("processes.rectified_flow")
    config.process = call("processes.JointProcess", processes=dict.fromkeys(modalities, flow))
    config.objective = call("objectives.denoising", draw=draw)
    return config


def _encoders():
    """The autoencoder of images, the pair of encoders, and the decoder of captions."""
    image = _run(200, 64, 5e-3)
    image.data, image.held_out = (call("data.digits", split=split) for split in ("train", "test"))
    image.model = call("models.kl_vae", preset="small", channels=16, groups=4, data_channels=1, latent_channels=4)
    image.objective = call("objectives.vae_loss", kl_weight=1e-3)
    pairs = _run(300, 64, 2e-3, text_length=6, embedding_dim=0)
    size = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 128}
    pairs.model = call(
        "models.dual_encoder",
        image=call("models.clip_vision", preset="small", image_size=8, patch=2, channels=1, projection=16, **size),
        # Names are shorter than a text: the first character that fills it up ends them.
        text=call("models.clip_text", preset="small", vocab_size=16, positions=6, projection=16, eos=0, **size),
    )
    pairs.objective = call("objectives.contrastive")
    captions = _run(150, 64, 2e-3, text_length=6, embedding_dim=0)
    captions.model = call("models.caption_decoder", vocab_size=16, length=6, latent_channels=8, **size)
    captions.objective = call("objectives.caption_loss")
    for config in (image, pairs, captions):
        config.process = None
    return {"image": image, "pairs": pairs, "captions": captions}


def _paper():
    """The published network, process and draw; batch size and learning rate of the 512 x 512 stage."""
    free = call("timesteps.on_grid", grid=call("timesteps.trailing", steps=1000), last=True)
    modalities = {"image": (2, 2), "vector": (), "text": (1,)}
    config = _joint(modalities, {"image": free, "vector": "image", "text": free})
    config.train.update(steps=200_000, batch_size=2112)
    config.model = call(
        "models.joint_transformer",
        modalities=modalities,
        preset="unidiffuser",
        dtype="bfloat16",
        remat="dots_no_batch",
    )
    noise = call("processes.vp_scaled_linear")
    config.process = call("processes.JointProcess", processes=dict.fromkeys(modalities, noise))
    config.sampling.update(solver=call("solvers.dpm_solver_pp", order=2), grid=call("timesteps.linspace", steps=50))
    config.sampling.transformations = {"guidance": call("denoisers.jointly_guided", scale=8.0)}
    config.inputs = {"x0": {"image": (64, 64, 4), "vector": (512,), "text": (77, 64)}}
    return config
