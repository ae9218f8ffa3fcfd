"""Layers shared by all architectures: attention, modulation, embeddings, norms, conditions as values, and the
uniform blocks of named residual branches. Whole networks are in `models`.
"""

from diffusion_jax.models.layers.attention import (
    Attend,
    Attention,
    attention_probabilities,
    dot_product_attention,
    key_mask,
)
from diffusion_jax.models.layers.branches import (
    REMAT,
    AttentionBranch,
    Block,
    Branch,
    CrossAttentionBranch,
    MlpBranch,
    Side,
    SkipBranch,
    Stack,
    constrain_activations,
)
from diffusion_jax.models.layers.conditioning import Conditioned, ConditionEncoder
from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.embeddings import (
    TimeEmbedding,
    grid_positions,
    image_positions,
    rotary_angles,
    rotate,
    sincos_positions,
    timestep_embedding,
)
from diffusion_jax.models.layers.mlp import FeedForward
from diffusion_jax.models.layers.modulation import Modulation, TableModulation, expand_vector, modulate
from diffusion_jax.models.layers.norms import GroupNorm, LayerNorm, RMSNorm, layer_norm

__all__ = [
    "REMAT",
    "Attend",
    "Attention",
    "AttentionBranch",
    "Block",
    "Branch",
    "ConditionEncoder",
    "Conditioned",
    "CrossAttentionBranch",
    "FeedForward",
    "GroupNorm",
    "LayerNorm",
    "MlpBranch",
    "Modulation",
    "RMSNorm",
    "Side",
    "SkipBranch",
    "Stack",
    "TableModulation",
    "TimeEmbedding",
    "attention_probabilities",
    "constrain_activations",
    "dot_product_attention",
    "expand_vector",
    "grid_positions",
    "image_positions",
    "key_mask",
    "layer_norm",
    "modulate",
    "projection",
    "rotary_angles",
    "rotate",
    "sincos_positions",
    "timestep_embedding",
]
