"""Conditions as values: what a network reads of `cond`, how it is checked and embedded, where it enters, and its null.

A network has `conditions`, a tuple of `ConditionStream`; `ConditionEncoder` runs them and the network uses the result,
`Conditioned`, so that a new kind of condition is a value and touches no network. A stream of one's own:

    @dataclasses.dataclass(frozen=True)
    class Weather(ConditionStream):
        keys = (CondKey("weather", ("B", 4)),)

        def embed(self, cond, place):
            return {"vector": projection(place.width, name="weather")(cond["weather"])}

    network = models.dit("S/2", conditions=(models.label(10), Weather()))

Where a stream can enter, and what it then gives:

    vector    [*prefix, width], a prefix of the shape of t: added to the embedding of the time, which modulates
    context   `Attended`: a sequence for cross-attention; those of several streams stand one after the other
    tokens    `Attended`: they join those of x in self-attention, modulated by the mean of the vectors of x
    channels  [*axes of x, C]: they join the channels of x
    layers    [depth, *prefix, width], a prefix of the residual stream's shape: block i adds entry i
    time      [*prefix, time_features]: added to the sinusoids of the time, before it is embedded

Each network says which of these it `takes`, and may take others, which only it knows what to do with ("control",
"residuals", "audio", "reference"). The kinds of conditions that the library has are in `models.conditions`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import InvalidInput, invalid, nearest
from diffusion_jax.models.layers.branches import Branch, Side
from diffusion_jax.models.layers.embeddings import TimeEmbedding
from diffusion_jax.models.layers.modulation import expand_vector


class CondKey(NamedTuple):
    """A key of `cond` that a stream reads.

    shape: its axes. A number is required; a name is any size, the same wherever the stream has the name again: "B" is
        the batch, and "*x" stands for the axes of x but its channels. None: the stream checks the value itself.
    kind: of dtype, such as jnp.floating; jnp.generic is any. optional: whether the key may be left out.
    """

    name: str
    shape: tuple[int | str, ...] | None = None
    kind: Any = jnp.floating
    optional: bool = False


class Attended(NamedTuple):
    """Tokens `[B, M, width]` and their mask, `[B, M]` or None, true where a token may be seen.

    null_token: of cross-attention: whether a learned token stands before all sequences, which a sample sees whose masks
        hide everything (the null condition). Without, such a sample sees its first token.
    """

    values: Any
    mask: Any = None
    null_token: bool = True


class Place(NamedTuple):
    """What an embedding may depend on besides `cond`.

    t: the time as the network is fed it, `[*prefix]`. time: its embedding, `[*prefix, width]`; None for a stream that
    enters by "time", and so comes before it. time_features: of its sinusoids. shape: of x.
    width, depth, dtype: of the network. table_std: of the entries of learned tables at the start.
    times: makes of a time of the shape of x's prefix what the network makes of t, `[*prefix]`: those of patches, say.
    """

    t: Any
    time: Any
    shape: tuple[int, ...]
    width: int
    depth: int
    dtype: Any
    table_std: float
    time_features: int = 0
    times: Callable[[Any], Any] = jnp.asarray


class ConditionStream:
    """One kind of condition; subclasses are frozen dataclasses, so that networks with them compare and hash.

    keys: what it reads of `cond`. enters: where it enters.
    """

    keys: ClassVar[tuple[CondKey, ...]] = ()
    enters: ClassVar[tuple[str, ...]] = ("vector",)

    def embed(self, cond: Mapping[str, Any], place: Place) -> Mapping[str, Any]:
        """What it gives to each entry. Linen modules made here, with names, are submodules of the encoder."""
        raise InvalidInput(f"{type(self).__name__} has no embed(cond, place), which says what it gives to its entries.")

    def check(self, cond: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
        """Raises InvalidInput for values that do not fit. sizes: of the axes that are known, by name."""
        sizes = dict(sizes)
        for key in self.keys:
            if key.shape is not None and cond.get(key.name) is not None:
                _check_axes(key, cond[key.name], sizes)

    def check_data(self, cond: Mapping[str, Any]) -> None:
        """`check` of what training data say, which must say something: no label of theirs is the null class."""
        self.check(cond, {})

    def null(self, cond: Mapping[str, Any]) -> Mapping[str, Any]:
        """Its keys of `cond` as they are when nothing is said: zeros, and masks that hide everything."""
        return jax.tree.map(jnp.zeros_like, dict(cond))


def _check_axes(key, value, sizes):
    value = value if hasattr(value, "shape") else np.asarray(value)
    axes = list(key.shape)
    if axes[0] == "*x":
        axes[:1] = sizes.setdefault("*x", tuple(value.shape[: max(value.ndim - len(axes) + 1, 0)]))
    fits = len(axes) == value.ndim and all(
        size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
        for axis, size in zip(axes, value.shape, strict=True)
    )
    if not fits or not jnp.issubdtype(value.dtype, key.kind):
        shape = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
        kind = "" if key.kind is jnp.generic else f" and dtype {key.kind.__name__}"
        raise invalid(f"cond[{key.name!r}]", f"{value.dtype}{list(value.shape)}", f"shape [{shape}]{kind} are needed")


def check_condition(conditions: Iterable[ConditionStream], cond: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """`cond` as a dict, once all that the streams need is there, nothing else is, and every value fits.

    Values are looked at where they are known, outside of tracing: a label must be one of the classes.
    """
    conditions = tuple(conditions)
    cond = {} if cond is None else dict(cond)
    keys = {key.name: key for stream in conditions for key in stream.keys}
    for name in cond:
        if name not in keys:
            what = f"it takes {', '.join(keys)}" if keys else "it takes no condition"
            match = nearest(name, keys)
            hint = f"; did you mean {match!r}?" if match else "."
            raise InvalidInput(f"The network was given the condition {name!r}, but {what}{hint}")
    for name, key in keys.items():
        if name not in cond and not key.optional:
            raise InvalidInput(f"The network needs the condition {name!r}, but was given {sorted(cond) or 'none'}.")
    for stream in conditions:
        stream.check(cond, sizes)
    return cond


def check_values(conditions: Iterable[ConditionStream], cond: Any, *, data: bool = False) -> None:
    """Raises InvalidInput where a value that `cond` has, and is known, does not fit; what is missing is not told.

    data: whether `cond` is of training data, whose labels are classes and never the null class.
    """
    for stream in conditions:
        if all(key.optional or key.name in (cond or {}) for key in stream.keys):
            stream.check_data(cond or {}) if data else stream.check(cond or {}, {})


def empty_condition(conditions: Iterable[ConditionStream], cond: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The condition that says nothing to a network with these `conditions`, with the structure and shapes of `cond`.

    Each stream says what its null is: labels become the null class, vectors, sequences and tokens zeros, masks hide
    everything, and sizes stay, since they tell the shape of the picture and not what is in it. As `null` of guidance:
    `functools.partial(models.empty_condition, network.module.conditions)`.
    """
    if cond is None:
        return None
    null = {}
    for stream in conditions:
        null.update(stream.null({key.name: cond[key.name] for key in stream.keys if key.name in cond}))
    if others := sorted(set(cond) - set(null)):
        raise InvalidInput(f"cond has {others[0]!r}, which no condition of the network reads; it has no null.")
    return {name: null[name] for name in cond}


def check_streams(what: str, conditions: Any, takes: tuple[str, ...]) -> tuple[ConditionStream, ...]:
    """`conditions` as a tuple; raises InvalidInput for what is no stream, or enters where the network has no entry.

    what: the constructor that they were given to. takes: its entries.
    """
    if not isinstance(conditions, tuple | list):
        raise invalid("conditions", conditions, "a tuple such as (models.label(10),) is needed")
    for i, stream in enumerate(conditions):
        if not isinstance(stream, ConditionStream):
            raise invalid(f"conditions[{i}]", stream, "a condition such as models.label(10) is needed")
        if type(stream) in map(type, conditions[:i]) and _names(stream) in map(_names, conditions[:i]):
            raise invalid(f"conditions[{i}]", stream, f"one before it reads {', '.join(_names(stream))} already")
        for entry in stream.enters:
            if entry not in takes:
                raise invalid(f"conditions[{i}]", stream, f"it enters by {entry!r}; {what} takes {', '.join(takes)}")
    return tuple(conditions)


def _names(stream):
    return [key.name for key in stream.keys]


def find_stream(conditions: Iterable[ConditionStream], kind: type) -> Any:
    """The first stream of a kind, or None."""
    return next((stream for stream in conditions if isinstance(stream, kind)), None)


class LayerBranch(Branch):
    """Adds what conditions have for this layer, `side.layers [*prefix, C]`."""

    @nn.compact
    def __call__(self, h, c, side):
        return jnp.broadcast_to(expand_vector(side.layers, h), h.shape)


class Conditioned(NamedTuple):
    """What a network uses of time and conditions. Unused entries are None.

    vector: `[*prefix, width]`, its prefix that of t. context, context_mask: `[B, M, width]` and `[B, M]`, for
        cross-attention. tokens, tokens_mask: the same for self-attention. channels, layers: what enters there.
    own: what only this network takes, by entry.
    """

    vector: Any
    context: Any = None
    context_mask: Any = None
    tokens: Any = None
    tokens_mask: Any = None
    channels: Any = None
    layers: Any = None
    own: Any = None

    def join_channels(self, x):
        """x with the channels that join it."""
        return x if self.channels is None else jnp.concatenate([x, self.channels.astype(x.dtype)], axis=-1)

    def prepend_tokens(self, h, c, rotary=None):
        """`(h, c, rotary, count)`: the residual stream `[B, N, C]` behind the tokens that join it.

        c: `[B, D]`, or `[B, N, D]` to which their vectors are added, the mean of those of h. Tokens are not turned.
        """
        if self.tokens is None:
            return h, c, rotary, 0
        count = self.tokens.shape[1]
        if c.ndim == 3:
            c = jnp.concatenate([jnp.repeat(c.mean(axis=1, keepdims=True), count, axis=1), c], axis=1)
        rotary = None if rotary is None else jnp.pad(rotary, ((count, 0), (0, 0)))
        return jnp.concatenate([self.tokens.astype(h.dtype), h], axis=1), c, rotary, count

    def side(self, h, **others) -> Side:
        """What blocks look at. h: the residual stream, the tokens that join it (`prepend_tokens`) included."""
        mask = self.tokens_mask
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, h.shape[1] - mask.shape[1])), constant_values=True)
        return Side(self.context, self.context_mask, mask, layers=self.layers, **others)

    def block_branches(self, branches):
        """The branches of a block, which begins with the additions of its layer where there are any."""
        return branches if self.layers is None else (("conditions", LayerBranch), *branches)


class ConditionEncoder(nn.Module):
    """`(t, cond, shape of x) -> Conditioned`: the time embedded, and the streams of `conditions` one after the other.

    times: see `Place`; it is applied to t too.

    width: of vector, context and tokens. depth: of the stack, for what enters by layer.
    time_features: number of sinusoids of the time. frequency_shift: of these; see `timestep_embedding`.
    table_std: see `Place`.
    """

    width: int
    conditions: tuple[ConditionStream, ...] = ()
    depth: int = 0
    dtype: Any = jnp.float32
    time_features: int = 256
    frequency_shift: float = 0.0
    table_std: float = 0.02

    @nn.compact
    def __call__(self, t, cond, shape, times=jnp.asarray):
        batch, t = t.shape[0], times(t)
        cond = check_condition(self.conditions, cond, {"B": batch, "*x": tuple(shape[:-1])})
        cond = jax.tree.map(jnp.asarray, cond)
        place = Place(
            t, None, tuple(shape), self.width, self.depth, self.dtype, self.table_std, self.time_features, times
        )
        first = [stream for stream in self.conditions if "time" in stream.enters]
        given = _embedded(first, cond, place)
        added = sum(expand_vector(other, t[..., None]) for other in given.pop("time")) if first else None
        time = TimeEmbedding(self.width, self.time_features, self.frequency_shift, name="time")(t, added)
        others = [stream for stream in self.conditions if stream not in first]
        for entry, values in _embedded(others, cond, place._replace(time=time)).items():
            given.setdefault(entry, []).extend(values)

        vector = time
        for other in given.pop("vector", ()):
            vector = vector + expand_vector(other, vector)
        vector = vector.astype(self.dtype)
        context, context_mask = self._joined(given.pop("context", ()), batch, "null_token")
        tokens, tokens_mask = self._joined(given.pop("tokens", ()), batch)
        channels, layers = given.pop("channels", None), given.pop("layers", None)
        if channels is not None:
            channels = jnp.concatenate(channels, axis=-1)
        if layers is not None:
            layers = jnp.asarray(sum(expand_vector(entry, max(layers, key=jnp.ndim)) for entry in layers), self.dtype)
        own = {entry: values[0] for entry, values in given.items()}
        return Conditioned(vector, context, context_mask, tokens, tokens_mask, channels, layers, own)

    def _joined(self, sequences, batch, null_token=""):
        """`(tokens, mask)` of sequences one after the other; null_token: the name of the learned token before them."""
        if not sequences:
            return None, None
        begun = null_token and any(sequence.null_token for sequence in sequences)
        if begun:
            null = self.param(null_token, nn.initializers.normal(0.02), (self.width,))
            null = jnp.broadcast_to(null, (batch, 1, self.width))
            sequences = [Attended(null, jnp.ones((batch, 1), bool)), *sequences]
        widths = [sequence.values.shape[-1] for sequence in sequences]
        if len(set(widths)) > 1:
            raise InvalidInput(f"The sequences of the conditions have {widths} channels; joined they need one number.")
        values = jnp.concatenate([sequence.values.astype(self.dtype) for sequence in sequences], axis=1)
        if all(sequence.mask is None for sequence in sequences):
            return values, None
        mask = jnp.concatenate([full_mask(sequence) for sequence in sequences], axis=1)
        return values, nonempty(mask) if null_token and not begun else mask


def _embedded(streams: Iterable[ConditionStream], cond: Mapping[str, Any], place: Place) -> dict[str, list]:
    """What the streams give to each entry."""
    given: dict[str, list] = {}
    for stream in streams:
        for entry, value in stream.embed(cond, place).items():
            if entry not in stream.enters:
                raise invalid("enters", stream.enters, f"{stream} gives {entry!r} too")
            given.setdefault(entry, []).append(value)
    return given


def full_mask(sequence: Attended):
    """The mask of a sequence, `[B, M]` bool: all is visible where it has none."""
    return jnp.ones(sequence.values.shape[:2], bool) if sequence.mask is None else sequence.mask.astype(bool)


def nonempty(mask):
    """The mask with the first position visible where nothing is, so that no softmax is over nothing."""
    first = jnp.arange(mask.shape[1]) == 0
    return mask | (first & ~mask.any(axis=1, keepdims=True))
