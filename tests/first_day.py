"""A user's first day, from the wheel alone: `python -m tests.first_day` (`make first-day`; a part of `.ci/run`).

Builds the wheel, installs it into an environment of its own and runs the commands of the pages in an empty folder,
outside of the checkout: own images with one damaged, a run that is interrupted and goes on, samples, measures, latents,
a fine-tuned Stable Diffusion in miniature, a solver of one's own. Each command must end as `STEPS` says. It takes some
minutes and is no part of `make test`.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any, NamedTuple

CHECKOUT = Path(__file__).parent.parent

SMALL = (
    "--config.model.width=48 --config.model.depth=2 --config.model.heads=4 --config.train.sample_every=25 "
    "--config.sampling.picture_columns=2"
)
"""A network that trains 50 steps in seconds."""

MY_PARTS = '''
from diffusion_jax import solvers
from diffusion_jax.typing import Solver


def leaning(strength: float = 0.1) -> Solver:
    """DDIM, whose step is a little longer."""
    inner = solvers.ddim()

    def step(process, denoise, carry, state, x, step, key):
        moved, state, carry = inner.step(process, denoise, carry, state, x, step, key)
        return moved + strength * 0.01 * (moved - x), state, carry

    return inner._replace(step=step)
'''


class Step(NamedTuple):
    """A command line of `diffusion-jax`, and how it ends.

    code: its exit code. says: patterns that its output must match. writes: files that must be there afterwards.
    """

    line: str
    says: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    code: int = 0


INTERRUPTED = "interrupted"

STEPS: tuple[Step | tuple[str, Step], ...] = (
    # docs/first_day.md
    Step("--version", (r"diffusion_jax \d+\.\d+\.\d+",)),
    Step("--help", ("train", "sample", "evaluate", "finetune", "encode", "report")),
    Step("configs", ("digits_dit", "image_folder")),
    Step("train --config=digit_dit --workdir=out/x", ("did you mean 'digits_dit'",), code=2),
    Step("train --config=digits_dit --config.train.steps 50 --print-config", (r"--config\.train\.steps=50\b",)),
    Step(
        "train --config=digits_dit --workdir=out/digits --config.train.steps=40 --config.train.log_every=10 "
        "--log-to=csv,jsonl --profile=20:22",
        ("Compiling the training step", "Trained 40 steps"),
        ("metrics.csv", "metrics.jsonl", "loss.png", "loss_by_time.png", "report.html", "profile"),
    ),
    Step("train --config=digits_dit --workdir=out/digits --config.train.steps=40", ("[Nn]othing",)),
    Step("train --config=digits_dit --workdir=out/x --log-to=tensorbord", ("tensorboard",), code=2),
    Step(
        "sample --workdir=out/digits --num-samples=16 --class=3,7 --seed=5 --steps=2 --output=out/threes",
        writes=("../threes/samples.png",),
    ),
    Step("evaluate --workdir=out/digits --samples=out/threes --output=out/threes/metrics.json", ("class_accuracy",)),
    Step("report --workdir=out/digits --output=page.html", writes=("../../page.html",)),
    Step("recipes --list", ("taylorseer",)),
    # docs/your_images.md
    Step(
        f"train --config=image_folder:drawings --workdir=out/refused {SMALL}",
        (r"008\.png", "1 of 60", "on_error=skip"),
        code=2,
    ),
    (
        INTERRUPTED,
        Step(
            f"train --config=image_folder:drawings --workdir=out/mine --config.data.on_error=skip "
            f"--config.train.steps=50 --config.train.log_every=5 {SMALL}",
            ("Stopped after step",),
        ),
    ),
    Step(
        f"train --config=image_folder:drawings --workdir=out/mine --config.data.on_error=skip "
        f"--config.train.steps=50 --config.train.log_every=5 {SMALL}",
        ("1 of 60", "Trained 50 steps"),
    ),
    Step("sample --workdir=out/mine --num-samples=8", writes=("samples.png",)),
    Step("evaluate --workdir=out/mine --features=pixels", ("frechet", "kernel"), ("metrics.json",)),
    Step(
        "evaluate --images=drawings --against=drawings --features=pixels --background=white --on-error=skip",
        (r"1 of 60", r"frechet_distance\s+-?0(\.0+)?\b|frechet_distance\s+-?\d(\.\d+)?e-(09|1\d)"),
    ),
    Step(
        "evaluate --images=drawings --features=pixels --background=white --on-error=skip --size=32 "
        "--write-statistics=out/drawings.npz",
        writes=("../drawings.npz",),
    ),
    Step(
        "encode --pretrained=sd --data=drawings --size=16 --output=out/latents --on-error=skip", writes=("../latents",)
    ),
    Step("encode --pretrained=sd --data=drawings --size=32 --output=out/latents --on-error=skip", code=2),
    Step(f"train --config=latents:out/latents --workdir=out/on_latents --config.train.steps=5 {SMALL}", ("Trained 5",)),
    Step("sample --workdir=out/on_latents --num-samples=4", writes=("samples.png",)),
    # docs/finetune.md
    Step(
        "finetune --pretrained=sd --data=drawings --lora-rank=2 --steps=10 --batch-size=4 --learning-rate=1e-3 "
        "--validation-prompt='a red circle' --validate-every=5 --config.validation.num_steps=2 "
        "--config.data.background=white --config.data.on_error=skip --workdir=out/style",
        ("rank 2", r"pytorch_lora_weights\.safetensors"),
        ("pytorch_lora_weights.safetensors", "pictures"),
    ),
    Step(
        "sample --pretrained=sd --lora=out/style/pytorch_lora_weights.safetensors --prompt='a red circle' --steps=2 "
        "--output=out/with_lora",
        writes=("../with_lora/images/00000.png",),
    ),
    Step("sample --like=out/with_lora/images/00000.png --output=out/again", writes=("../again/images/00000.png",)),
    Step("sample --pretrained=sd --prompt=a --shard-size=3", ("shard-size",), code=2),
    # docs/configs.md
    Step(
        "train --config=digits_dit --config.train.steps=1e1 --config.sampling.solver='my_parts:leaning(strength=0.2)' "
        "--config.train.sample_every=None --workdir=out/own",
        ("--trust=my_parts",),
    ),
    Step("sample --workdir=out/own --num-samples=20 --steps=2", ("--trust=my_parts",), code=2),
    Step("sample --workdir=out/own --num-samples=20 --steps=2 --trust=my_parts", writes=("samples.png",)),
)


def outside_of_the_checkout() -> dict[str, str]:
    """The environment variables without those that lead to the checkout or to the settings of its tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XLA_FLAGS"))}


def made_environment(folder: Path) -> Path:
    """The folder of the programs of an environment that has the wheel of this checkout, and nothing of the checkout."""
    wheels, environment = folder / "wheels", folder / "environment"
    # What setuptools leaves behind must not be in the checkout, nor come from it.
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "out", "build", "*.egg-info", "site")
    shutil.copytree(CHECKOUT, source, ignore=ignored)
    # Nor may pip find the checkout, and take the library for installed.
    options: dict[str, Any] = {"check": True, "cwd": folder, "env": outside_of_the_checkout()}
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, source], **options)
    shutil.rmtree(source)
    venv.create(environment, with_pip=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([environment / "bin" / "pip", "install", "-q", "--disable-pip-version-check", wheel], **options)
    return environment / "bin"


def what_a_user_brings(folder: Path) -> None:
    """60 drawings (one damaged), a Stable Diffusion in miniature, a module of one's own."""
    made = "from pathlib import Path; from tests.interop.folders import sd_folder; sd_folder(Path({!r}))"
    for command in (
        [sys.executable, CHECKOUT / "tests" / "drawings.py", folder / "drawings"],
        [sys.executable, "-c", made.format(str(folder / "sd"))],
    ):
        subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)
    (folder / "my_parts.py").write_text(MY_PARTS, encoding="utf-8")


def run(step: Step, programs: Path, folder: Path, interrupt: bool = False) -> str:
    """Why the step did not end as it should; empty if it did."""
    environment = outside_of_the_checkout()
    environment |= {"DIFFUSION_JAX_CACHE": str(folder / "cache"), "PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["bash", "-c", f"exec diffusion-jax {step.line}"]
    # Bytes as they come: what is shown in a terminal is not shown in a pipe.
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if interrupt and re.search(r"step +1\d of", line):
                process.send_signal(signal.SIGINT)
                interrupt = False
        code = process.wait()
    told = "".join(lines)
    wanted = [f"it ended with {code} instead of {step.code}"] * (code != step.code)
    wanted += [f"it did not say {pattern!r}" for pattern in step.says if not re.search(pattern, told)]
    found = re.search(r"--workdir=(\S+)", step.line)
    root = folder / (found[1] if found else "out/any")
    wanted += [f"{name} is missing" for name in step.writes if not os.path.exists(os.path.normpath(root / name))]
    wanted += ["it printed a traceback"] * ("Traceback (most recent call last)" in told)
    return "; ".join(wanted) + (":\n" + told[-4000:] if wanted else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.first_day", description=__doc__)
    parser.add_argument("--programs", type=Path, help="the bin folder of an environment that has the wheel already")
    parser.add_argument("--keep", type=Path, help="a new folder to work in, which stays (default: a temporary one)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="first-day-") if arguments.keep is None else arguments.keep).resolve()
    folder.mkdir(exist_ok=True)
    failed = 0
    try:
        programs = made_environment(folder) if arguments.programs is None else arguments.programs.resolve()
        what_a_user_brings(folder)
        for entry in STEPS:
            interrupt, step = (True, entry[1]) if entry[0] == INTERRUPTED else (False, entry)
            begun = time.perf_counter()
            problem = run(step, programs, folder, interrupt)  # pyright: ignore[reportArgumentType]
            seconds = time.perf_counter() - begun
            print(f"{'FAILED' if problem else 'ok':6} {seconds:5.1f} s  diffusion-jax {step.line}", flush=True)
            if problem:
                failed += 1
                print(problem, flush=True)
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(STEPS) - failed} of {len(STEPS)} steps of the first day ended as they should.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
