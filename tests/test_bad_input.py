"""Wrong configs and wrong calls: each is told in one clear sentence, before any compilation, and nothing is lost.

On the command line the sentence goes to stderr without a traceback and the exit code is 2.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import (
    data,
    denoisers,
    distributed,
    evaluate,
    metrics,
    models,
    objectives,
    processes,
    sample,
    shards,
    solvers,
    timesteps,
    train,
    training,
)
from diffusion_jax.clock import as_grid
from diffusion_jax.command import run_command
from diffusion_jax.config import call, load
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import prepare
from diffusion_jax.sampling import invert, make_sampler
from diffusion_jax.sampling import sample as draw_samples
from diffusion_jax.time_axes import expand

DIGITS = "--config=configs/digits_dit.py"


@pytest.mark.parametrize(
    ("main", "argv", "says"),
    [
        (train.main, [], "--config is missing"),
        (train.main, ["--config=configs/digit_dit.py"], "did you mean"),
        (train.main, ["--config=configs"], "config is 'configs'"),
        (train.main, [DIGITS + ":large"], "no variants"),
        (train.main, [DIGITS, "--config.modle.width=8"], "did you mean 'model'"),
        (train.main, [DIGITS, "--config.model.widht=8"], "did you mean 'width'"),
        (train.main, [DIGITS, "--config.model.width=wide"], "model.width"),
        (train.main, [DIGITS, "--config.model.width=50"], "width is 50"),
        (train.main, [DIGITS, "--config.model.preset=M/2"], "preset is 'M/2'"),
        (train.main, [DIGITS, "--config.model.positions=rotery"], "did you mean 'rotary'"),
        (train.main, [DIGITS, "--config.model.dtype=float8"], "dtype is 'float8'"),
        (train.main, [DIGITS, "--config.train.steps=0"], "steps is 0"),
        (train.main, [DIGITS, "--config.train.steps=many"], "expected int"),
        (train.main, [DIGITS, "--config.train.batch_size=100000"], "the source holds only"),
        (train.main, [DIGITS, "--config.train.batch_size=12", "--config.mesh.data=8"], "12"),
        (train.main, [DIGITS, "--config.mesh.data=3"], "8 devices"),
        (train.main, [DIGITS, "--config.mesh.tensor=3"], "tensor=3"),
        (train.main, [DIGITS, "--config.data.call=data.digit"], "did you mean 'digits'"),
        (train.main, [DIGITS, "--config.data.split=validation"], "split is 'validation'"),
        (train.main, [DIGITS, "--config.process.call=processes.rectified_flw"], "did you mean 'rectified_flow'"),
        (train.main, [DIGITS, "--config.process.prediction=noise"], "prediction is 'noise'"),
        (train.main, [DIGITS, "--config.objective.cond_dropout=1.5"], "cond_dropout is 1.5"),
        (train.main, [DIGITS, "--config.optimizer.learning_rate.peak=-1"], "peak is -1"),
        (train.main, [DIGITS, "--config.train.validate_every=-5"], "every is -5"),
        (sample.main, ["--num-samples=0"], "must be the folder of a training run"),
        (sample.main, [DIGITS, "--num-samples=0"], "--num-samples is 0"),
        (sample.main, [DIGITS], "does not exist"),
        (sample.main, [DIGITS, "--config.sampling.solver.call=solvers.dimm"], "did you mean 'ddim'"),
        (sample.main, [DIGITS, "--config.sampling.solver.order=7"], "order is 7"),
        (sample.main, [DIGITS, "--config.sampling.grid.steps=-3"], "steps is -3"),
        (evaluate.main, [DIGITS], "holds no samples"),
        (evaluate.main, ["--config=configs/faces_dit.py"], "holds no samples"),
    ],
)
def test_the_command_line_says_what_is_wrong(main, argv, says, tmp_path, capsys):
    assert run_command(main, [*argv, f"--workdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert says in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_process_leaves_with_2_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "diffusion_jax", "trian", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'train'" in done.stderr
    assert "Traceback" not in done.stderr


FLOW = processes.rectified_flow()
MIXTURE = denoisers.gaussian_mixture(jnp.zeros((1, 2)))
EXACT = denoisers.analytic(FLOW)
KEY = jax.random.key(0)


def run(grid, shape=(2, 2), **more):
    return draw_samples(KEY, EXACT, MIXTURE, solvers.ddim(), grid, shape=shape, **more)


def incomplete():
    config = load("configs/digits_dit.py")
    del config["optimizer"]
    return prepare(config)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: run(jnp.array([0.0, 0.5, 1.0])), "entry 1 is larger than entry 0"),
        (lambda: run(jnp.array([1.0, 0.2, 0.5, 0.0])), "entry 2 is larger than entry 1"),
        (lambda: run(jnp.array([2.0, 0.0])), "[0, 1]"),
        (lambda: run(jnp.array([jnp.nan, 0.0])), "grid"),
        (lambda: run(jnp.array([1.0])), "at least two times"),
        (lambda: run([1.0]), "at least two times"),
        (lambda: run([0.0, 1.0]), "grid must decrease"),
        (lambda: as_grid("linspace"), "grid is 'linspace', but falling times"),
        (lambda: as_grid(None), "grid is None, but falling times"),
        (lambda: run(jnp.linspace(1, 0, 3), start=2, stop=9), "0 .. 2"),
        (lambda: run(jnp.linspace(1, 0, 3), save_every=0), "save_every is 0"),
        (lambda: run(jnp.linspace(1, 0, 3), shape=None), "none was given"),
        (lambda: run(jnp.ones((3, 5)) * jnp.linspace(1, 0, 3)[:, None]), "prefix"),
        (
            lambda: invert(KEY, EXACT, MIXTURE, solvers.ddim(), jnp.array([0.0, 1.0]), x_init=jnp.zeros((2, 2))),
            "larger",
        ),
        (lambda: make_sampler(EXACT, solvers.ddim(), shape=(2,), mesh=distributed.make_mesh(), axis="dta"), "dta"),
        (lambda: expand(jnp.zeros(3), jnp.zeros((2, 2))), "prefix"),
        (lambda: solvers.dpm_solver_pp(order=4), "order is 4"),
        (lambda: solvers.ddpm(variance="medium"), "medium"),
        (lambda: timesteps.linspace(0), "steps is 0"),
        (lambda: timesteps.from_array([0.0, 1.0]), "0"),
        (lambda: timesteps.logit_normal(std=-1.0), "std is -1.0"),
        (lambda: processes.GaussianProcess(processes.Linear(), "epsilonn"), "did you mean 'epsilon'"),
        (lambda: processes.vp_linear(num_steps=0), "num_steps"),
        (lambda: processes.vp_linear(prediction="epsilon", zero_terminal_snr=True), "zero terminal SNR"),
        (lambda: processes.absorbing(vocab_size=0), "vocab_size"),
        (lambda: denoisers.guided(EXACT, "strong", null={"label": 2}), "strong"),
        (lambda: denoisers.guided(EXACT, 2.0, null={"label": 2}, interval=(0.8, 0.2)), "interval"),
        (lambda: models.dit("S/3"), "S/3"),
        (lambda: models.dit("S/2", wdith=8), "did you mean 'width'"),
        (lambda: models.dit("S/2").init(KEY, jnp.zeros((1, 5, 5, 3)), jnp.zeros(1), None), "must divide by the patch"),
        (
            lambda: models.dit("S/2", width=16, heads=2, depth=1, conditions=(models.label(3),)).init(
                KEY, jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), {"lable": jnp.zeros(1, int)}
            ),
            "did you mean 'label'",
        ),
        (lambda: objectives.denoising(models.mlp(), FLOW, cond_dropout=0.1), "needs null="),
        (lambda: training.optimizers.adamw(learning_rate=-1.0), "-1.0"),
        (lambda: training.ema.fixed(1.5), "decay is 1.5"),
        (lambda: training.load_params("no/such/folder"), "does not exist"),
        (lambda: distributed.make_mesh(data=-1, fsdp=-1), "only one axis"),
        (lambda: data.digits(split="dev"), "split is 'dev'"),
        (lambda: data.image_folder("no/such/folder"), "no/such/folder"),
        (lambda: data.arrays("no/such/file.npz"), "no/such/file.npz"),
        (lambda: data.check_finite(data.ArraySource(np.array([[np.nan]], np.float32))), "not finite"),
        (lambda: data.pipeline(data.digits(), 10**6), "batch_size is 1000000"),
        (lambda: metrics.feature_network("birds"), "world is 'birds'"),
        (lambda: metrics.frechet_distance(np.zeros((4, 2)), np.zeros((4, 3))), "3"),
        (lambda: call("solvers.ddim", eta=1, steps=3), "steps"),
        (incomplete, "no entry 'optimizer'"),
    ],
)
def test_a_wrong_call_is_told_in_one_sentence(wrong, says):
    with pytest.raises(InvalidInput) as error:
        wrong()
    text = str(error.value).split("\n-----")[0]
    assert says in text
    assert "\n" not in text.strip()


def test_a_damaged_shard_is_drawn_again_and_a_damaged_config_is_told(tmp_path):
    path = tmp_path / "samples-00000-of-00001.npz"
    path.write_bytes(b"PK not a zip")
    assert shards.read_shard(path) is None
    with pytest.raises(InvalidInput, match="run the same sample command again"):
        shards.read_samples(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidInput, match="not JSON"):
        load(str(tmp_path / "config.json"))
