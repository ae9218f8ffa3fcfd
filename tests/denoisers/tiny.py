"""Tiny networks of plain jnp for the tests: any data shape, any prefix of times, labels or none."""

import jax
import jax.numpy as jnp

from diffusion_jax.time_axes import batch_axes, expand
from diffusion_jax.typing import Denoiser, Network, Step

WIDTH = 8
LABELS = 5


def _branch(params, x, t, label):
    """One entry of the data: `[B, *space, C]`, or tokens `[B, N]` when it has a vocabulary."""
    if "tokens" in params:
        hidden = params["tokens"][x] + jnp.cos(expand(t, x))[..., None] * params["time"]
    else:
        hidden = x @ params["in"] + jnp.cos(expand(t, x)) * params["time"]
    if label is not None:
        embedded = params["label"][label]
        hidden = hidden + embedded.reshape(embedded.shape[0], *(1,) * (hidden.ndim - 2), WIDTH)
    hidden = jnp.tanh(hidden)
    return hidden @ params["out"], hidden


def _init_branch(key, x, vocabulary):
    keys = jax.random.split(key, 4)
    channels = x.shape[-1]
    params = {
        "time": jax.random.normal(keys[0], (WIDTH,)),
        "label": jax.random.normal(keys[1], (LABELS, WIDTH)),
    }
    if vocabulary:
        return params | {
            "tokens": jax.random.normal(keys[2], (vocabulary + 1, WIDTH)),
            "out": 0.5 * jax.random.normal(keys[3], (WIDTH, vocabulary)),
        }
    return params | {
        "in": jax.random.normal(keys[2], (channels, WIDTH)),
        "out": 0.5 * jax.random.normal(keys[3], (WIDTH, channels)),
    }


def network(vocabulary: int = 0, on_call=None) -> Network:
    """A network for one array, or for a dict of arrays (integers are tokens).

    extras: `features [B, WIDTH]` and `stacked [2, B]` (the batch is not the first axis), per sample, and a scalar.
    on_call: called on the host whenever the network really runs, with the number of rows.
    """

    def init(key, x, t, cond):
        def branch(key, leaf):
            return _init_branch(key, leaf, vocabulary if jnp.issubdtype(leaf.dtype, jnp.integer) else 0)

        if isinstance(x, dict):
            return {name: branch(k, x[name]) for k, name in zip(jax.random.split(key, len(x)), sorted(x))}
        return branch(key, x)

    def apply(params, x, t, cond, train=False, key=None):
        label = (cond or {}).get("label")
        if isinstance(x, dict):
            found = {n: _branch(params[n], x[n], t[n] if isinstance(t, dict) else t, label) for n in x}
            return {n: value[0] for n, value in found.items()}, {}
        output, hidden = _branch(params, x, t, label)
        features = hidden.reshape(hidden.shape[0], -1, WIDTH).mean(1)
        if on_call is not None:
            jax.debug.callback(on_call, jnp.int32(x.shape[0]))
        return output, {
            "features": features,
            "stacked": jnp.stack([features[:, 0], features[:, 1]]),
            "one": jnp.ones(()),
        }

    return Network(init, apply)


def remembering(inner: Denoiser) -> Denoiser:
    """A denoiser with memory of every kind: per sample, per sample along a later axis, and shared by the batch.

    Its answer is the mean of the inner answer and of the one before it, so a memory that is mixed up is seen.
    """

    def init(params, x, cond):
        zeros = jnp.zeros(x.shape)
        return {
            "last": zeros,
            "stacked": jnp.zeros((2, *x.shape)),
            "calls": jnp.int32(0),
            "inner": inner.init(params, x, cond),
        }

    def apply(params, carry, x, step, cond):
        prediction, new = inner.apply(params, carry["inner"], x, step, cond)
        weight = jnp.where(carry["calls"] == 0, 0.0, 0.25)
        x0 = prediction.x0 + weight * (carry["last"] - carry["stacked"][1])
        stacked = jnp.stack([prediction.x0, 0.5 * prediction.x0])
        carry = {"last": prediction.x0, "stacked": stacked, "calls": carry["calls"] + 1, "inner": new}
        return prediction._replace(x0=x0), carry

    def axes(carry):
        return {"last": 0, "stacked": 1, "calls": None, "inner": batch_axes(inner, carry["inner"])}

    return Denoiser(init, apply, inner.process, axes)


def step_at(t, index: int = 0, t_next=0.0, num_steps: int = 4) -> Step:
    """A step of a run at `t`."""

    def asarray(value):
        return {k: asarray(v) for k, v in value.items()} if isinstance(value, dict) else jnp.asarray(value, jnp.float32)

    return Step(jnp.int32(index), asarray(t), asarray(t_next), jnp.int32(num_steps))


def ask(denoiser, params, x, step, cond=None):
    """One answer from a fresh carry, compiled."""

    @jax.jit
    def once(params, x, step, cond):
        return denoiser.apply(params, denoiser.init(params, x, cond), x, step, cond)[0]

    return once(params, x, step, cond)
