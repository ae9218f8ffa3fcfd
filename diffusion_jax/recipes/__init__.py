"""One short file a published system: it composes the rooms of the house into a run, its baseline and its report.

A recipe is a module `recipes/<slug>.py` with `run(config, workdir) -> Results` and a config
`configs/recipes/<slug>.py` with the variant `smoke`. What is generic about a system lives in its room, not here.
"""

from diffusion_jax.recipes.frame import seeds, trained
from diffusion_jax.recipes.report import Claim, Report, Results, claim
from diffusion_jax.recipes.systems import BY_SLUG, SYSTEMS, System

__all__ = ["BY_SLUG", "SYSTEMS", "Claim", "Report", "Results", "System", "claim", "seeds", "trained"]
