"""Trains on a TPU slice of Google Kubernetes Engine: fills in `gke.yaml` and hands it to kubectl.

    python launch/gke.py --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/diffusion_jax:TAG --pods=4 \
        --accelerator=tpu-v5-lite-podslice --topology=4x4 -- --config=imagenet_dit:XL/2 --workdir=gs://BUCKET/RUN

The image is made by the Dockerfile of this checkout, with EXTRAS=tpu,tfds. Nothing of the checkout is copied here: what
runs is what the image holds.
"""

import argparse
import json
import re
import string
import subprocess
import sys
from pathlib import Path

TEMPLATE = Path(__file__).with_name("gke.yaml")


def number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def word(text: str) -> str:
    """What can stand in the manifest as it is."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} has characters other than letters, digits and ._/:@-")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=word, required=True, help="the container image, in a registry")
    parser.add_argument("--name", type=word, default="diffusion-jax", help="of the job (default diffusion-jax)")
    parser.add_argument(
        "--accelerator", type=word, default="tpu-v5-lite-podslice", help="kind of node (default tpu-v5-lite-podslice)"
    )
    parser.add_argument("--topology", type=word, default="4x4", help="of the slice (default 4x4)")
    parser.add_argument("--pods", type=number, default=4, help="hosts of the slice (default 4)")
    parser.add_argument("--chips", type=number, default=4, help="chips of a host (default 4)")
    parser.add_argument("--retries", type=number, default=100, help="failures that are tried again (default 100)")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest, and start nothing")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="-- followed by the arguments of train")
    given = parser.parse_args()
    arguments = given.arguments[1:] if given.arguments[:1] == ["--"] else given.arguments
    if not any(argument.startswith("--workdir") for argument in arguments):
        parser.error("give the arguments of train after --, with a --workdir in a bucket")
    fields = {name.upper(): value for name, value in vars(given).items()} | {"ARGUMENTS": json.dumps(arguments)}
    text = string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields)
    if given.dry_run:
        print(text, end="")
        return 0
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode


if __name__ == "__main__":
    sys.exit(main())
