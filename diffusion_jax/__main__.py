"""The console script `diffusion-jax`: one door to the command lines."""

import importlib
import sys
from collections.abc import Sequence

from diffusion_jax.command import leave, run_command
from diffusion_jax.errors import unknown

COMMANDS = {
    "train": "trains what a config describes",
    "sample": "draws samples from a trained model",
    "evaluate": "measures samples against held-out data",
    "encode": "turns a folder of pictures into latents of a published autoencoder",
    "report": "writes one page on a run: pictures, curves, measures",
    "recipes": "runs one of the published systems against its baseline",
}


def dispatch(argv: Sequence[str] | None) -> None:
    """Runs `diffusion-jax COMMAND ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: diffusion-jax COMMAND [arguments]\n\nCommands (each has its own --help):")
        print("\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items()))
        return
    command, *rest = arguments
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    module = "diffusion_jax.recipes.__main__" if command == "recipes" else f"diffusion_jax.{command}"
    importlib.import_module(module).main(rest)


def main() -> None:
    leave(run_command(dispatch))


if __name__ == "__main__":
    main()
