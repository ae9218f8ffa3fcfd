"""Processes say of which kind they are: a user's own one is told apart by that alone."""

import chex
import jax
import jax.numpy as jnp
import pytest

from diffusion_jax import acceleration, denoisers, objectives, processes, solvers
from diffusion_jax.denoisers.analytic import analytic
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from diffusion_jax.timesteps import linspace
from tests.denoisers.tiny import network

KEY = jax.random.key(0)
NETWORK = network()
X = jnp.zeros((2, 3))
PARAMS = NETWORK.init(KEY, X, None, None)
FLOW = processes.rectified_flow()


class Own:
    """A user's own process: the methods of one of ours, without being one."""

    def __init__(self, process, **attributes):
        self._process = process
        self.__dict__.update(attributes)

    def __getattr__(self, name):
        if name == "kind":
            raise AttributeError(name)
        return getattr(self._process, name)


for _name in ("corrupt", "prior", "network_input", "network_time", "predict", "target"):
    # From Python 3.12 on, the methods of a protocol are looked for in the class.
    setattr(Own, _name, property(lambda self, name=_name: getattr(self._process, name)))


@pytest.mark.parametrize(
    ("process", "kind"),
    [
        (FLOW, "gaussian"),
        (processes.absorbing(5), "absorbing"),
        (processes.uniform(5), "discrete"),
        (processes.JointProcess({"x": FLOW}), "joint"),
    ],
)
def test_each_process_is_of_one_kind(process, kind):
    assert processes.kind_of(process) == kind
    told = {
        "gaussian": processes.is_gaussian(process),
        "discrete": processes.is_discrete(process),
        "joint": processes.is_joint(process),
    }
    assert sum(told.values()) == 1 and told["discrete" if kind == "absorbing" else kind]
    assert set(processes.members(process)) == ({"x"} if kind == "joint" else {""})


def test_a_process_of_ones_own_with_a_kind_runs_and_trains_as_ours_bit_for_bit():
    @jax.jit
    def everything(key):
        outcomes = []
        for process in (FLOW, Own(FLOW, kind="gaussian")):
            denoiser = denoisers.guided(denoisers.denoiser(NETWORK, process), 2.0, null={"label": 0})
            cond = {"label": jnp.array([1, 2])}
            x = sample(key, denoiser, PARAMS, solvers.dpm_solver_pp(2), linspace(3), shape=(2, 3), cond=cond).x
            objective = objectives.denoising(NETWORK, process)
            loss = objective.loss(PARAMS, objective.init(key, PARAMS, {"x0": x}), {"x0": x}, key)[0]
            outcomes.append((x, loss))
        return outcomes

    ours, own = everything(KEY)
    chex.assert_trees_all_equal(own, ours)


@pytest.mark.parametrize(
    "door",
    [
        lambda process: denoisers.denoiser(NETWORK, process),
        lambda process: analytic(process),
        lambda process: objectives.denoising(NETWORK, process),
        lambda process: acceleration.cached_outputs(
            denoisers.denoiser(NETWORK, FLOW)._replace(process=process), acceleration.every(2)
        ),
        lambda process: sample(
            KEY,
            denoisers.denoiser(NETWORK, FLOW)._replace(process=process),
            PARAMS,
            solvers.ddim(),
            linspace(2),
            x_init=X,
        ),
    ],
    ids=["denoiser", "analytic", "objective", "cache", "solver"],
)
def test_a_process_that_does_not_say_its_kind_is_told_at_the_first_door(door):
    with pytest.raises(InvalidInput, match="process Own has no attribute kind, but one of gaussian, discrete"):
        door(Own(FLOW))
    with pytest.raises(InvalidInput, match="process Own has kind 'gausian'"):
        door(Own(FLOW, kind="gausian"))
