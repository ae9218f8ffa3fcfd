# syntax=docker/dockerfile:1
# diffusion_jax with its configs and launchers. A CPU by default; EXTRAS=cuda or EXTRAS=tpu,tfds for accelerators:
#
#   docker build -t diffusion_jax .
#   docker build -t diffusion_jax:cuda --build-arg EXTRAS=cuda --build-arg COMMIT="$(git describe --always --dirty)" .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/out:/workspace/out" diffusion_jax \
#       train --config=digits_dit --workdir=out/digits                         (--gpus=all before the name, for cuda)
#
# What .dockerignore does not name is copied, committed or not: COMMIT says so in the label of the image.
FROM python:3.12-slim

ARG EXTRAS=""
ARG COMMIT=""
LABEL org.opencontainers.image.title="diffusion_jax" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}"

WORKDIR /workspace
COPY setup.py pyproject.toml README.md LICENSE MANIFEST.in ./
COPY diffusion_jax diffusion_jax
COPY configs configs
COPY launch launch
# setup.py says which versions.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".${EXTRAS:+[$EXTRAS]}" && mkdir -m 1777 /cache

# Compiled programs and trained judges; a volume at /cache keeps them between runs.
ENV DIFFUSION_JAX_CACHE=/cache
ENTRYPOINT ["diffusion-jax"]
CMD ["--help"]
