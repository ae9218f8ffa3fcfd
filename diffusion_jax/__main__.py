"""The console script `diffusion-jax COMMAND`: one program for all commands."""

import importlib
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version

from diffusion_jax import __version__
from diffusion_jax.errors import unknown

COMMANDS = {
    "train": "trains what a config describes",
    "sample": "draws samples from a trained model",
    "finetune": "fine-tunes a published checkpoint on a folder of pictures",
    "evaluate": "measures samples of a run, or any images, against others",
    "configs": "lists the configs that come with the library, or prints one",
    "report": "writes one page on a run: pictures, curves, measures",
    "encode": "turns a folder of pictures into latents of a published autoencoder",
    "recipes": "runs one of the published systems against its baseline",
}

MODULES = {"configs": "config.shipped", "recipes": "recipes.__main__"}
"""Where a command is that is not in the module of its name."""


def dispatch(argv: Sequence[str] | None) -> None:
    """Runs `diffusion-jax COMMAND ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: diffusion-jax COMMAND [arguments]\n       diffusion-jax --version\n")
        print("Commands (each has its own --help):")
        print("\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items()))
        return
    if arguments[0] == "--version":
        print(f"diffusion_jax {__version__}, jax {version('jax')}, Python {platform.python_version()}")
        return
    command, *rest = arguments
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    importlib.import_module(f"diffusion_jax.{MODULES.get(command, command)}").main(rest)


def main() -> None:
    try:
        from diffusion_jax.command import leave, run_command
    except KeyboardInterrupt:  # JAX takes a second to import
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    leave(run_command(dispatch))


if __name__ == "__main__":
    main()
