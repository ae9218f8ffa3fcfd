"""Sets of examples that a model makes: runs of a teacher, samples of a student, examples with a score.

A collection says how each example is made from its index. `collect` makes them all, in memory or as shards on disk:
a shard is written whole or not at all, and those that are there are kept, so a process that was killed goes on where it
was and the set is the same. It is read like any data (`latents`): memory-mapped, shuffled, resumed at an example.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key
from tqdm.auto import tqdm

from diffusion_jax import distributed
from diffusion_jax.clock import as_grid, num_steps
from diffusion_jax.data.conditions import Conditions
from diffusion_jax.data.encoded import stacked_examples
from diffusion_jax.data.latent_shards import (
    DESCRIPTION,
    Shards,
    check_same,
    describe_latents,
    latents,
    shards_to_write,
    write_latents,
)
from diffusion_jax.data.sources import ArraySource, Source
from diffusion_jax.errors import InvalidInput, invalid, need
from diffusion_jax.randomness import prior_key, sample_keys
from diffusion_jax.sampling import make_sampler
from diffusion_jax.typing import Denoiser, Params, Shape, Solver, Times


class Collection(NamedTuple):
    """How the examples of a set are made.

    draw: `(index int32 [B]) -> batch` with `x0`, and what else belongs to its examples: `cond`, `noise`, `states`, ...;
        example i depends on its index alone. All calls have the same B.
    count: how many examples there are. batch_size: B. shard_size: examples of a file.
    """

    draw: Callable[[Any], Mapping[str, Any]]
    count: int
    batch_size: int = 64
    shard_size: int = 1024


def trajectories(
    key: Key[Array, ""],
    denoiser: Denoiser,
    params: Params,
    solver: Solver,
    grid: Times,
    *,
    shape: Shape,
    keep: Sequence[int] | None = None,
    conditions: Conditions | None = None,
    mesh: Mesh | None = None,
) -> Callable[[Any], Mapping[str, Any]]:
    """`draw` of a collection: whole runs of a teacher, example i from the noise of `fold_in(key, i)`.

    Examples are `{"x0", "noise", "cond"}`: the end and the beginning of a run, which is what reflow trains on. With
    `keep` there are `states` `[len(keep), *shape]` too, x before the steps of these numbers: `(0, 10, 20, 30, 40, 50)`
    of a grid of 50 steps begins with the noise and ends with the sample.

    grid: `[S + 1]`. shape: of one sample. keep: rising, from 0 .. S; x is held after every g-th step of a run, g their
        greatest common divisor. conditions: `index -> cond`, such as `data.conditions_of(source)`; the guidance of
        `denoiser` is that of the runs. mesh: splits each batch; of this process's devices, where there are several.
    Raises InvalidInput for another `keep`.
    """
    steps = num_steps(as_grid(grid))
    if isinstance(keep, int):
        raise invalid("keep", keep, f"rising numbers of steps from 0 to {steps} were expected, such as (0, {steps})")
    if keep is not None and (list(keep) != sorted(set(keep)) or not keep or not 0 <= keep[0] <= keep[-1] <= steps):
        raise invalid("keep", tuple(keep), f"rising numbers of steps from 0 to {steps} were expected")
    # gcd() and gcd(0) are 0.
    every = None if keep is None else math.gcd(*keep) or steps
    run = make_sampler(denoiser, solver, shape=shape, mesh=mesh, save_every=every)

    @jax.jit
    def begin(index):
        sizes = jax.tree.map(lambda size: (len(index), *size), shape, is_leaf=lambda leaf: isinstance(leaf, tuple))
        return denoiser.process.prior(prior_key(sample_keys(key, index)), sizes)

    def draw(index):
        cond = None if conditions is None else conditions(np.asarray(index))
        noise = begin(jnp.asarray(index))
        found = run(key, params, grid, cond, index, noise)
        example = {"x0": found.x, "noise": noise} | ({} if cond is None else {"cond": cond})
        if keep is None or every is None:
            return example
        kept = [noise if at == 0 else found.trace[at // every - 1] for at in keep]
        return {**example, "states": jnp.stack(kept, axis=1)}

    return draw


def labelled(
    source: Source, label: Callable[[Mapping[str, Any]], Mapping[str, Any]], *, batch_size: int = 64, shard_size=1024
) -> Collection:
    """The examples of `source`, with what `label` says of them: `batch -> entries [B, ...]`, which replace those of
    their name; `cond` is replaced entry by entry. For scores of a reward model, or the answers of a teacher."""

    def draw(index):
        batch = stacked_examples(source, index)
        said = label(batch)
        need("what label returns", said, Mapping, "a dict of entries of the batch was expected")
        cond = {**batch.get("cond", {}), **said.get("cond", {})}
        return {**batch, **said} | ({"cond": cond} if cond else {})

    return Collection(draw, len(source), batch_size, shard_size)


def collect(
    collection: Collection,
    folder: str | Path | None = None,
    made_by: Mapping[str, Any] | None = None,
    *,
    progress: bool = True,
) -> ArraySource | Shards:
    """Makes all examples of a collection and returns them as a source. Without a folder they stay in memory.

    folder: where shards go; those that are there are not made again. Each process of several makes its share of them,
        and all must see the folder. made_by: plain values that say what the examples depend on, which is kept beside
        the shards: a folder whose examples were made by something else is refused.

    Raises InvalidInput for that, for numbers below 1, and for examples without x0.
    """
    need("collection", collection, Collection, "data.Collection(draw, count) was expected")
    for name in ("count", "batch_size", "shard_size"):
        if getattr(collection, name) < 1:
            raise invalid(name, getattr(collection, name), "it must be at least 1")
    if folder is None:
        return _in_memory(collection, progress)
    root = Path(folder).expanduser()
    told = {"made_by": dict(made_by or {}), "examples": {"train": collection.count}}
    told["shard_size"] = collection.shard_size
    check_same(root, told, "examples", "choose another folder")
    shards = shards_to_write(root / "train", collection.count, collection.shard_size)
    missing = [shard for shard in shards if not shard.there]
    with _bar(sum(len(shard.rows) for shard in missing), progress) as bar:
        for shard in missing:
            batch = _made(collection, shard.rows, bar.update)
            beside = {entry: values for entry, values in batch.items() if entry not in ("x0", "cond")}
            if not (root / DESCRIPTION).is_file():
                root.mkdir(parents=True, exist_ok=True)
                describe_latents(root, {**told, "beside": sorted(beside)})
            write_latents(root / "train", shard.name, batch["x0"], {**batch.get("cond", {}), **beside})
    distributed.wait_for_all("collected")
    return latents(str(root))


def _in_memory(collection: Collection, progress: bool) -> ArraySource:
    with _bar(collection.count, progress) as bar:
        batch = _made(collection, range(collection.count), bar.update)
    beside = {name: values for name, values in batch.items() if name not in ("x0", "cond")}
    return ArraySource(batch["x0"], batch.get("cond", {}), "collected", beside=beside)


def _bar(count: int, progress: bool) -> tqdm:
    # None: where standard error is a terminal.
    hidden = None if progress and count and jax.process_index() == 0 else True
    return tqdm(total=count, unit="example", disable=hidden, dynamic_ncols=True)


def _made(collection: Collection, rows: range, advance: Callable[[int], Any]) -> dict[str, Any]:
    """The examples of some rows, as NumPy arrays; while one batch is fetched the next one is made."""
    starts = range(rows.start, rows.stop, collection.batch_size)
    # The last one is repeated until its batch is full.
    indices = [np.minimum(np.arange(a, a + collection.batch_size, dtype=np.int32), rows.stop - 1) for a in starts]
    parts = []
    for made, start in zip(_ahead(map(collection.draw, indices)), starts, strict=True):
        if not isinstance(made, Mapping) or "x0" not in made:
            raise InvalidInput("What is collected has no x0: `draw` returns a dict with x0 and what belongs to it.")
        there = min(collection.batch_size, rows.stop - start)
        parts.append(jax.tree.map(lambda leaf, there=there: leaf[:there], _checked(made, collection.batch_size)))
        advance(there)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _checked(made: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A batch as NumPy arrays. Raises InvalidInput for another number of examples, and for x0 that are not finite."""
    batch = jax.tree.map(np.asarray, dict(made))
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if leaf.shape[:1] != (size,):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            told = f"{size} examples, one for each index, were expected along the first axis"
            raise invalid(f"the shape of {name!r} in what is collected", leaf.shape, told)
    for leaf in jax.tree.leaves(batch["x0"]):
        if np.issubdtype(leaf.dtype, np.inexact) and not np.isfinite(leaf).all():
            raise InvalidInput("An x0 that is collected holds a NaN or an infinity: the run that made it diverged.")
    return batch


def _ahead(made: Any) -> Any:
    """The same values, each asked for before the one in front of it is given out."""
    waiting = next(made)
    for following in made:
        yield waiting
        waiting = following
    yield waiting
