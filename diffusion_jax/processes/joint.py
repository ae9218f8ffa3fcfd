"""A joint process: one process for each entry of a dict of data, each entry with its own time.

Only the mapping over dicts is here. Entries may be Gaussian or discrete and do not depend on each other.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_jax import randomness
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.processes.kinds import with_condition
from diffusion_jax.typing import Keys, Prediction, Process


@dataclasses.dataclass(frozen=True, init=False)
class JointProcess:
    """`JointProcess({"image": rectified_flow(), "text": absorbing(256)})`: all methods map over such dicts.

    Times are dicts with the same keys, or one array that serves all entries. A prediction's fields are dicts. Entry i
    in alphabetical order draws with `randomness.split(key, n)[i]`.
    """

    entries: tuple[tuple[str, Any], ...]
    kind = "joint"

    def __init__(self, processes: Mapping[str, Process]):
        if not processes:
            raise invalid("processes", dict(processes), "a joint process needs at least one entry")
        object.__setattr__(self, "entries", tuple(sorted(processes.items())))

    @property
    def processes(self) -> dict[str, Any]:
        """The processes by name."""
        return dict(self.entries)

    def given(self, cond: Any) -> tuple["JointProcess", Any]:
        """With what its processes take from the condition, and what is left of it; see `with_condition`."""
        processes = {}
        for name, process in self.entries:
            processes[name], cond = with_condition(process, cond)
        return JointProcess(processes), cond

    def _check(self, field: str, value: Any):
        names = set(self.processes)
        if not isinstance(value, Mapping):
            raise InvalidInput(f"{field} is one array, but the joint process needs a dict with keys {sorted(names)}.")
        if set(value) != names:
            raise InvalidInput(f"{field} has keys {sorted(value)}, but the joint process has {sorted(names)}.")

    def _map(self, method: str, t: Any, **data: Any) -> dict[str, Any]:
        for field, value in data.items():
            self._check(field, value)
        if isinstance(t, Mapping):
            self._check("t", t)
        return {
            name: getattr(process, method)(
                *(value[name] for value in data.values()), t[name] if isinstance(t, Mapping) else t
            )
            for name, process in self.entries
        }

    def _map_prediction(self, method: str, prediction: Prediction, t: Any) -> dict[str, Any]:
        self._check("prediction.x0", prediction.x0)
        parts = {name: Prediction(x0, prediction.eps[name]) for name, x0 in prediction.x0.items()}
        return self._map(method, t, prediction=parts)

    def alpha(self, t):
        """alpha of each entry."""
        return self._map("alpha", t)

    def sigma(self, t):
        """sigma of each entry."""
        return self._map("sigma", t)

    def log_snr(self, t):
        """The log-SNR of each entry."""
        return self._map("log_snr", t)

    def corrupt(self, key: Keys, x0, t):
        """`(x_t, noise)`, both dicts."""
        self._check("x0", x0)
        keys = dict(zip(self.processes, randomness.split(key, len(self.entries)), strict=True))
        pairs = {name: process.corrupt(keys[name], x0[name], self._time(t, name)) for name, process in self.entries}
        return {name: x_t for name, (x_t, _) in pairs.items()}, {name: noise for name, (_, noise) in pairs.items()}

    def _time(self, t, name):
        if not isinstance(t, Mapping):
            return t
        self._check("t", t)
        return t[name]

    def marginal(self, x0, noise, t):
        """`x_t` for given noises."""
        return self._map("marginal", t, x0=x0, noise=noise)

    def prior(self, key: Keys, shape):
        """Noise at t = 1; `shape` is a dict of shapes, batch included."""
        self._check("shape", shape)
        keys = randomness.split(key, len(self.entries))
        return {name: process.prior(k, shape[name]) for (name, process), k in zip(self.entries, keys, strict=True)}

    def network_input(self, x_t, t):
        """What the network is fed for each entry of `x_t`."""
        return self._map("network_input", t, x_t=x_t)

    def network_time(self, t):
        """What the network is fed for each entry's t."""
        return self._map("network_time", t)

    def predict(self, network_output, x_t, t) -> Prediction:
        """The prediction of each entry, gathered: `x0` and `eps` are dicts; a discrete entry's `eps` is None."""
        return _gather(self._map("predict", t, network_output=network_output, x_t=x_t))

    def target(self, x0, noise, t):
        """What each output is regressed to."""
        return self._map("target", t, x0=x0, noise=noise)

    def from_x0(self, x0, x_t, t) -> Prediction:
        """The prediction whose clean half is `x0`."""
        return _gather(self._map("from_x0", t, x0=x0, x_t=x_t))

    def from_eps(self, eps, x_t, t) -> Prediction:
        """The prediction whose noise half is `eps`; Gaussian entries only."""
        return _gather(self._map("from_eps", t, eps=eps, x_t=x_t))

    def score(self, prediction: Prediction, t):
        """grad log p_t of each entry; Gaussian entries only."""
        return self._map_prediction("score", prediction, t)

    def velocity(self, prediction: Prediction, t):
        """dx/dt of each entry; Gaussian entries only."""
        return self._map_prediction("velocity", prediction, t)


def _gather(parts: Mapping[str, Prediction]) -> Prediction:
    return Prediction({name: part.x0 for name, part in parts.items()}, {name: part.eps for name, part in parts.items()})
