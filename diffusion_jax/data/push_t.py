"""The Push-T benchmark (gym-pusht): its simulators, and a scripted expert that plans in a copy of one.

Needs the extra `control` (gymnasium, gym-pusht), which is imported when a simulator is first made. A disc pushes
a block in the shape of a T to a fixed pose; the task is done when 95 % of the goal is covered (Chi et al. 2023).

Observations and actions are scaled to [-1, 1]: the observation is the disc (x, y), the eight corners of the block's two
rectangles (x, y each) and the cosine and sine of its angle; an action is the place to which the disc is drawn.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from diffusion_jax.control import Policy, Simulator, rollout_simulators
from diffusion_jax.data.demonstrations import Demonstrations
from diffusion_jax.data.sources import check_split
from diffusion_jax.errors import InvalidInput, invalid

SIDE, DISC = 512, 15
GOAL = (256.0, 256.0, np.pi / 4)
OBSERVATION = 20
STEPS = 300
"""Of an episode."""
# The block's bar and stem in its own frame: middle and half sides.
_BOXES = (((0.0, 15.0), (60.0, 15.0)), ((0.0, 75.0), (15.0, 45.0)))
_CORNERS = np.array([(-60, 30), (60, 30), (60, 0), (-60, 0), (-15, 30), (-15, 120), (15, 120), (15, 30)], np.float64)
_OUTLINE = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], np.float64)
_CELL = 8


def simulator() -> Any:
    """One Push-T environment. Raises InvalidInput when the extra is not installed."""
    try:
        from gym_pusht.envs.pusht import PushTEnv  # pyright: ignore[reportMissingImports]: an extra
    except ImportError as error:
        raise InvalidInput(
            f"Push-T needs gymnasium and gym-pusht ({error}): pip install 'diffusion_jax[control]'."
        ) from None
    return PushTEnv(obs_type="state")


def observe(state: Float[np.ndarray, "*B 5"]) -> Float[np.ndarray, "*B 20"]:
    """The observation of a simulator's state: disc x, y, block x, y, angle, in pixels and radians."""
    corners = _to_world(_CORNERS, state[..., 2:])
    places = np.concatenate([state[..., :2], corners.reshape(*state.shape[:-1], 16)], axis=-1)
    angle = state[..., 4:]
    return np.concatenate([_scaled(places), np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


def _scaled(places):
    return places / (SIDE / 2) - 1


def _to_world(points, pose):
    """Points `[K, 2]` of the block's frame for poses `[*B, 3]`."""
    c, s = np.cos(pose[..., 2, None]), np.sin(pose[..., 2, None])
    x, y = points[:, 0], points[:, 1]
    return np.stack([c * x - s * y + pose[..., 0, None], s * x + c * y + pose[..., 1, None]], axis=-1)


def simulators(seed: int, episodes: int) -> list[Simulator]:
    """What policies act in (`control.rollout_simulators`): "observation" [20]; the score is the share that is covered.

    Episode i starts from (seed, i). Raises InvalidInput when the extra is not installed.
    """

    def one(index):
        inner = simulator()

        def reset():
            return {"observation": observe(np.asarray(inner.reset(seed=_seed(seed, index))[0]))}

        def step(action):
            state, *_, info = inner.step((np.asarray(action, np.float64) + 1) * (SIDE / 2))
            done = info["coverage"] > inner.success_threshold
            return {"observation": observe(np.asarray(state))}, bool(done), float(info["coverage"])

        return Simulator(reset, step)

    return [one(index) for index in range(episodes)]


def _seed(seed, index):
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


class Push(NamedTuple):
    """A straight push: where the disc starts, the direction, and how far it goes."""

    start: Float[np.ndarray, "2"]
    direction: Float[np.ndarray, "2"]
    depth: float


@dataclasses.dataclass
class Expert:
    """Plans one push at a time: of all pushes along the outline, tried in a simulator, the one that brings the block's
    corners nearest to the goal; walks around the block to its start, pushes, and looks again.

    act(state) -> the disc's next target in pixels. spacing: of the places to push from, in pixels.
    """

    rng: np.random.Generator
    spacing: float = 12.0
    speed: float = 18.0

    def __post_init__(self):
        self.model = simulator()
        self.model.reset(seed=0)
        self.queue: list[np.ndarray] = []
        self.push: Push | None = None

    def act(self, state: Float[np.ndarray, "5"]) -> Float[np.ndarray, "2"]:
        """The next target, for a state disc x, y, block x, y, angle."""
        if not self.queue:
            self._plan(np.asarray(state, np.float64))
        return self.queue.pop(0)

    def _plan(self, state):
        disc = state[:2]
        # Arrived: look once more at what pushing from here does, because walking may have touched the block.
        if self.push is not None and np.linalg.norm(self.push.start - disc) < 10:
            direction = self.push.direction
            gain, depth = self._try(state[2:], disc, direction)
            self.push = None
            if gain > 0:
                steps = max(int(np.ceil(depth / (0.6 * self.speed))), 1)
                ramp = np.linspace(0, depth, steps + 1)[1:]
                # The disc lags two steps behind its target: wait for it.
                self.queue = [disc + d * direction for d in ramp] + [disc + depth * direction] * 3
                return
        self.push = push = self._choose(state)
        self.queue = self._walk(state, push.start)

    def _choose(self, state):
        pose = state[2:]
        pushes, values = [], []
        for point, normal in _contacts(self.spacing, self.rng.random()):
            turn = pose.copy()
            turn[:2] = 0
            direction = -_to_world(normal[None], turn)[0]
            start = _to_world(point[None], pose)[0] - (DISC + 6) * direction
            if (start < 25).any() or (start > SIDE - 25).any() or _distance(start[None], pose)[0] < DISC + 2:
                continue
            gain, depth = self._try(pose, start, direction)
            pushes.append(Push(start, direction, depth))
            # Walking costs time; a pixel of progress is worth a walk of fifty.
            values.append(gain - 0.01 * np.linalg.norm(start - state[:2]))
        best = int(np.argmax(values))
        if values[best] > -2.0:
            return pushes[best]
        return pushes[self.rng.integers(len(pushes))]

    def _try(self, pose, start, direction, reach=90):
        """The largest gain in mean distance of the corners to the goal, and the depth at which it is reached."""
        model = self.model
        model.agent.position, model.agent.velocity = start.tolist(), (0, 0)
        # The angle first: turning is about the centre of gravity and would move the block.
        model.block.angle = pose[2]
        model.block.position = pose[:2].tolist()
        model.block.velocity, model.block.angular_velocity = (0, 0), 0
        model.space.reindex_shapes_for_body(model.block)
        model.space.reindex_shapes_for_body(model.agent)
        speed = 100 * direction
        model.agent.velocity = speed.tolist()
        poses = []
        for _ in range(reach):
            model.space.step(model.dt)
            poses.append((*model.block.position, model.block.angle))
            if not 20 < min(model.agent.position) <= max(model.agent.position) < SIDE - 20:
                break
        before, after = _error(pose), _error(np.array(poses))
        # Where nothing is touched the block rests: no gain.
        best = int(after.argmin())
        return before - after[best], best + 1.0

    def _walk(self, state, start):
        """Targets from the disc to the start of a push, around the block."""
        from skimage.graph import route_through_array

        count = SIDE // _CELL
        grid = (np.arange(count) + 0.5) * _CELL
        cells = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
        free = _distance(cells, state[2:]) - DISC
        cost = np.where(free < 3, 300.0, np.where(free < 14, 6.0, 1.0))
        cost[((cells < 24) | (cells > SIDE - 24)).any(axis=1)] = 300.0
        first, last = (tuple(np.clip((x / _CELL).astype(int), 0, count - 1)) for x in (state[:2], start))
        route, _ = route_through_array(cost.reshape(count, count), first, last, fully_connected=True, geometric=True)
        path = np.concatenate([state[None, :2], (np.array(route[1:-1]).reshape(-1, 2) + 0.5) * _CELL, start[None]])
        along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
        steps = max(int(np.ceil(along[-1] / self.speed)), 1)
        at = np.linspace(0, along[-1], steps + 1)[1:]
        targets = np.stack([np.interp(at, along, path[:, i]) for i in (0, 1)], axis=1)
        return [*targets, *[start] * 3]


def _contacts(spacing, offset):
    """Places on the block's outline and their outward normals, in the block's frame; offset in [0, 1) shifts them."""
    contacts = []
    for a, b in zip(_OUTLINE, np.roll(_OUTLINE, -1, axis=0), strict=True):
        length = np.linalg.norm(b - a)
        along = (b - a) / length
        count = max(int(length / spacing), 1)
        for place in (np.arange(count) + offset) / count * length:
            contacts.append((a + place * along, np.array([along[1], -along[0]])))
    return contacts


def _distance(points, pose):
    """Signed distance of points `[K, 2]` to the block."""
    c, s = np.cos(pose[2]), np.sin(pose[2])
    local = (points - pose[:2]) @ np.array([[c, -s], [s, c]])
    distances = []
    for middle, half in _BOXES:
        apart = np.abs(local - middle) - half
        distances.append(np.linalg.norm(np.maximum(apart, 0), axis=1) + np.minimum(apart.max(axis=1), 0))
    return np.min(distances, axis=0)


def _error(pose):
    """Mean distance in pixels of the block's corners to those of the goal, for poses `[*B, 3]`."""
    return np.linalg.norm(_to_world(_CORNERS, pose) - _to_world(_CORNERS, np.array(GOAL)), axis=-1).mean(axis=-1)


def expert_policy(seed: int = 0) -> Policy:
    """The expert as a policy. It is Python, and its state is not an array: it acts in simulators, not under jit."""

    def init(params, observation, key):
        return [Expert(np.random.default_rng((seed, i))) for i in range(len(observation["observation"]))]

    def act(params, experts, observation, key):
        states = _states(observation["observation"][:, -1])
        targets = np.stack([expert.act(state) for expert, state in zip(experts, states, strict=True)])
        return _scaled(targets)[:, None], experts

    return Policy(init, act)


def _states(observation):
    """The inverse of `observe`."""
    observation = np.asarray(observation, np.float64)
    places = (observation[..., :18] + 1) * (SIDE / 2)
    angle = np.arctan2(observation[..., 19], observation[..., 18])
    # The third and fourth corners are the ends of the bar's outer side, whose middle is the block's origin.
    origin = (places[..., 6:8] + places[..., 8:10]) / 2
    return np.concatenate([places[..., :2], origin, angle[..., None]], axis=-1)


def push_t_demonstrations(
    split: str = "train", episodes: int = 50, history: int = 2, chunk: int = 8, future: int = 0, seed: int = 0
) -> Demonstrations:
    """Windows of the expert's successful episodes.

    x0: the action chunk `[chunk, 2]`; with a future, `{"action": ..., "future": [future, 20]}`.
    cond: "observation" `[history, 20]`, the last one latest.
    Takes about a second an episode. Raises InvalidInput when the extra is not installed.
    """
    check_split(split)
    if episodes < 1:
        raise invalid("episodes", episodes, "at least one is needed")
    start = 2 * seed + ("train", "test").index(split)
    run = rollout_simulators(
        simulators(start, episodes), expert_policy(start), None, jax.random.key(start), steps=STEPS
    )
    if not run.success.any():
        raise InvalidInput(f"The expert failed in all of the {episodes} episodes: ask for more.")
    ends = np.where(run.success, np.asarray(run.time), -1)
    return Demonstrations(
        run.states["observation"], np.asarray(run.actions), ends, history, chunk, future, name=f"push_t/{split}"
    )
