"""Channel balancing by timestep around a network whose dense layers are quantised, by interception.

    y  =  Q_x((x / m_k) [H]) Q_w([H] diag(m_k) W) + b,      k = the bucket of t                                   (1)

The edit divides (and rotates) what selected layers read; the kernels are folded before they are quantised. Factors and
whatever differs between buckets are data in the parameters, with a leading axis K, looked up at the network's time.
Without a quantiser within, (1) is the network itself. Source: ViDiT-Q (Zhao et al. 2025); see `balancing`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.anatomy import module_params, with_module_params
from diffusion_jax.models.edits import taps
from diffusion_jax.models.interception import Edit, Select, Site, intercepted, wrapped
from diffusion_jax.models.paths import by_path
from diffusion_jax.quantization.balancing import balance, balanced, balanced_input
from diffusion_jax.quantization.statistics import time_edges
from diffusion_jax.timesteps import bucket_of
from diffusion_jax.typing import Network

BALANCE, COPIES = "balance", "copies"


class BalancedNetwork(NamedTuple):
    """A network with equation (1) in the selected layers.

    network: its parameters are those that `prepare` makes. Its time is one for all samples or one a sample; where a
        batch has times in several buckets, it is evaluated once for each bucket that occurs, and `extras` are those of
        the last.
    prepare: (params, maxima, alpha, quantize=None) -> parameters of `network`. params: of the plain network. maxima: of
        `ChannelMaxima`, `[K, L, C]` at the path of each layer (`[K, C]` outside of stacks). alpha: one number or one a
        bucket. quantize: (params) -> parameters of the network that was given, where it is a quantised one.
    """

    network: Network
    prepare: Callable[..., dict[str, Any]]


def input_taps(network: Network, select: Select) -> Callable[..., dict[str, Any]]:
    """(params, x, t, cond=None) -> what the selected dense layers read, `[L, B, N, C]` by path, for `with_batch`.

    Inputs without tokens have N = 1.
    """

    def read(output, x):
        return x.reshape(x.shape[0], -1, x.shape[-1])

    opened = intercepted(network, taps(select, read, name="input"))

    def found(params, x, t, cond=None):
        told = by_path(opened.apply(params, {}, x, t, cond)[1]["taps"])
        return {path.removesuffix("/input"): leaf for path, leaf in told.items()}

    return found


def balanced_network(
    network: Network,
    plain: Network,
    select: Select,
    *,
    edges: Sequence[float] = (),
    rotated: bool = False,
    block: int | None = None,
) -> BalancedNetwork:
    """`network`, which is `plain` or a quantised form of it, with equation (1) in the selected dense layers.

    edges: rising, of K buckets of the network's own times: none is one bucket (SmoothQuant). rotated, block: see
        `balancing.balanced`; with one bucket and maxima of the noisiest times this is the static-dynamic form.

    The K copies of quantised kernels take K times the memory of one.
    """
    inner_edges = time_edges(edges)
    buckets = len(inner_edges) + 1

    def apply(site: Site, x):
        if not isinstance(site.module, nn.Dense):
            kind = type(site.module).__name__
            raise InvalidInput(f"balancing is for Dense, but {'/'.join(site.module.path)} is {kind}: narrow select.")
        factors = site.get(BALANCE, "factors", lambda: jnp.ones(x.shape[-1], jnp.float32))
        if site.initialising:
            return site.run(x)
        return site.run(balanced_input(x, factors, rotated, block).astype(x.dtype))

    opened = intercepted(network, Edit(select, apply, (BALANCE,)))

    def prepare(params, maxima, alpha, quantize=None):
        found = {path: leaf.shape[0] for path, leaf in maxima.items()}
        if not found or set(found.values()) != {buckets}:
            raise InvalidInput(f"maxima are needed in {buckets} buckets of times, not {sorted(set(found.values()))}.")
        made = []
        for bucket in range(buckets):
            of_bucket = {path: leaf[bucket : bucket + 1] for path, leaf in maxima.items()}
            power = np.broadcast_to(np.asarray(alpha, np.float32), (buckets,))[bucket]
            kernels, factors = _folded(module_params(plain, params), of_bucket, power, rotated, block)
            own = with_module_params(plain, params, kernels)
            own = quantize(own) if quantize else {"params": own}
            made.append({**own, BALANCE: factors})
        if buckets == 1:
            return made[0]
        leaves, tree = zip(*map(jax.tree.flatten, made), strict=True)
        # What is the same array in all buckets is kept once.
        copies = {
            str(number): jnp.stack(group)
            for number, group in enumerate(zip(*leaves, strict=True))
            if any(leaf is not group[0] for leaf in group)
        }
        shared = [jnp.zeros(()) if str(i) in copies else leaf for i, leaf in enumerate(leaves[0])]
        return {**tree[0].unflatten(shared), COPIES: copies}

    def at(params, bucket):
        leaves, tree = jax.tree.flatten({name: entry for name, entry in params.items() if name != COPIES})
        copies = params[COPIES]
        return tree.unflatten([copies[str(i)][bucket] if str(i) in copies else leaf for i, leaf in enumerate(leaves)])

    def around(inner, params, x, t, cond, train, key):
        if isinstance(t, Mapping) or jnp.ndim(t) > 1:
            raise InvalidInput("Weights by time are found at one time a sample, [B], or one for all.")
        here = bucket_of(t, inner_edges)

        def answer(bucket):
            return inner(at(params, bucket), x, t, cond, train, key)

        if not jnp.ndim(t):
            return answer(here)

        def enter(carry, bucket):
            def blended():
                output, extras = answer(bucket)
                chosen = (here == bucket).reshape(-1, *(1,) * (output.ndim - 1))
                return jnp.where(chosen, output, carry[0]), extras

            return jax.lax.cond(jnp.any(here == bucket), blended, lambda: carry), None

        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(answer, 0))
        return jax.lax.scan(enter, start, jnp.arange(buckets))[0]

    timed = wrapped(opened.network, around, _not_begun) if buckets > 1 else opened.network
    return BalancedNetwork(timed, prepare)


def _not_begun(key, x, t, cond=None):
    raise InvalidInput("A balanced network is begun with `prepare`, from a network's parameters.")


def _folded(params, maxima, alpha, rotated, block, path=()):
    """`(params, factors)`: kernels at the paths of `maxima` folded, and the factors, nested like the parameters."""
    here = "/".join(path)
    if here in maxima:
        factors = balance(maxima[here], params["kernel"], alpha)
        kernel = balanced(params["kernel"], factors, rotated, block).kernel[0]
        return {**params, "kernel": kernel}, {"factors": factors[0]}
    new, told = {}, {}
    for name, entry in params.items():
        new[name] = entry
        below = (*path, name)
        if isinstance(entry, Mapping) and any(one.startswith("/".join(below)) for one in maxima):
            new[name], factors = _folded(entry, maxima, alpha, rotated, block, below)
            told |= {name: factors} if factors else {}
    return new, told
