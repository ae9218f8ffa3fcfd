"""A transformer that paints persons in clothes it is shown flat: the base model of methods for references.

Patches of 4 x 4 pixels and the clean picture as the prediction, so that cloth can be copied patch by patch; a picture
has 64 tokens, and so has each reference. Its input is x, the mask and the person with the pose in the place of what is
hidden (`data.try_on`).
"""

from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config import call
from diffusion_jax.data.wardrobe import CATEGORIES
from diffusion_jax.experiment import defaults


def try_on_transformer(steps: int = 800, form: str = "encoding", rate: float = 3e-3, **fields: Any) -> ConfigDict:
    """The config of the network, trained in about two and a half minutes of one core.

    form: of `models.referenced`, the one that is trained: "encoding", or its twin "coupled", whose references know the
        time and see everything. fields: of `models.dit` that differ.
    """
    config = defaults(steps=steps, batch_size=16)
    config.data = call("data.try_on")
    config.held_out = call("data.try_on", split="test", length=5000)
    size = {"patch": 4, "width": 96, "depth": 3, "heads": 2, "mlp_ratio": 2.0, "qk_norm": True}
    network = call("models.dit", **{**size, "remat": "dots_no_batch", **fields})
    config.model = call("models.with_references", network=network, items=len(CATEGORIES), form=form, concat=True)
    config.process = call("processes.rectified_flow", prediction="x0")
    config.objective = call(
        "objectives.denoising",
        draw=call("timesteps.logit_normal", mean=0.8, std=1.2),
        cond_dropout=0.1,
        null={"references": 0.0},
    )
    schedule = call("training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=min(50, steps // 2))
    config.optimizer = call("training.optimizers.adamw", learning_rate=schedule, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    return config
