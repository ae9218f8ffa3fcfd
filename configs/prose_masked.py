"""Masked (absorbing) diffusion of English prose, byte by byte (the standard library's own help texts).

    diffusion-jax train --config=prose_masked --workdir=out/prose

`evaluate` compares bigrams with held-out text; samples are in `samples.txt`.

About 1.8 steps a second on two CPU cores, so three hours there; made for a GPU. Not yet run to its end: its score is
not known.
"""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults


def get_config() -> ConfigDict:
    config = defaults(steps=20_000, batch_size=32)
    config.data = call("data.prose", split="train", length=128, stride=64)
    config.held_out = call("data.prose", split="test", length=128)
    config.model = call(
        "models.text_transformer", vocab_size=256, width=256, depth=6, heads=4, qk_norm=True, remat="dots_no_batch"
    )
    config.process = call("processes.absorbing", vocab_size=256)
    config.objective = call("objectives.masked", draw=call("timesteps.stratified"))
    rate = call("training.optimizers.cosine", peak=1e-3, warmup_steps=0.025)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.05)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.sampling.update(
        ema="average",
        solver=call("solvers.ancestral"),
        grid=call("timesteps.linspace", steps=64),
        batch_size=64,
    )
    config.metrics.tokens = call("metrics.token_set")
    return config
