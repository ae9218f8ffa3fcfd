"""Learned rounding: which of its two neighbours on the grid each weight becomes, block by block, so that the outputs of
the blocks stay what they were (Nagel et al. 2020, AdaRound; Li et al. 2021, BRECQ; Li et al. 2023, Q-Diffusion).

    W(V) = s (clip(floor(w / s) + h(V) + z) - z),    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)                      (1)
    L(V) = mean |f(u; W(V)) - f*|^2 + lambda sum (1 - |2 h(V) - 1|^beta)                                          (2)

f is the block, |.|^2 sums over channels, and the mean is over examples and places. u is what the blocks before it make
with quantised weights, f* the output of the block within the plain network, so a block also makes up for the errors
of those before it. V begins where W(V) = w. The second term of (2) is left out for the first fifth of the steps; then
beta falls from 20 to 2, which drives h to 0 or 1. At the end each weight goes up where V >= 0. The states are those of
a sampler's own runs, at all of its times: this is all that the time does here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.clock import network_inputs
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models.anatomy import anatomy_of, module_params, with_module_params
from diffusion_jax.models.interception import Edit, Select, intercepted
from diffusion_jax.models.layers.branches import Block
from diffusion_jax.models.paths import at_path, by_path, replaced_at
from diffusion_jax.quantization.calibration import nullified, states_at
from diffusion_jax.quantization.quantized import COLLECTION
from diffusion_jax.quantization.quantizers import Quantizer, Scales, dequantize, grouped
from diffusion_jax.typing import Condition, Network, Params, Process

_TAPS = "reconstruction"
_KERNEL = "/kernel"
STRETCH = (-0.1, 1.1)
"""The range of the sigmoid of equation (1) before it is clipped, so that 0 and 1 are reached."""
WARM_UP, SHARPNESS = 0.2, (20.0, 2.0)
"""Share of the steps without the second term of equation (2), and beta after these and at the end."""


class Reconstruction(NamedTuple):
    """parameters: of the quantised network, with other integers.

    nearest, learned: `{path of a block: errors}`, the first term of equation (2) over all states with the weights
    of the block rounded to the nearest and as they are now, `[L]` within a stack. Where learning found nothing better,
    the block keeps what it had.
    settled: `{path of a kernel: share of its h within 0.01 of 0 or 1}` at the end, `[L]` within a stack.
    """

    parameters: dict[str, Any]
    nearest: dict[str, np.ndarray]
    learned: dict[str, np.ndarray]
    settled: dict[str, np.ndarray]


def is_block(module: Any) -> bool:
    """Selects the blocks of a stack."""
    return isinstance(module, Block)


def rounding_share(v: Any) -> Any:
    """h(V) of equation (1)."""
    low, high = STRETCH
    return jnp.clip(jax.nn.sigmoid(v) * (high - low) + low, 0.0, 1.0)


def rounding_start(share: Any) -> Any:
    """The V with `h(V) = share`, in [0, 1)."""
    low, high = STRETCH
    return jax.scipy.special.logit((share - low) / (high - low))


def rounding_penalty(v: Any, sharpness: Any) -> Any:
    """`1 - |2 h(V) - 1|^beta` of each weight: 0 where h is 0 or 1, and 1 between."""
    return 1.0 - jnp.abs(2.0 * rounding_share(v) - 1.0) ** sharpness


def softly_rounded(kernel: Any, scales: Scales, quantizer: Quantizer, v: Any) -> Any:
    """W(V) of equation (1), in the shape of `kernel`; v has that of `grouped(kernel, quantizer.per)`."""
    return _restored(kernel, scales, quantizer, rounding_share(v))


def reconstructed(
    network: Network,
    parameters: Any,
    weights: Quantizer,
    process: Process,
    params: Params,
    states: Any,
    times: Any,
    cond: Condition = None,
    *,
    key: Any,
    null: Condition = None,
    blocks: Select = is_block,
    steps: int = 2000,
    batch: int = 32,
    learning_rate: float = 1e-3,
    strength: float = 0.01,
) -> Reconstruction:
    """`parameters` of `quantized(network, weights, ...)` with the integers of equation (2), one block after another.

    params: of the plain network. states, times, cond, null: as `input_ranges` has them.
    blocks: modules, whose quantised kernels are learned together; those of no block stay as they are. A dense layer
        or a convolution may be a block of its own. They are taken in the order in which the network runs them.
    steps, batch, learning_rate: of Adam, for each block. strength: lambda.
    Every step runs the whole network, since blocks may be anything; the outputs of one block for all states are held in
    memory.
    Raises InvalidInput where no block has a quantised kernel, and for shapes that do not fit.
    """
    if steps < 1 or batch < 1:
        raise invalid("steps, batch", (steps, batch), "both must be positive")
    made = by_path(parameters[COLLECTION])
    names = [path.removesuffix(_KERNEL) for path in made if path.endswith(_KERNEL)]
    scales = {name: Scales(made[f"{name}/step"], made[f"{name}/zero"]) for name in names}
    data = _examples(process, states, times, cond, null)
    order: list[str] = []
    opened = intercepted(network, Edit(blocks, lambda site, *args: _tapped(site, order, *args), (), (_TAPS,)))

    def kernels_of(params):
        plain = by_path(module_params(network, params))
        return {name: plain[name + _KERNEL] for name in names}

    def output(params, kernels, unit, layer, data):
        inner = module_params(network, params)
        for name, kernel in kernels.items():
            inner = replaced_at(inner, name + _KERNEL, kernel)
        found = opened.apply(with_module_params(network, params, inner), {}, *data)[1][_TAPS]
        found = at_path(found, unit)["output"]
        return found if layer is None else found[layer]

    jax.eval_shape(lambda params: opened.apply(params, {}, *jax.tree.map(lambda leaf: leaf[:1], data)), params)
    within = {unit: [name for name in names if f"{name}/".startswith(f"{unit}/")] for unit in order}
    within = {unit: inside for unit, inside in within.items() if inside}
    if not within:
        raise InvalidInput(f"blocks selects {', '.join(order)}, in which there is no quantised kernel.")
    integers = {name: made[name + _KERNEL] for name in names}
    nearest, learned, settled = {}, {}, {}
    for number, (unit, inside) in enumerate(within.items()):
        scanned = any(part in anatomy_of(network).scanned for part in unit.split("/"))
        depth = len(integers[inside[0]]) if scanned else 1

        @jax.jit
        def learn(params, data, integers, layer, key, unit=unit, inside=inside, scanned=scanned):
            where, floats = layer if scanned else None, kernels_of(params)
            hard = {name: dequantize(integers[name], scales[name]) for name in names}
            target = output(params, {}, unit, where, data)

            def chosen(new, old):
                return jnp.where(_mask(layer, old) if scanned else True, new, old)

            def error(kernels, target, data):
                apart = output(params, kernels, unit, where, data).astype(jnp.float32) - target
                return jnp.mean(jnp.sum(apart**2, axis=-1))

            def loss(v, index, step):
                kernels = {n: chosen(softly_rounded(floats[n], scales[n], weights, v[n]), hard[n]) for n in inside}
                fitted = error({**hard, **kernels}, *jax.tree.map(lambda leaf: leaf[index], (target, data)))
                after = (step / steps - WARM_UP) / (1.0 - WARM_UP)
                beta = SHARPNESS[0] + (SHARPNESS[1] - SHARPNESS[0]) * jnp.maximum(after, 0.0)
                penalty = sum(jnp.sum(chosen(rounding_penalty(one, beta), jnp.zeros_like(one))) for one in v.values())
                return fitted + strength * jnp.where(after >= 0, penalty, 0.0)

            adam = optax.adam(learning_rate)

            def update(carry, step) -> Any:
                v, state = carry
                index = jax.random.randint(jax.random.fold_in(key, step), (batch,), 0, len(target))
                moved, state = adam.update(jax.grad(loss)(v, index, step), state)
                return (optax.apply_updates(v, moved), state), None

            start = {name: _start(floats[name], scales[name], weights) for name in inside}
            begun: Any = (start, adam.init(start))

            def run() -> Any:
                return jax.lax.scan(update, begun, jnp.arange(steps))[0][0]

            v = run()
            new = {name: chosen(_hardened(floats[name], scales[name], weights, v[name]), hard[name]) for name in inside}
            errors = error(hard, target, data), error({**hard, **new}, target, data)
            better = errors[1] < errors[0]
            kept = {}
            for name in inside:
                up = _integers(floats[name], scales[name], weights, (v[name] >= 0).astype(jnp.float32))
                kept[name] = jnp.where(better, chosen(up, integers[name]), integers[name]).astype(jnp.int8)
            h = {name: rounding_share(v[name]) for name in inside}
            ends = {name: _share(jnp.minimum(h[name], 1 - h[name]) < 0.01, where) for name in inside}
            return {**integers, **kept}, errors[0], jnp.minimum(*errors), ends

        found = []
        for layer in range(depth):
            drawn = jax.random.fold_in(jax.random.fold_in(key, number), layer)
            integers, *told = learn(params, data, integers, layer, drawn)
            found.append(jax.device_get(told))
        shape = (depth,) if scanned else ()
        nearest[unit], learned[unit] = (np.reshape([one[i] for one in found], shape) for i in (0, 1))
        settled |= {name: np.reshape([one[2][name] for one in found], shape) for name in inside}
    collection = parameters[COLLECTION]
    for name in names:
        collection = replaced_at(collection, name + _KERNEL, integers[name])
    return Reconstruction({**parameters, COLLECTION: collection}, nearest, learned, settled)


def _tapped(site, order, *args):
    output = site.run(*args)
    path = "/".join(site.module.path)
    if path not in order:
        order.append(path)
    site.put(_TAPS, "output", jax.tree.leaves(output)[0])
    return output


def _examples(process, states, times, cond, null):
    """What the network reads, `[N, ...]` of every leaf, in both branches where there is a null condition."""
    states, times = states_at(states, times)
    runs, kept = states.shape[:2]
    x, t = network_inputs(process, states.reshape(runs * kept, *states.shape[2:]), jnp.tile(times, runs))
    cond = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), kept, axis=0), cond)
    if null is None:
        return x, t, cond
    other = nullified(cond, null, len(x))
    return jax.tree.map(lambda *both: jnp.concatenate(both), (x, t, {**other, **(cond or {})}), (x, t, other))


def _mask(layer, values):
    return (jnp.arange(len(values)) == layer).reshape(-1, *(1,) * (values.ndim - 1))


def _share(reached, layer):
    return jnp.mean(reached if layer is None else reached[layer])


def _start(kernel, scales, quantizer):
    exact = grouped(kernel.astype(jnp.float32), quantizer.per) / scales.step
    return rounding_start(exact - jnp.floor(exact))


def _levels(kernel, scales, quantizer, share):
    """floor(w / s) + h + z, clipped, in the shape of the groups."""
    most = 2.0 ** (quantizer.bits - 1)
    below = jnp.floor(grouped(kernel.astype(jnp.float32), quantizer.per) / scales.step)
    return jnp.clip(below + share + scales.zero.astype(jnp.float32), -most, most - 1.0)


def _integers(kernel, scales, quantizer, share):
    return _levels(kernel, scales, quantizer, share).reshape(kernel.shape).astype(jnp.int8)


def _restored(kernel, scales, quantizer, share):
    levels = _levels(kernel, scales, quantizer, share)
    return ((levels - scales.zero.astype(jnp.float32)) * scales.step).reshape(kernel.shape)


def _hardened(kernel, scales, quantizer, v):
    return _restored(kernel, scales, quantizer, (v >= 0).astype(jnp.float32))
