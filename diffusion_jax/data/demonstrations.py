"""Demonstrations of control as a source: episodes cut into windows of past observations, an action chunk, the future.

The time axis: the chunk's first action answers the window's last observation, and the future begins with what is
observed when the whole chunk has been executed. Worlds and experts live in `tabletop` and `push_t`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from diffusion_jax.data import tabletop
from diffusion_jax.data.sources import check_split
from diffusion_jax.errors import InvalidInput, invalid


@dataclasses.dataclass(frozen=True, eq=False)
class Demonstrations:
    """Windows of episodes; see `tabletop_demonstrations` for what an example is.

    observations, actions: of every episode, in [-1, 1]. ends: windows of an episode start no later than this step.
    labelled: only the first so many episodes show their actions.
    picture: observations `[B, D]` to pictures `[B, size, size, 3]`, or None.
    episode, start: where each window is.
    """

    observations: Float[np.ndarray, "E steps D"]
    actions: Float[np.ndarray, "E T A"]
    ends: Int[np.ndarray, " E"]
    history: int = 2
    chunk: int = 8
    future: int = 0
    labelled: int | None = None
    picture: Callable[[Any], Any] | None = None
    name: str = "demonstrations"
    episode: np.ndarray = dataclasses.field(init=False)
    start: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        if self.history < 1 or self.chunk < 1 or self.future < 0:
            values = (self.history, self.chunk, self.future)
            raise invalid("history, chunk, future", values, "the first two must be positive, the last not negative")
        episodes, steps = self.actions.shape[:2]
        if self.labelled is not None and not 0 <= self.labelled <= episodes:
            raise invalid("labelled", self.labelled, f"there are {episodes} episodes")
        last = steps - self.chunk - max(self.future - 1, 0)
        if last < 0:
            raise InvalidInput(f"Episodes of {steps} steps are too short for chunks of {self.chunk} and their future.")
        counts = np.minimum(self.ends, last) + 1
        object.__setattr__(self, "episode", np.repeat(np.arange(episodes), counts))
        object.__setattr__(self, "start", np.concatenate([np.arange(count) for count in counts]))

    @property
    def shape(self) -> Any:
        """Shape of one `x0`."""
        action = (self.chunk, self.actions.shape[-1])
        if not self.future:
            return action
        return {"action": action, "future": self.take(np.zeros(1, int))["x0"]["future"].shape[1:]}

    def __len__(self) -> int:
        return len(self.episode)

    def __getitem__(self, index: int) -> dict:
        return jax.tree.map(lambda leaf: leaf[0], self.take(np.array([index])))

    def take(self, indices: Any) -> dict:
        """The windows at `indices`, stacked."""
        episode, start = self.episode[indices], self.start[indices]
        past = np.maximum(start[:, None] + np.arange(1 - self.history, 1), 0)
        observation = self.observations[episode[:, None], past]
        action = self.actions[episode[:, None], start[:, None] + np.arange(self.chunk)]
        cond = {"observation": observation}
        if self.picture is not None:
            cond["frames"] = self._pictures(observation)
        if self.labelled is not None:
            cond["has_action"] = episode < self.labelled
            action = np.where(cond["has_action"][:, None, None], action, np.float32(0))
        if not self.future:
            return {"x0": action, "cond": cond}
        after = self.observations[episode[:, None], start[:, None] + self.chunk + np.arange(self.future)]
        future = after if self.picture is None else self._pictures(after)
        return {"x0": {"action": action, "future": future}, "cond": cond}

    def _pictures(self, observations):
        flat = self.picture(observations.reshape(-1, observations.shape[-1]))
        return np.asarray(flat).reshape(*observations.shape[:2], *flat.shape[1:])


def tabletop_demonstrations(
    split: str = "train",
    episodes: int = 500,
    labelled: int | None = None,
    task: str = "push",
    history: int = 2,
    chunk: int = 8,
    future: int = 0,
    image_size: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Demonstrations:
    """Windows of the tabletop's expert, each at the first step to a few after the task is done.

    x0: the action chunk `[chunk, 2]`; with a future `{"action": ..., "future": [future, ...]}`, which are pictures
    `[size, size, 3]` when there are any and observations `[8]` otherwise.
    cond: "observation" `[history, 8]`, the last one latest; "frames" `[history, size, size, 3]` with `image_size`; and
    "has_action" bool with `labelled`.

    labelled: only the windows of the first so many episodes show their actions; the others' are zero and stand for
    video without actions. All do, and nothing is said about it, when None.
    noise: standard deviation of what is added to the expert's actions, so that it is seen to recover.
    Every second episode or so passes the obstacle on the left (`source.side`); `source.fork` marks windows in which one
    cannot see yet which side it will be.
    """
    check_split(split)
    if episodes < 1 or noise < 0:
        raise invalid("episodes, noise", (episodes, noise), "the first must be positive and the second not negative")
    world = tabletop.Tabletop(task)
    key = jax.random.fold_in(jax.random.key(seed), ("train", "test").index(split))
    outcome = jax.device_get(_record(world, key, episodes, noise))
    picture = None
    if image_size is not None:
        picture = jax.jit(lambda rows: tabletop.render(tabletop.state_of(rows), image_size, block=world.task == "push"))
    # Four steps of rest, so that it is shown to stay; no window of the rare failure.
    ends = np.where(outcome.success, outcome.time + 4, -1)
    return TabletopDemonstrations(
        outcome.observations,
        outcome.actions,
        ends,
        history,
        chunk,
        future,
        labelled,
        picture,
        f"tabletop_{task}/{split}",
        sides=outcome.side,
    )


@partial(jax.jit, static_argnums=(0, 2, 3))
def _record(world, key, episodes, noise):
    return tabletop.rollout(world, tabletop.expert_policy(world), key, episodes, noise=noise)


@dataclasses.dataclass(frozen=True, eq=False)
class TabletopDemonstrations(Demonstrations):
    """Demonstrations on the tabletop, of which the side is known. sides: of each episode, -1 left or 1 right."""

    sides: Int[np.ndarray, " E"] = dataclasses.field(kw_only=True)

    @property
    def side(self) -> Int[np.ndarray, " N"]:
        """The side of each window's episode."""
        return self.sides[self.episode]

    @property
    def fork(self) -> Bool[np.ndarray, " N"]:
        """Windows whose last observation still has the disc below the obstacle and within 0.06 of its middle."""
        state = tabletop.state_of(self.observations[self.episode, self.start])
        apart = np.asarray(state.disc - state.obstacle)
        return (np.abs(apart[:, 0]) <= 0.06) & (apart[:, 1] < 0)
