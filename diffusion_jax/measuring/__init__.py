"""Measuring images: a set of them (`open_images`) against another, in the features of a network.

    from diffusion_jax import measuring

    drawn, real = measuring.open_images("drawn"), measuring.open_images("photos/test")
    report = measuring.measure(measuring.published_extractor("dinov2", "models/dinov2"), drawn, real)
    report["kernel_distance"]

Where images come from is in `image_sets`, the networks in `feature_extractors` (published ones) and
`trained_extractors` (those that were trained here), the report in `measures`. The command is `diffusion-jax evaluate`.
"""

from diffusion_jax.measuring.feature_extractors import FeatureExtractor, published_extractor
from diffusion_jax.measuring.image_sets import ImageSet, of_array, open_images, prompts_of
from diffusion_jax.measuring.measures import (
    ImageFeatures,
    ReferenceSet,
    at_size,
    image_features,
    measure,
    measure_prompts,
    statistics_of,
)
from diffusion_jax.measuring.trained_extractors import trained_extractor

__all__ = [
    "FeatureExtractor",
    "ImageFeatures",
    "ImageSet",
    "ReferenceSet",
    "at_size",
    "image_features",
    "measure",
    "measure_prompts",
    "of_array",
    "open_images",
    "prompts_of",
    "published_extractor",
    "statistics_of",
    "trained_extractor",
]
