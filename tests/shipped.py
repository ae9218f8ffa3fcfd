"""`jit` as users have it: with the code generator that the other tests do without, for laws about single bits."""

from functools import partial

import jax

jit = partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})
