"""Every network crossed with every way to open one: what works is exact where inactive, what does not says why.

`python -m tests.models.openings` writes what is found into `docs/architecture.md`, between its markers.
"""

import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import adapters, interop, models
from diffusion_jax.acceleration import cached_features, every, taylor
from diffusion_jax.clock import some_step
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.layers.branches import Side, Stack, transformer_branches
from diffusion_jax.models.layers.embeddings import TimeEmbedding
from diffusion_jax.typing import Anatomy, Network, Prediction
from tests.models.drawn import drawn

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
MARKERS = "<!-- openings: python -m tests.models.openings -->", "<!-- end of openings -->"
WORKS = "="


class Case(NamedTuple):
    """A network and what it is asked. select: what of it is edited. weights: which layers are given LoRA."""

    network: Network
    x: Any
    cond: Any = None
    select: Any = models.inner_modules
    weights: Any = ("q", "v")


class Own(nn.Module):
    """A network of a user's own: names of its own, and a stack of the library's blocks over vectors `[B, N, C]`."""

    @nn.compact
    def __call__(self, x, t, cond, train):
        h = nn.Dense(16, name="enter")(x)
        c = TimeEmbedding(16, name="clock")(t)
        branches = transformer_branches(2, False, 2.0, False, jnp.float32, crossed=False)
        h = Stack(branches, 2, name="layers")(h, c, Side())
        return nn.Dense(x.shape[-1], name="leave")(nn.LayerNorm(name="norm")(h)), {}


OWN = Anatomy(width=16, entrance="enter", stack="layers", depth=2, last=("norm", "leave"), time="clock")


class Loop(nn.Module):
    """A network of a user's own with nothing of the library in it."""

    @nn.compact
    def __call__(self, x, t, cond, train):
        h = nn.Dense(16, name="enter")(jnp.concatenate([x, jnp.broadcast_to(t[:, None], (*x.shape[:-1], 1))], -1))
        for index in range(2):
            h = h + nn.Dense(16, name=f"layer_{index}")(nn.silu(h))
        return nn.Dense(x.shape[-1], name="leave")(nn.LayerNorm(name="norm")(h)), {}


LOOP = Anatomy(width=16, entrance="enter", cuts=("enter", "layer_0"), tail="norm", last=("norm", "leave"))

SIZES = {"width": 16, "depth": 2, "heads": 2}
LEVELS = {"channels": 8, "groups": 4, "multipliers": (1,), "attention": (1,), "mid_residual": 0, "mid_attention": 0}


def array(*shape):
    return jax.device_put(np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32))


X, LABEL = array(2, 4, 4, 1), {"label": np.array([0, 2], np.int32)}
T = jax.device_put(np.array([0.3, 0.7], np.float32))
PICTURE = {"control": array(2, 4, 4, 3)}
SEEN, FRAMES = {"observation": array(2, 2, 3)}, {"frames": array(2, 2, 4, 4, 3)}


def dit(**fields):
    return models.dit("S/2", **SIZES, **fields)


def labelled():
    return dit(conditions=(models.label(3),))


def unets():
    return models.unet("digits", **LEVELS), models.controlnet("digits", **LEVELS, control_features=(4,))


def loaded():
    network = dit(conditions=(models.label(3),), in_channels=1, base_size=2)
    shapes = interop.FAMILIES["dit_original"].shapes(network)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    with tempfile.TemporaryDirectory() as folder:
        saved = interop.Pretrained(network, params, "dit_original", {})
        return interop.load_pretrained(interop.save_pretrained(folder, saved)).network


def referenced(form):
    forms = models.referenced(dit(), 2)
    told = {"references": array(2, 1, 4, 4, 1), "items": np.zeros((2, 1), np.int32), "present": np.ones((2, 1), bool)}
    if form == "cached":
        params = jax.eval_shape(forms.encoding.init, jax.random.key(0), X, T, told)
        shapes = jax.eval_shape(forms.encode, params, *told.values())
        told = {"cache": jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)}
    return Case(getattr(forms, form), X, told)


def sliced():
    network = labelled()
    made = jax.eval_shape(models.intercepted(network, *models.width_gates(2)).init, *inputs(network, X, LABEL))
    return models.sliced(
        network, [jax.tree.map(lambda leaf: np.ones((leaf.shape[0], leaf.shape[2]), bool), made["gates"])]
    )


def inputs(network, x, cond):
    """What collections are made of."""
    return jax.random.key(0), jax.eval_shape(network.init, jax.random.key(0), x, T, cond), x, T, cond


def doubled(network):
    """A user's own wrapper: parameters of its own, another condition, another output."""

    def around(inner, params, x, t, cond, train, key):
        output, extras = inner(params["inner"], x, t, {"label": cond["number"] - 1}, train, key)
        return params["gain"] * output, extras

    def init(key, x, t, cond=None):
        return {"inner": network.init(key, x, t, {"label": cond["number"] - 1}), "gain": jnp.ones(())}

    return models.wrapped(network, around, init, at=("inner",))


def at_once(network, x, cond):
    """`routed(...).network`, which is begun beside the parameters of the network that it routes."""
    timed = adapters.routed(network, 2)

    def init(key, x, t, cond=None):
        params = network.init(key, x, t, cond)
        return {"params": params, **timed.init(key, params, x, t, cond)}

    return Case(timed.network._replace(init=init), x, cond)


TRANSFORMERS: dict[str, Callable[[], Case]] = {
    "dit": lambda: Case(labelled(), X, LABEL),
    "dit, text": lambda: Case(dit(conditions=(models.text(9, depth=1),)), X, {"tokens": np.ones((2, 3), np.int32)}),
    "dit, per block": lambda: Case(dit(conditions=(models.label(3),), embeddings="per_block"), X, LABEL),
    "pixart": lambda: Case(models.pixart("S/2", **SIZES), X, {"context": array(2, 3, 6)}),
    "joint": lambda: Case(models.joint_transformer({"a": (2, 2), "b": (1,)}, **SIZES), {"a": X, "b": array(2, 3, 2)}),
    "joint, skips": lambda: Case(models.joint_transformer((1,), **SIZES, skips=True), array(2, 3, 2)),
    "video": lambda: Case(
        models.video_dit("S/2", **SIZES, temporal_positions="rotary", block=1, window=2), array(2, 2, 4, 4, 1)
    ),
}
OTHERS: dict[str, Callable[[], Case]] = {
    "text": lambda: Case(models.text_transformer(9, width=16, depth=2, heads=2), np.ones((2, 4), np.int32)),
    "mlp": lambda: Case(models.mlp(16, 2, conditions=(models.label(3),)), array(2, 5), LABEL, weights=("up", "down")),
    "unet": lambda: Case(unets()[0], X),
    "controlnet": lambda: Case(unets()[1], X, PICTURE),
    "clip text": lambda: Case(
        models.as_network(models.clip_text(width=16, depth=2, heads=2, mlp_width=16, vocab_size=9, positions=4)),
        np.ones((2, 4), np.int32),
    ),
    "loaded": lambda: Case(loaded(), X, LABEL),
    "own": lambda: Case(models.network(Own(), OWN), array(2, 3, 4)),
    "own, no anatomy": lambda: Case(models.network(Own()), array(2, 3, 4)),
    "own loop": lambda: Case(models.network(Loop(), LOOP), array(2, 4), None, "layer_*", "layer_*"),
    "own loop, no anatomy": lambda: Case(models.network(Loop()), array(2, 4), None, "layer_*", "layer_*"),
    "sliced(dit)": lambda: Case(sliced().network, X, LABEL),
    "own(dit)": lambda: Case(doubled(labelled()), X, {"number": np.array([1, 3], np.int32)}),
    "watching(own)": lambda: Case(models.watching(models.network(Own(), OWN), 4, 4, 8), array(2, 3, 4), FRAMES),
    "functions": lambda: Case(Network(lambda *_: {"w": jnp.ones(())}, lambda p, x, *_, **__: (p["w"] * x, {})), X),
}
WRAPPED: dict[str, Callable[[], Case]] = {
    "lora(dit)": lambda: Case(adapters.lora(labelled(), 2).network, X, LABEL, weights=("up", "down")),
    "observing(dit)": lambda: Case(models.observing(dit(conditions=(models.pooled(),))), X, SEEN),
    "watching(lora(dit))": lambda: Case(
        models.watching(adapters.lora(dit(conditions=(models.pooled(),)), 2).network, 4, 4, 8),
        X,
        FRAMES,
        weights=("up", "down"),
    ),
    "concatenating(dit)": lambda: Case(models.concatenating(dit()), X, {"concat": array(2, 4, 4, 2)}),
    "referenced(dit).cached": lambda: referenced("cached"),
    "referenced(dit).joint": lambda: referenced("joint"),
    "controlled(unet)": lambda: Case(models.controlled(*unets()), X, PICTURE),
    "controlled(lora(unet))": lambda: Case(
        models.controlled(adapters.lora(unets()[0], 2).network, unets()[1]), X, PICTURE, weights=("up", "down")
    ),
    "routed(dit)": lambda: at_once(labelled(), X, LABEL),
}
CASES = {**TRANSFORMERS, **OTHERS, **WRAPPED}


class Plain(NamedTuple):
    """A process in which the prediction is the network's output, whatever that is."""

    kind = "gaussian"

    def network_input(self, x, t):
        return x

    def network_time(self, t):
        return t

    def predict(self, output, x, t):
        return Prediction(output)


def edited(case, params):
    """Taps, overrides, gates and caches, all at once and with what they begin with."""
    of = case.select
    edits = models.taps(of), models.override(of), models.gates(of, "scales"), models.cached(of)
    opened = models.intercepted(case.network, *edits)
    made = opened.init(jax.random.key(0), params, case.x, T, case.cond)
    output, extras, _ = opened.apply(params, made, case.x, T, case.cond)
    assert all(jax.tree.leaves(tree) for tree in (extras["taps"], *made.values()))
    return output


def features(case, params):
    denoiser = cached_features(case.network, Plain(), taylor(1), every(1), select=case.select)
    carry = denoiser.init(params, case.x, case.cond)
    assert jax.tree.leaves(carry.table.values)
    step = some_step(case.x)._replace(t=jax.tree.map(lambda _: T, case.x))
    return denoiser.apply(params, carry, case.x, step, case.cond)[0].x0


def in_stages(case, params):
    stages, given = models.staged(case.network), (case.x, T, case.cond)
    return stages.tail(params, stages.body(params, stages.head(params, *given), *given), *given)[0]


def exits(case, params):
    made = models.early_exit(case.network)
    tree = {"params": params, "exits": made.init(jax.random.key(0), params, case.x, T, case.cond)}
    return made.stop(tree, case.x, T, case.cond, made.depth)[0]


def opened(params):
    """Parameters with a place for collections."""
    return params if "params" in params else {"params": params}


def lora(case, params):
    """The network with factors beside it is the one into which they are merged."""
    adapted = adapters.lora(case.network, 2, select=case.weights, collection="more")
    factors = drawn(jax.eval_shape(adapted.init, jax.random.key(0), params, case.x, T, case.cond))
    beside = adapted.network.apply({**opened(params), "more": factors}, case.x, T, case.cond)[0]
    within, plain = (case.network.apply(p, case.x, T, case.cond)[0] for p in (adapted.merge(params, factors), params))
    return jax.tree.map(lambda plain, beside, within: plain + (beside - within), plain, beside, within)


def slices(case, params):
    gated = models.intercepted(case.network, *models.width_gates(2))
    made = jax.eval_shape(gated.init, jax.random.key(0), params, case.x, T, case.cond)["gates"]
    masks = jax.tree.map(lambda leaf: np.ones((leaf.shape[0], leaf.shape[-1]), bool), made)
    cut = models.sliced(case.network, [masks])
    gates = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), made)
    tree = {**opened(params), "slices": cut.cut(params), "bucket": jnp.int32(0), "gates": gates}
    return cut.network.apply(tree, case.x, T, case.cond)[0]


def routes(case, params):
    timed = adapters.routed(case.network, 2)
    made = timed.init(jax.random.key(0), params, case.x, T, case.cond)
    return timed.network.apply({**opened(params), **made}, case.x, T, case.cond)[0]


def in_blocks(case, params):
    """A clip frame after frame, each at its time."""
    blocks = models.incremental(case.network)
    cache, outputs = blocks.init(params, case.x[:, :1], case.cond), []
    for frame in range(case.x.shape[1]):
        given = case.x[:, frame : frame + 1], T[:, None], case.cond
        output, _, kept = blocks.apply(params, cache, *given)
        cache = blocks.push(cache, kept)
        outputs.append(output)
    return jnp.concatenate(outputs, axis=1)


OPENINGS: dict[str, Callable[[Case, Any], Any]] = {
    "intercepted": edited,
    "cached_features": features,
    "staged": in_stages,
    "early_exit": exits,
    "lora": lora,
    "sliced": slices,
    "routed": routes,
    "incremental": in_blocks,
}


class Found(NamedTuple):
    """Of one network: its output, that of every opening that works, and why the others do not."""

    plain: Any
    opened: dict[str, Any]
    refused: dict[str, str]


@functools.cache
def found(make: Callable[[], Case]) -> Found:
    """What each opening makes of a network, all in one program."""
    case, refused = make(), {}
    shapes = jax.eval_shape(case.network.init, jax.random.key(0), case.x, T, case.cond)
    params = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), drawn(shapes), shapes)

    @jax.jit
    def program(params):
        results = {}
        for name, opening in OPENINGS.items():
            try:
                results[name] = opening(case, params)
            except InvalidInput as error:
                refused[name] = str(error).split("\n")[0].split("; there are")[0].rstrip(".") + "."
        return case.network.apply(params, case.x, T, case.cond)[0], results

    return Found(*jax.device_get(program(params)), refused)


def told(name: str) -> dict[str, str]:
    """What a page says of a network: for each opening that it works, or why it does not."""
    refused = found(CASES[name]).refused
    return {opening: refused.get(opening, WORKS) for opening in OPENINGS}


def table() -> str:
    """The cross as a page has it."""
    reasons: dict[str, str] = {}
    rows = [f"| | {' | '.join(f'`{name}`' for name in OPENINGS)} |", f"|---|{'---|' * len(OPENINGS)}"]
    for name in CASES:
        cells = [why if why == WORKS else reasons.setdefault(why, str(len(reasons) + 1)) for why in told(name).values()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", *(f"{number}. {reason}" for reason, number in reasons.items())])


def on_the_page(name: str) -> dict[str, str]:
    """The row of a network, with its reasons."""
    lines = PAGE.read_text(encoding="utf-8").split(MARKERS[0])[1].split(MARKERS[1])[0].strip().split("\n")
    reasons = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    openings, row = (
        [cell.strip(" `") for cell in line.strip("|").split("|")][1:]
        for line in (lines[0], next(line for line in lines if line.startswith(f"| {name} |")))
    )
    return {opening: reasons.get(cell, cell) for opening, cell in zip(openings, row, strict=True)}


def check(name: str) -> None:
    """A network's cells are those of the page, and what works says what the network says."""
    result = found(CASES[name])
    assert told(name) == on_the_page(name)
    plain = jax.tree.leaves(result.plain)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-3 for leaf in plain)
    for opening, output in result.opened.items():
        for leaf, other in zip(jax.tree.leaves(output), plain, strict=True):
            np.testing.assert_allclose(leaf, other, atol=5e-6 * max(1.0, np.abs(other).max()), err_msg=opening)


def main() -> None:
    """Writes the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    PAGE.write_text(f"{before}{MARKERS[0]}\n{table()}\n{MARKERS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
