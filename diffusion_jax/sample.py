"""`diffusion-jax sample`: draws samples from a training run (`run_samples`) or a published checkpoint
(`generate`). All flags of both are in `sample_flags`.
"""

import sys
from collections.abc import Sequence

from diffusion_jax import distributed
from diffusion_jax.command import cache_compilations, leave, parse_config, run_command, split_overrides
from diffusion_jax.commands import generate, run_samples
from diffusion_jax.commands.repeating import repeated
from diffusion_jax.commands.sample_flags import (
    PRETRAINED,
    RUN,
    check_applies,
    parse_request,
    sample_parser,
    set_fields,
    set_solver,
)
from diffusion_jax.errors import InvalidInput


def main(argv: Sequence[str] | None = None) -> None:
    argv = repeated(sys.argv[1:] if argv is None else argv)
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


if __name__ == "__main__":
    leave(run_command(main))
