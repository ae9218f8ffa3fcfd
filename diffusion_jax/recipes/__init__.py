"""One short file a published system: it composes the rooms of the house into a run, its baseline and its report.

A recipe is a module `recipes/<slug>.py` with `run(config, workdir) -> Report` and a config
`configs/recipes/<slug>.py`. What is generic about a system lives in its room, not here.
"""

from diffusion_jax.recipes.report import Claim, Report
from diffusion_jax.recipes.systems import BY_SLUG, SYSTEMS, System

__all__ = ["BY_SLUG", "SYSTEMS", "Claim", "Report", "System"]
