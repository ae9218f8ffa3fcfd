"""Published checkpoints, read and written: networks, pipelines, schedulers, LoRA files, tokenizers and single files.

Each architecture is a table of the names and layouts of its tensors; tensors go from safetensors files to the devices
of a mesh without a copy of the whole model on the host.
"""

from diffusion_jax.interop.families import FAMILIES
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.fine_tuning import FineTuning, adapted_layers, fine_tuning, training_times
from diffusion_jax.interop.generation import generate
from diffusion_jax.interop.images import Preprocessor, load_preprocessor
from diffusion_jax.interop.lora_files import load_lora, save_lora
from diffusion_jax.interop.pipeline_folders import base_digest, save_pipeline
from diffusion_jax.interop.pipelines import (
    Pipeline,
    load_pipeline,
    pipeline_class,
    with_lora,
    with_network,
    with_scheduler,
)
from diffusion_jax.interop.pretrained import Pretrained, load_pretrained, save_pretrained
from diffusion_jax.interop.schedulers import Scheduler, read_scheduler, write_scheduler_config
from diffusion_jax.interop.tables import StoredTensor, TensorTable
from diffusion_jax.interop.textual_inversion import (
    WordEmbedding,
    embedding_of,
    load_embeddings,
    save_embeddings,
    with_embeddings,
)
from diffusion_jax.interop.tokenizers import Tokenizer, load_tokenizer
from diffusion_jax.interop.training_pictures import class_numbers, latent_examples, prompted, reads_classes

__all__ = [
    "FAMILIES",
    "Family",
    "FineTuning",
    "Pipeline",
    "Preprocessor",
    "Pretrained",
    "Scheduler",
    "StoredTensor",
    "TensorTable",
    "Tokenizer",
    "WordEmbedding",
    "adapted_layers",
    "base_digest",
    "class_numbers",
    "embedding_of",
    "fine_tuning",
    "generate",
    "latent_examples",
    "load_embeddings",
    "load_lora",
    "load_pipeline",
    "load_preprocessor",
    "load_pretrained",
    "load_tokenizer",
    "pipeline_class",
    "prompted",
    "read_scheduler",
    "reads_classes",
    "save_embeddings",
    "save_lora",
    "save_pipeline",
    "save_pretrained",
    "training_times",
    "with_embeddings",
    "with_lora",
    "with_network",
    "with_scheduler",
    "write_scheduler_config",
]
