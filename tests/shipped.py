"""`jit` as users have it: with the code generator that the other tests do without, for laws about single bits."""

from functools import partial
from importlib.metadata import version

import jax

OPTIONS = {"xla_cpu_use_fusion_emitters": True} if version("jaxlib").startswith("0.10.") else {}
"""Later releases have no other code generator, and no such option."""

jit = partial(jax.jit, compiler_options=OPTIONS)
