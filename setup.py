"""Packaging of diffusion_jax; tool settings live in pyproject.toml.

A wheel holds the top-level folder `configs/` as `diffusion_jax/configs`, where `diffusion_jax.config.shipped` looks
for it. An editable install reads the folder where it is.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "diffusion_jax/__init__.py").read_text("utf-8"), re.M)[1]
CONFIGS = {"diffusion_jax.configs": "configs", "diffusion_jax.configs.recipes": "configs/recipes"}
JAX = ">=0.10,<0.13"
# transformers 5.24 asks for a PEFT that is not published yet.
PEERS = ["torch==2.13.0", "diffusers>=0.35", "transformers>=4.50,<5.24", "accelerate", "peft"]
TEST = [
    "pytest>=8",
    "pytest-xdist",
    "chex",
    "hypothesis",
    "sentencepiece",
    "ruff",
    "import-linter",
    "basedpyright==1.40.2",
]
DOCS = ["mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1.0,<2"]
NOTEBOOKS = ["jupyterlab", "ipywidgets", "nbclient", "nbformat", "ipykernel"]


class BuildWithConfigs(build_py):
    """Also copies the configs into what is built."""

    def finalize_options(self):
        super().finalize_options()
        if not self.editable_mode:
            self.packages = [*self.packages, *CONFIGS]
            self.package_dir = {**(self.package_dir or {}), **CONFIGS}


setup(
    name="diffusion_jax",
    version=VERSION,
    description="Diffusion models in JAX, composed along the timestep",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url="https://github.com/diffusion-jax/diffusion_jax",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12", "3.13")],
    packages=find_packages(include=["diffusion_jax", "diffusion_jax.*"]),
    package_data={"diffusion_jax": ["py.typed"], "diffusion_jax.recipes": ["*.md"]},
    cmdclass={"build_py": BuildWithConfigs},
    install_requires=[
        f"jax{JAX}",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "qwix>=0.1.8,<0.2",
        "grain>=0.2.12",
        "ml_collections>=1.0",
        "pyyaml",
        "absl-py",
        "etils",
        "jaxtyping>=0.3",
        "beartype",
        "einops",
        "diffrax>=0.7",
        "safetensors",
        "tokenizers",
        "scikit-learn",
        "scikit-image",
        "scipy",
        "matplotlib",
        "imageio",
        "pillow",
        "tensorboardX",
        "tqdm",
    ],
    extras_require={
        "cuda": [f"jax[cuda12]{JAX}"],
        "tpu": [f"jax[tpu]{JAX}"],
        "control": ["gymnasium>=0.29", "gym-pusht>=0.1.5"],
        "tfds": ["tensorflow-datasets", "tensorflow-cpu", "array_record"],
        "docs": DOCS,
        "wandb": ["wandb"],
        "notebooks": NOTEBOOKS,
        "peers": PEERS,
        "test": [*TEST, *NOTEBOOKS[2:]],
    },
    entry_points={"console_scripts": ["diffusion-jax=diffusion_jax.__main__:main"]},
)
