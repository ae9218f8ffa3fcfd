"""`diffusion-jax sample`: draws samples from a training run (`run_samples`) or a published checkpoint
(`generate`). All flags of both are in `sample_flags`.
"""

import argparse
import sys
from collections.abc import Sequence

from diffusion_jax import distributed
from diffusion_jax.command import cache_compilations, leave, parse_config, run_command, split_overrides
from diffusion_jax.commands import generate, run_samples
from diffusion_jax.commands.image_files import read_settings
from diffusion_jax.commands.sample_flags import (
    PRETRAINED,
    RUN,
    check_applies,
    flag_list,
    parse_request,
    sample_parser,
    set_fields,
    set_solver,
)
from diffusion_jax.errors import InvalidInput


def main(argv: Sequence[str] | None = None) -> None:
    argv = repeated(list(sys.argv[1:] if argv is None else argv))
    parser = sample_parser()
    given = {argument.split("=")[0] for argument in argv}
    if "--help" not in given and "-h" not in given:
        if {"--workdir", "--pretrained"} <= given:
            raise InvalidInput("--workdir and --pretrained were both given: samples come from one of them.")
        if not {"--workdir", "--pretrained"} & given:
            raise InvalidInput("--workdir=RUN or --pretrained=FOLDER is missing: it says what to sample from.")
    pretrained = "--pretrained" in given
    check_applies(parser, argv, PRETRAINED if pretrained else RUN)
    arguments, config = parse_config(
        parser,
        argv,
        stored="config.json",
        base=generate.checkpoint_config() if pretrained else None,
        set_fields=set_solver if pretrained else set_fields,
    )
    changed, _ = split_overrides(argv)
    for field in changed:
        if pretrained and not field.startswith("sampling."):
            raise InvalidInput(f"--config.{field}: of a checkpoint only fields of config.sampling can be set.")
    request = parse_request(arguments, None if pretrained else run_samples.DEFAULT_COUNT)
    distributed.initialize()
    cache_compilations()
    (generate if pretrained else run_samples).run(parser, arguments, config, request, changed)


def repeated(argv: list[str]) -> list[str]:
    """The arguments of `--like=FILE` in front of those that are given, which have the last word."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--like")
    found, rest = reader.parse_known_args(argv)
    if found.like is None:
        return argv
    settings = read_settings(found.like)
    given = {argument.split("=")[0].removeprefix("--") for argument in rest}
    flags = {name: value for name, value in settings["flags"].items() if name not in given}
    if not given & {"seed", "seeds"}:
        flags["seed"] = settings["seed"]
    if not given & {"prompt", "class"}:
        flags |= {name: settings[name] for name in ("prompt", "class") if name in settings}
        if not given & {"index", "num-samples", "images-per-prompt"}:
            flags |= {"num-samples": settings["index"] + 1, "index": settings["index"]}
    return [*flag_list(flags), *rest]


if __name__ == "__main__":
    leave(run_command(main))
