"""Demonstrations of control as a source: episodes cut into windows of past observations, an action chunk, the future.

The time axis: the chunk's first action answers the window's last observation, and the future begins with what is
observed when the whole chunk has been executed. Worlds and experts live in `tabletop` and `push_t`.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from diffusion_jax import control
from diffusion_jax.data import tabletop
from diffusion_jax.data.sources import Indices, check_split
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models import LatentSpace, latent_space, principal_components

STEPS = 80
"""Of a recorded episode on the tabletop; the expert needs about half of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Demonstrations:
    """Windows of episodes; see `tabletop_demonstrations` for what an example is.

    observations, actions: of every episode, in [-1, 1]. ends: windows of an episode start no later than this step.
    labelled: only the first so many episodes show their actions; None for all.
    share: of the windows that show them, which are repeated until they are about so many; as many as there are if None.
    picture: observations `[B, D]` to pictures `[B, size, size, 3]`, or None.
    latents: what the future shows in place of pictures; see `encoded`. space: that they lie in, where it is known.
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
    share: float | None = None
    latents: Float[np.ndarray, "E steps *L"] | None = None
    space: LatentSpace | None = None
    episode: np.ndarray = dataclasses.field(init=False)
    start: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        if self.history < 1 or self.chunk < 1 or self.future < 0:
            values = (self.history, self.chunk, self.future)
            raise invalid("history, chunk, future", values, "the first two must be positive, the last not negative")
        episodes, steps = self.actions.shape[:2]
        if self.labelled is not None and not 0 <= self.labelled <= episodes:
            raise invalid("labelled", self.labelled, f"there are {episodes} episodes")
        if self.labelled is not None and not self.future:
            raise invalid("labelled", self.labelled, "without a future nothing is left of a window without actions")
        if self.share is not None and not (self.labelled and 0 < self.share < 1):
            raise invalid("share", self.share, "it must lie in (0, 1), and some episodes must be labelled")
        last = steps - self.chunk - max(self.future - 1, 0)
        if last < 0:
            raise InvalidInput(f"Episodes of {steps} steps are too short for chunks of {self.chunk} and their future.")
        counts = np.minimum(self.ends, last) + 1
        episode, start = np.repeat(np.arange(episodes), counts), np.concatenate([np.arange(count) for count in counts])
        if self.share is not None:
            shown = np.flatnonzero(episode < self.labelled)
            wanted = self.share / (1 - self.share) * (len(episode) - len(shown))
            again = np.tile(shown, max(round(wanted / len(shown)) - 1, 0))
            episode, start = np.append(episode, episode[again]), np.append(start, start[again])
        object.__setattr__(self, "episode", episode)
        object.__setattr__(self, "start", start)

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

    def take(self, indices: Indices) -> dict:
        """The windows at `indices`, stacked."""
        episode, start = self.episode[indices], self.start[indices]
        past = np.maximum(start[:, None] + np.arange(1 - self.history, 1), 0)
        observation = self.observations[episode[:, None], past]
        action = self.actions[episode[:, None], start[:, None] + np.arange(self.chunk)]
        cond = {"observation": observation}
        if self.picture is not None:
            cond["frames"] = self._pictures(observation)
        if not self.future:
            return {"x0": action, "cond": cond}
        after = episode[:, None], start[:, None] + self.chunk + np.arange(self.future)
        if self.latents is not None:
            future = self.latents[after]
        else:
            future = self.observations[after] if self.picture is None else self._pictures(self.observations[after])
        if self.labelled is None:
            return {"x0": {"action": action, "future": future}, "cond": cond}
        missing = episode >= self.labelled
        action = np.where(missing[:, None, None], np.float32(0), action)
        return {"x0": {"action": action, "future": future}, "cond": cond, "missing": {"action": missing}}

    def encoded(self, encode: Callable[[Any], Any], batch: int = 1024) -> "Demonstrations":
        """The same windows with futures in the latent space of `encode`, pictures `[batch, ...]` to latents.

        Every picture that some future shows is encoded once; `cond["frames"]` stay pictures.
        Raises InvalidInput for demonstrations without pictures.
        """
        if self.picture is None:
            raise InvalidInput("encoded() needs demonstrations with pictures: give image_size.")
        steps = np.arange(self.observations.shape[1])
        shown = (steps >= self.chunk) & (steps < (self.ends + self.chunk + max(self.future, 1))[:, None])
        rows = self.observations[shown]
        padded = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % batch, axis=0)]).reshape(
            -1, batch, rows.shape[-1]
        )
        found = np.concatenate([np.asarray(encode(self.picture(part))) for part in padded])
        latents = np.zeros((*shown.shape, *found.shape[1:]), found.dtype)
        latents[shown] = found[: len(rows)]
        return dataclasses.replace(self, latents=latents)

    def _pictures(self, observations):
        assert self.picture is not None
        flat = self.picture(observations.reshape(-1, observations.shape[-1]))
        return np.asarray(flat).reshape(*observations.shape[:2], *flat.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """The picture at the beginning of each window: what an autoencoder of the scenes learns from."""

    demonstrations: Demonstrations
    name: str = "pictures"

    def __post_init__(self):
        if self.demonstrations.picture is None:
            raise InvalidInput("Pictures need demonstrations with pictures: give image_size.")

    def __len__(self) -> int:
        return len(self.demonstrations)

    def __getitem__(self, index: int) -> dict:
        return {"x0": self.take(np.array([index]))["x0"][0]}

    def take(self, indices: Indices) -> dict:
        """The pictures at `indices`, stacked."""
        source = self.demonstrations
        assert source.picture is not None
        return {"x0": np.asarray(source.picture(source.observations[source.episode[indices], source.start[indices]]))}


def principal_futures(
    source: Demonstrations, world: Demonstrations, components: int, tokens: int | None = None, pictures: int = 4096
) -> Demonstrations:
    """`source` with its futures as principal components, in so many tokens a picture (`models.principal_components`).

    world: in whose pictures the components are found, in so many of them, spread over all windows. What is labelled and
        what is not share a space when they name the same world. The result's `space` encodes and decodes.
    Raises InvalidInput for demonstrations without pictures.
    """
    known = Pictures(world)
    chosen = np.linspace(0, len(known) - 1, min(pictures, len(known))).astype(int)
    space = latent_space(*principal_components(known.take(chosen)["x0"], components, tokens))
    return dataclasses.replace(source.encoded(space.encode), space=space)


@functools.lru_cache(maxsize=8)
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
    share: float | None = None,
) -> Demonstrations:
    """Windows of the tabletop's expert, each at the first step to a few after the task is done.

    x0: the action chunk `[chunk, 2]`; with a future `{"action": ..., "future": [future, ...]}`, which are pictures
    `[size, size, 3]` when there are any and observations `[8]` otherwise.
    cond: "observation" `[history, 8]`, the last one latest, and "frames" `[history, size, size, 3]` with `image_size`.
    missing: with `labelled`, `{"action": bool}`, which windows stand for video without actions; their actions are zero.

    labelled: only the first so many episodes show their actions. share: these windows are repeated until they are about
    this share of all, so that a batch mixes both kinds evenly.
    noise: standard deviation of what is added to the expert's actions, so that it is seen to recover.
    Every second episode or so passes the obstacle on the left (`source.side`); `source.fork` marks windows in which one
    cannot see yet which side it will be. The same call gives the same object.
    """
    check_split(split)
    if episodes < 1 or noise < 0:
        raise invalid("episodes, noise", (episodes, noise), "the first must be positive and the second not negative")
    world = tabletop.Tabletop(task)
    key = jax.random.fold_in(jax.random.key(seed), ("train", "test").index(split))
    run, observations = jax.device_get(_record(world, key, episodes, noise))
    picture = None
    if image_size is not None:
        picture = jax.jit(lambda rows: tabletop.render(tabletop.state_of(rows), image_size, block=world.task == "push"))
    # Four steps of rest, so that it is shown to stay; no window of the rare failure.
    ends = np.where(run.success, np.asarray(run.time) + 4, -1)
    return TabletopDemonstrations(
        observations,
        run.actions,
        ends,
        history,
        chunk,
        future,
        labelled,
        picture,
        f"tabletop_{task}/{split}",
        share,
        sides=np.asarray(tabletop.sides(observations)[0]),
    )


@partial(jax.jit, static_argnums=(0, 2, 3))
def _record(world, key, episodes, noise):
    expert = control.with_action_noise(tabletop.expert_policy(world), noise)
    run = control.rollout(tabletop.environment(world), expert, None, key, episodes=episodes, steps=STEPS)
    return run, tabletop.observe(run.states)


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
