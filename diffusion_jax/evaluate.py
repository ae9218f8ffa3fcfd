"""`python -m diffusion_jax.evaluate`: measures drawn samples against data that was held out from training."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from diffusion_jax import training
from diffusion_jax.command import cache_compilations, leave, parse_config, run_command
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment_data import with_data
from diffusion_jax.places import check_config, parts_in
from diffusion_jax.shards import COST, read_identity, read_samples, set_identity, write_whole


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_jax.evaluate",
        description=__doc__,
        epilog="example: python -m diffusion_jax.evaluate --workdir=out/digits, after train and sample.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the folder of a training run; its config is used")
    parser.add_argument("--samples", type=Path, help="the folder of the shards (default WORKDIR/samples)")
    parser.add_argument("--output", type=Path, help="default WORKDIR/metrics.json")
    arguments, config = parse_config(parser, argv, stored="config.json")
    cache_compilations()
    if not config.get("metrics"):
        raise InvalidInput("The config has no metrics; name some, as in configs/digits_dit.py.")
    check_config(config)
    folder = arguments.samples or arguments.workdir / "samples"
    samples = read_samples(folder)
    _, real, held_out = with_data(config)

    values: dict[str, float] = {"num_samples": len(samples["index"])}
    for measure in parts_in("metrics", config).values():
        values |= measure(samples, real, held_out)
    cost = read_identity(folder / COST) or {}
    # What another set cost says nothing of this one.
    if cost.get("identity") == set_identity(folder):
        told = {key: cost.get(key) for key in ("nfe", "compute", "images_per_second")}
        values |= {key: value for key, value in told.items() if isinstance(value, float)}
    log = arguments.workdir / "metrics.jsonl"
    if log.is_file():
        rates = [record.get("steps_per_second") for record in training.logging.read_log(log)]
        rates = [rate for rate in rates if isinstance(rate, float)]
        if rates:
            values["train_steps_per_second"] = sorted(rates)[len(rates) // 2]
    path = arguments.output or arguments.workdir / "metrics.json"
    write_whole(path, json.dumps(values | {"samples": set_identity(folder)}, indent=2) + "\n")
    width = max(map(len, values))
    print("\n".join(f"{name:{width}}  {value:.4g}" for name, value in values.items()))
    print(f"Wrote {path}")


if __name__ == "__main__":
    leave(run_command(main))
