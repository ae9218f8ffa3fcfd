"""Data: sources with random access (real data from installed packages, generated data, files), transforms, `pipeline`.

A batch is `{"x0": ..., "cond": {...}, "index": int32 [B]}`. Constructors of sources take plain values, so that a config
can name them (`data.digits`). Nothing here uses the network, except preparing a data set of tensorflow-datasets.
"""

from diffusion_jax.data import captioned_digits, moving, portrait, push_t, referring, scenes, tabletop, wardrobe
from diffusion_jax.data.captioned_digits import named_digits
from diffusion_jax.data.collected import Collection, collect, labelled, trajectories
from diffusion_jax.data.conditions import Conditions, conditions_of, cycled_labels
from diffusion_jax.data.demonstrations import Demonstrations, Pictures, principal_futures, tabletop_demonstrations
from diffusion_jax.data.digits import digits
from diffusion_jax.data.encoded import PrincipalLatents, encoded, principal_latents, stacked_examples
from diffusion_jax.data.faces import faces
from diffusion_jax.data.fashion_mnist import GARMENTS, fashion_mnist
from diffusion_jax.data.files import array_record, arrays, write_array_record
from diffusion_jax.data.image_folders import captioned_folder, encoded_captions, image_folder
from diffusion_jax.data.latent_shards import latents, write_latents
from diffusion_jax.data.moving import moving_shapes
from diffusion_jax.data.pairs import from_pairs
from diffusion_jax.data.photographs import PHOTOGRAPHS, patches, photograph, textures
from diffusion_jax.data.picture_files import FolderSummary, folder_summary
from diffusion_jax.data.pipeline import Batches, pipeline
from diffusion_jax.data.portrait import talking_faces
from diffusion_jax.data.prose import documents as prose_documents
from diffusion_jax.data.prose import prose
from diffusion_jax.data.push_t import push_t_demonstrations
from diffusion_jax.data.referring import referring_scenes, stereo_patches
from diffusion_jax.data.regression import smooth_function
from diffusion_jax.data.scenes import shapes
from diffusion_jax.data.shadows import ShadowPairs, shadow_pairs
from diffusion_jax.data.sources import (
    ArraySource,
    Source,
    check_finite,
    held_out,
    rows_of_each_size,
    unconditional,
)
from diffusion_jax.data.splat_scenes import SplatScenes, splat_scenes
from diffusion_jax.data.tfds import tfds
from diffusion_jax.data.tokenizers import Tokenizer, bpe_tokenizer, byte_tokenizer, word_tokenizer
from diffusion_jax.data.toys2d import TOYS, Mixture, gaussian_blobs, toys2d
from diffusion_jax.data.transforms import flip, normalise, random_crop, resize
from diffusion_jax.data.wardrobe import try_on

__all__ = [
    "GARMENTS",
    "PHOTOGRAPHS",
    "TOYS",
    "ArraySource",
    "Batches",
    "Collection",
    "Conditions",
    "Demonstrations",
    "FolderSummary",
    "Mixture",
    "Pictures",
    "PrincipalLatents",
    "ShadowPairs",
    "Source",
    "SplatScenes",
    "Tokenizer",
    "array_record",
    "arrays",
    "bpe_tokenizer",
    "byte_tokenizer",
    "captioned_digits",
    "captioned_folder",
    "check_finite",
    "collect",
    "conditions_of",
    "cycled_labels",
    "digits",
    "encoded",
    "encoded_captions",
    "faces",
    "fashion_mnist",
    "flip",
    "folder_summary",
    "from_pairs",
    "gaussian_blobs",
    "held_out",
    "image_folder",
    "labelled",
    "latents",
    "moving",
    "moving_shapes",
    "named_digits",
    "normalise",
    "patches",
    "photograph",
    "pipeline",
    "portrait",
    "principal_futures",
    "principal_latents",
    "prose",
    "prose_documents",
    "push_t",
    "push_t_demonstrations",
    "random_crop",
    "referring",
    "referring_scenes",
    "resize",
    "rows_of_each_size",
    "scenes",
    "shadow_pairs",
    "shapes",
    "smooth_function",
    "splat_scenes",
    "stacked_examples",
    "stereo_patches",
    "tabletop",
    "tabletop_demonstrations",
    "talking_faces",
    "textures",
    "tfds",
    "toys2d",
    "trajectories",
    "try_on",
    "unconditional",
    "wardrobe",
    "word_tokenizer",
    "write_array_record",
    "write_latents",
]
