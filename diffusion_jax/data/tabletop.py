"""A table with a disc that is driven, a block to push, a goal, and an obstacle to be passed on the left or the right.

Everything is a pure function of a `State` and can be jitted, vmapped and scanned: one step of the physics, the scripted
expert (which passes on either side), and the picture. `environment` is what policies act in (`control.rollout`); `read`
finds the things in a picture again. The data set of demonstrations is in `demonstrations`.

The table is [-1, 1] x [-1, 1], y grows upwards. An action in [-1, 1] x [-1, 1] is the disc's displacement in one step,
in units of `max_step`. Contacts are quasi-static and rough: a block that is hit within 45
degrees of its middle moves as the disc does, and the disc sticks to an obstacle that it heads into.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from diffusion_jax import randomness
from diffusion_jax.control import Environment, Policy
from diffusion_jax.errors import invalid, unknown
from diffusion_jax.typing import Numbers

TASKS = ("push", "reach")
SIDES = ("left", "right")
DISC, BLOCK, OBSTACLE = 0.10, 0.14, 0.25
"""Radii."""
_STICK = 0.7
"""Cosine of the angle between motion and line of centres up to which a push sticks."""


class State(NamedTuple):
    """Where everything is. Without a block to push ("reach") the block is the disc itself."""

    disc: Float[Array, "*B 2"]
    block: Float[Array, "*B 2"]
    goal: Float[Array, "*B 2"]
    obstacle: Float[Array, "*B 2"]


@dataclasses.dataclass(frozen=True)
class Tabletop:
    """The rules.

    task: "push" the block, or "reach" the goal with the disc alone. max_step: largest displacement in a step, per axis.
    tolerance: distance of block and goal below which the task is done.
    """

    task: str = "push"
    max_step: float = 0.06
    tolerance: float = 0.1

    def __post_init__(self):
        if self.task not in TASKS:
            raise unknown("task", self.task, TASKS)
        if not 0 < self.max_step <= 0.1:
            raise invalid("max_step", self.max_step, "it must lie in (0, 0.1], so that nothing is jumped over")
        if self.tolerance <= 0:
            raise invalid("tolerance", self.tolerance, "it must be positive")


def reset(world: Tabletop, key: Key[Array, ""]) -> State:
    """A start: the disc below the obstacle, block and goal above it."""
    u = jax.random.uniform(key, (8,), minval=-1.0)
    obstacle = jnp.array([0.15 * u[0], -0.15])
    disc = jnp.array([obstacle[0] + 0.06 * u[1], -0.85 + 0.04 * u[2]])
    if world.task == "reach":
        return State(disc, disc, jnp.array([0.5 * u[5], 0.6 + 0.2 * u[6]]), obstacle)
    block = jnp.array([obstacle[0] + 0.2 * u[3], 0.5 + 0.04 * u[4]])
    return State(disc, block, jnp.array([0.5 * u[5], 0.8 + 0.05 * u[6]]), obstacle)


def jump_goal(state: State) -> State:
    """The goal on the other half of the table, at least 0.4 away."""
    x = state.goal[..., 0]
    moved = jnp.where(x < 0, 1.0, -1.0) * jnp.maximum(jnp.abs(x), 0.25)
    return state._replace(goal=state.goal.at[..., 0].set(moved))


def step(world: Tabletop, state: State, action: Float[Array, " 2"]) -> State:
    """One step; actions are clipped to [-1, 1]."""
    disc = _on_table(state.disc + world.max_step * jnp.clip(action, -1.0, 1.0), DISC)
    # The obstacle is rough: a step into it is not made, so that whoever heads for its middle, undecided, is held.
    disc = jnp.where(_length(disc - state.obstacle) < DISC + OBSTACLE, state.disc, disc)
    if world.task == "reach":
        return state._replace(disc=disc, block=disc)
    block = _pushed(state, disc)
    block = _on_table(_outside(block, state.obstacle, BLOCK + OBSTACLE), BLOCK)
    # A block that cannot give way holds the disc.
    return state._replace(disc=_on_table(_outside(disc, block, DISC + BLOCK), DISC), block=block)


def _pushed(state, disc):
    """The block after the disc has moved there: it gives way along the disc's motion, or along the line of centres."""
    motion, apart = disc - state.disc, state.block - disc
    sticks = _unit(motion) @ _unit(state.block - state.disc) > _STICK
    way = jnp.where(sticks, _unit(motion), _unit(apart))
    along, overlap = apart @ way, (DISC + BLOCK) ** 2 - apart @ apart
    # Far enough along the way for the distance of the centres to be the sum of the radii.
    return jnp.where(
        overlap > 0, state.block + way * (jnp.sqrt(along**2 + jnp.maximum(overlap, 0.0)) - along), state.block
    )


def simulate(world: Tabletop, state: State, actions: Float[Array, "T 2"]) -> State:
    """The states `[T + 1]` through which `actions` lead, the given one first."""

    def body(state, action):
        state = step(world, state, action)
        return state, state

    _, states = jax.lax.scan(body, state, actions)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state, states)


def done(world: Tabletop, state: State) -> Bool[Array, "*B"]:
    """Whether the block is at the goal."""
    return _length(state.block - state.goal)[..., 0] < world.tolerance


def observe(state: State) -> Float[Array, "*B 8"]:
    """Disc, block, goal and obstacle: the whole state as a vector in [-1, 1]."""
    return jnp.concatenate(list(state), axis=-1)


def environment(world: Tabletop, image_size: int | None = None) -> Environment:
    """The table as policies see it: "observation" [8], and "frames" [size, size, 3] with an `image_size`."""

    def seen(state):
        observation = {"observation": observe(state)}
        if image_size is not None:
            observation["frames"] = render(state, image_size, block=world.task == "push")
        return observation

    return Environment(
        lambda key: reset(world, key),
        lambda state, action, key: step(world, state, action),
        seen,
        lambda state: done(world, state),
    )


def state_of(observation: Any) -> State:
    """The inverse of `observe`; NumPy arrays stay NumPy arrays."""
    return State(*(observation[..., i : i + 2] for i in (0, 2, 4, 6)))


def _length(vector):
    return jnp.sqrt((vector**2).sum(-1, keepdims=True) + 1e-12)


def _unit(vector):
    return vector / _length(vector)


def _outside(point, centre, distance):
    """The point, moved away from a centre until it has at least a distance."""
    apart = point - centre
    return centre + apart * jnp.maximum(1.0, distance / _length(apart))


def _on_table(point, radius):
    return jnp.clip(point, -1 + radius, 1 - radius)


def expert(world: Tabletop, state: State, side: Any) -> Float[Array, " 2"]:
    """The scripted action; `side` is -1 to pass the obstacle on the left and 1 on the right.

    It heads for the goal, or for the place behind the block seen from the goal, on tangents around what is in the way;
    behind the block it pushes. It has no memory, so it recovers from whatever happened.
    """
    disc, block, goal, obstacle = state
    if world.task == "reach":
        target, heading = goal, _unit(goal - disc)
    else:
        forward = _unit(goal - block)
        target = block - forward * (DISC + BLOCK + 0.01)
        heading = _around(disc, target, target - disc, block, DISC + BLOCK + 0.02, 0)
    # Past the obstacle, whichever way round is nearer.
    heading = _around(
        disc, target, heading, obstacle, DISC + OBSTACLE + 0.04, jnp.where(disc[1] < obstacle[1], side, 0)
    )
    action = heading * jnp.minimum(1.0, _length(target - disc) / world.max_step)
    if world.task == "push":
        behind = disc - block
        lined_up = -(_unit(behind) @ forward) > 0.5 * (1 + _STICK)
        near = _length(behind) < DISC + BLOCK + 0.06
        push = forward * jnp.minimum(1.0, _length(goal - block) / world.max_step)
        action = jnp.where(near & lined_up, push, action)
    rest = _length(block - goal) < 0.25 * world.tolerance
    return jnp.where(rest, 0.0, action)


def _around(point, target, heading, centre, radius, side):
    """The heading, or the tangent to a circle that lies between point and target; side 0 takes the nearer tangent."""
    heading, to_centre = _unit(heading), centre - point
    along, across = to_centre @ heading, to_centre[0] * heading[1] - to_centre[1] * heading[0]
    distance = _length(to_centre)[0]
    blocked = (along > 0) & (jnp.abs(across) < radius) & (_length(target - point)[0] > along - 0.5 * radius)
    # A positive angle turns left; inside the circle the tangent points a little outwards.
    inside = jnp.maximum(radius - distance, 0.0)
    angle = jnp.arcsin(jnp.minimum(radius / distance, 1.0)) + 8.0 * inside
    turn = jnp.where(side == 0, jnp.where(across >= 0, 1.0, -1.0), -jnp.sign(side)) * angle
    c, s = jnp.cos(turn), jnp.sin(turn)
    tangent = jnp.array([[c, -s], [s, c]]) @ _unit(to_centre)
    return jnp.where(blocked, tangent, heading)


def expert_policy(world: Tabletop) -> Policy:
    """The expert as a policy, one action at a time; each episode has a side of its own. It has no parameters."""

    def init(params, observation, key):
        keys = randomness.sample_keys(key, jnp.arange(len(observation["observation"])))
        return jax.vmap(lambda key: jnp.where(jax.random.bernoulli(key), 1.0, -1.0))(keys)

    def act(params, side, observation, key):
        states = state_of(observation["observation"][:, -1])
        return jax.vmap(lambda state, side: expert(world, state, side))(states, side)[:, None], side

    return Policy(init, act)


def sides(
    observations: Float[Array | np.ndarray, "E T 8"], margin: float = 0.08
) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    """On which side the disc passed the obstacle's middle (-1, 1, or 0 if it never did), and how often it had changed
    sides before; it is on a side once it is `margin` off the middle."""
    states = state_of(observations)
    apart = states.disc - states.obstacle
    passed = jnp.cumsum(apart[..., 1] >= 0, axis=1) > 0
    now = jnp.where(jnp.abs(apart[..., 0]) > margin, jnp.sign(apart[..., 0]), 0.0).astype(jnp.int32)

    def body(last, column):
        now, passed = column
        new = jnp.where((now == 0) | passed, last, now)
        return new, (last != 0) & (new != last)

    last, changes = jax.lax.scan(body, jnp.zeros(len(now), jnp.int32), (now.T, passed.T))
    return jnp.where(passed[:, -1], last, 0), changes.sum(axis=0)


def wavering(observations: Numbers, actions: Numbers, chunk: int, least: float = 0.2) -> Bool[np.ndarray, "*B"]:
    """Whether, while the disc is still below the obstacle, a chunk of actions steers to the other side than the last.

    observations: `[*B, T + 1, 8]`. actions: `[*B, T, 2]`, of whole chunks.
    A chunk steers to a side when its mean action along x is at least `least`; the expert's is about 0.55.
    """
    places = state_of(np.asarray(observations)[..., :-1:chunk, :])
    below = places.disc[..., 1] < places.obstacle[..., 1] - DISC - OBSTACLE
    across = np.asarray(actions)[..., 0].reshape(*below.shape, chunk).mean(axis=-1)
    steers = np.where(np.abs(across) >= least, np.sign(across), 0)
    return np.asarray((below[..., 1:] & (steers[..., 1:] * steers[..., :-1] < 0)).any(axis=-1))


def render(state: State, size: int = 24, block: bool = True) -> Float[Array, "*B size size 3"]:
    """The picture in [-1, 1], from above: a grey obstacle, a green goal, a red block (or none) and a blue disc."""
    grid = (jnp.arange(size) + 0.5) * (2 / size) - 1
    image = jnp.zeros((*state.disc.shape[:-1], size, size, 3))
    things = [(state.obstacle, OBSTACLE, (0.4, 0.4, 0.4)), (state.goal, BLOCK, (0.0, 0.7, 0.0))]
    things += [(state.block, BLOCK, (1.0, 0.0, 0.0))] * block + [(state.disc, DISC, (0.0, 0.0, 1.0))]
    for centre, radius, colour in things:
        x, y = grid - centre[..., :1], -grid - centre[..., 1:]
        outside = jnp.sqrt(y[..., :, None] ** 2 + x[..., None, :] ** 2 + 1e-12) - radius
        cover = jnp.clip(0.5 - outside * (size / 2), 0, 1)[..., None]
        image = image + cover * (jnp.asarray(colour) - image)
    return 2 * image - 1


def read(images: Numbers) -> dict[str, np.ndarray]:
    """Places `[*B, 2]` of "disc", "block" and "goal" in pictures `[*B, size, size, 3]`, on the table; nan if unseen.

    Each is the centroid of the light of its own colour. A goal half under the block is displaced; the others are
    found within a tenth of a pixel.
    """
    images = np.asarray(images, np.float32)
    if images.ndim < 3 or images.shape[-1] != 3 or images.shape[-2] != images.shape[-3]:
        raise invalid("images.shape", images.shape, "expected square colour pictures [..., size, size, 3]")
    light, size = np.clip((images + 1) / 2, 0, 1), images.shape[-2]
    grid = (np.arange(size) + 0.5) * (2 / size) - 1
    places = {}
    for name, channel in (("block", 0), ("goal", 1), ("disc", 2)):
        # A margin, because generated pictures are never quite black.
        own = np.clip(light[..., channel] - np.delete(light, channel, axis=-1).max(-1) - 0.1, 0, 1)
        mass = own.sum((-1, -2))
        mass = np.where(mass < 0.5, np.nan, mass)
        places[name] = np.stack([own.sum(-2) @ grid / mass, -(own.sum(-1) @ grid) / mass], axis=-1)
    return places
