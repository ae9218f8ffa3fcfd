"""DyDiT: a transformer whose heads and hidden groups depend on the timestep, at half of the compute on average.

Routers that read the embedding of the time alone are trained together with the network, under a budget on the mean
over t (Zhao et al. 2025). It is compared with the network that keeps the same heads and groups at all t, at equal
compute and fine-tuned as long. What a step uses is known before a run begins, so weights are cut and steps are shorter.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import pictures
from diffusion_jax.acceleration import dynamic
from diffusion_jax.adapters import Timed
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes import Claim, Results, claim, seeds
from diffusion_jax.recipes.frame import trained
from diffusion_jax.recipes.parts import dynamic_widths as parts
from diffusion_jax.recipes.parts.dynamic_widths import Execution
from diffusion_jax.typing import Params

NOTES = (
    "Learning rates, biases of the routers and the warm-up of the budget were chosen on seed 100; the rate of LoRA "
    "was raised after seed 0 had missed the budget at a lower one, its held-out losses unseen. The static model is "
    "the shared base model as it is. Tokens are not routed here: on seed 100 routing them too changed neither loss "
    "nor share. TD-LoRA and times of steps are of one seed. Shares are of attention and feed-forward layers, as in "
    "the paper; times are of whole steps, whatever else is in them. The two arms of 500 steps were cached: three "
    "seeds of both took nine minutes beside other jobs. In the second picture thresholds and numbers of heads are "
    "moved after training."
)


def run(config: ConfigDict, workdir: Path) -> Results:
    base = prepare(config.base)
    params = trained(base, "digits-transformer")
    tune, numbers = prepare(config.arms.dynamic), list(seeds(config))
    routed = build(config.routed, network=tune.network)
    half = round(config.target * config.routed.groups)
    makers = {
        "dynamic": lambda: parts.dynamic_arm(config.budget, tune, routed, params),
        "uniform": lambda: parts.uniform_arm(tune, routed, params, half),
    }
    arms = {name: make() for name, make in makers.items() if name in config.arms}
    given = [config.to_dict()[name] for name in ("base", "routed", "budget")]
    learned = {
        name: [parts.fine_tuned(config.arms[name], tune, arm, f"dydit-{name}", seed, given) for seed in numbers]
        for name, arm in arms.items()
    }

    networks = {"static": tune.network, **{name: arm.network for name, arm in arms.items()}}
    losses = {name: parts.held_out_loss(tune, one, config.losses.repeats) for name, one in networks.items()}
    trees = {"static": [params] * len(numbers), **learned}
    loss = {name: [losses[name](tree) for tree in every] for name, every in trees.items() if name != "static"}
    loss["static"] = [losses["static"](params)] * len(numbers)
    distance = {}
    if config.sampling.samples:
        for name, every in trees.items():
            measure = parts.sampled(tune, networks[name], config.sampling.steps, config.sampling.samples)
            distance[name] = [measure(tree, seed) for tree, seed in zip(every, numbers, strict=True)]

    times = (np.arange(config.losses.times, dtype=np.float32) + 0.5) / config.losses.times
    tables = [dynamic.tabulated(routed.fill, tree, tune.process, times) for tree in learned["dynamic"]]
    costs = parts.routed_costs(tune, routed, learned["dynamic"][0])
    shares = [dynamic.executed_share(table, costs) for table in tables]
    under = dynamic.by_nearest_time(routed.opened, tune.process.network_time(jnp.asarray(times)))
    by_table = parts.held_out_loss(tune, under, config.losses.repeats)
    reversed_tables = [jax.tree.map(lambda leaf: leaf[::-1], table) for table in tables]
    swapped = [
        by_table({"params": tree["params"], "table": table})
        for tree, table in zip(learned["dynamic"], reversed_tables, strict=True)
        if config.losses.reversed
    ]
    beginning = unchanged(tune, config, params) if config.published else None
    timed = config.timing.repeats > 0
    executed = parts.execution(tune, routed, learned["dynamic"][0], config.sampling, config.timing) if timed else None
    claims = [
        *exactness_claims(beginning, executed),
        *judged_claims(config.target, shares, loss, distance, swapped),
        *(speed_claims(executed) if executed else ()),
        *mixtures(config, tune, params, given),
    ]
    curves = {
        name: np.mean([parts.kept_shares(table)[name] for table in tables], axis=0)
        for name in parts.kept_shares(tables[0])
    }
    curves["executed share"] = np.mean(shares, axis=0)
    files = [workdir / "kept.png", workdir / "loss.png"]
    lines = {name: (times.tolist(), values.tolist()) for name, values in curves.items()}
    pictures.save_curves(files[0], lines, x_label="t: 0 is clean, 1 is noise", y_label="kept share", log=False)
    points = thresholds(config, tune, routed, params, learned=learned, losses=losses, costs=costs, times=times)
    pictures.save_curves(
        files[1], points, x_label="executed share of the routed FLOPs", y_label="held-out loss", log=False
    )
    return Results(claims, files, NOTES)


def unchanged(tune: Experiment, config: ConfigDict, params: Params) -> float:
    """The largest change of outputs by routers, of tokens too, with the published biases 15 and 35."""
    routed = build(config.published, network=tune.network)
    batch = tune.example(8)
    t = jnp.linspace(0.0, 1.0, 8)
    inputs = jnp.asarray(batch["x0"]), tune.process.network_time(t), batch["cond"]
    made = jax.jit(routed.init)(jax.random.key(0), params, *inputs)
    ours = jax.jit(routed.network.apply)({"params": params, **made}, *inputs)[0]
    return float(jnp.abs(ours - jax.jit(tune.network.apply)(params, *inputs)[0]).max())


def exactness_claims(beginning: float | None, executed: Execution | None) -> list[Claim]:
    """Of what was looked at."""
    largest, rows = "largest difference of outputs", []
    if beginning is not None:
        rows.append(claim("It begins as the static model, bit for bit", largest, 0.0, beginning, "equal", "exact"))
    if executed is not None:
        title = "Cut weights are masked weights, at every step"
        rows.append(claim(title, largest, 0.0, executed.difference, "equal", "exact", margin=1e-5))
    return rows


def judged_claims(
    target: float,
    shares: Sequence[np.ndarray],
    loss: Mapping[str, list[float]],
    distance: Mapping[str, list[float]],
    swapped: list[float],
) -> list[Claim]:
    """Of the arms that were trained, and of what was measured of them."""
    spread = float(np.std(loss["dynamic"], ddof=1)) if len(loss["dynamic"]) > 1 else 0.0
    middle = len(shares[0]) // 2
    held_out = "held-out loss, mean over t"
    rows = [
        claim(
            "The budget is held",
            "share of the routed FLOPs, mean over t",
            target,
            [float(share.mean()) for share in shares],
            "equal",
            "57.88 of 118.69 GFLOPs",
            margin=0.03,
            reason="so short a fine-tuning ends before budget and loss have settled",
        ),
        claim(
            "Half of the compute for 5 % of the loss",
            f"{held_out}; the baseline is the static model",
            loss["static"],
            loss["dynamic"],
            "lower",
            "FID 2.07 against 2.27",
            factor=1.05,
            reason="500 steps of 16 examples are few (published: 150 000 of 256), and a small network needs its width",
        ),
        "uniform" in loss
        and claim(
            "Better than the same widths at all t",
            f"{held_out}, by more than a deviation; the baseline is fine-tuned as long at equal FLOPs",
            loss["uniform"],
            loss["dynamic"],
            "lower",
            "static pruning is clearly worse",
            margin=-spread,
            reason="at so short a fine-tuning what the routers cost in training is more than what they gain",
        ),
        "uniform" in distance
        and claim(
            "Its samples are closer to digits than those of the same widths at all t",
            "energy distance of samples to held-out digits",
            distance["uniform"],
            distance["dynamic"],
            "lower",
            f"of the static model here: {np.mean(distance['static']):.3g}",
            reason="samples begin at high noise, where the least is executed; the loss gains at low noise",
        ),
        claim(
            "Compute depends on t",
            "range of the executed share over t",
            0.1,
            [float(np.ptp(share)) for share in shares],
            "higher",
            "fewer heads and groups at high noise",
        ),
        claim(
            "There is more of it near clean images",
            "executed share, mean over t < 1/2; the baseline is over t > 1/2",
            [float(share[middle:].mean()) for share in shares],
            [float(share[:middle].mean()) for share in shares],
            "higher",
            "more towards clean images",
        ),
        bool(swapped)
        and claim(
            "It matters which widths run at which t",
            f"{held_out}, with the table of widths reversed in t; the baseline is as learned",
            loss["dynamic"],
            swapped,
            "higher",
            "not reported",
        ),
    ]
    return [row for row in rows if row]


def speed_claims(executed: Execution) -> list[Claim]:
    (wide, most), (narrow, least) = executed.wide, executed.narrow
    return [
        claim(
            "Steps are shorter",
            f"milliseconds a step of a whole run, of which {executed.share:.2f} of the routed FLOPs are executed; the "
            f"baseline is the static model, masked it takes {1e3 * executed.masked:.3g}",
            1e3 * executed.dense,
            1e3 * executed.cut,
            "lower",
            "1.73 times as fast",
            reason="slices this small leave a core waiting for everything that is not a matrix product",
        ),
        claim(
            "Time falls with the executed share",
            f"milliseconds of an evaluation that executes {least:.2f}; the baseline executes {most:.2f}",
            1e3 * wide,
            1e3 * narrow,
            "lower",
            "latency follows FLOPs",
            reason="slices this small leave a core waiting for everything that is not a matrix product",
        ),
    ]


def mixtures(config: ConfigDict, tune: Experiment, params: Params, given: Any) -> list[Claim]:
    """Factors mixed by time against plain ones, beside a frozen network whose routers learn; none without seeds."""
    arms = {"mixed": (config.lora.rank, config.lora.experts), "plain": (config.lora.rank, 0)}
    arms["equal"] = (config.lora.equal_rank, 0)
    numbers, found = list(seeds(config))[: config.lora.seeds], {}
    if not numbers:
        return []
    for name, (rank, experts) in arms.items():
        arm = parts.lora_arm(config.lora, tune, config.routed, params, rank, experts)
        measure = parts.held_out_loss(tune, arm.network, config.losses.repeats)
        also = [*given, config.lora.to_dict(), rank, experts]
        trees = [parts.fine_tuned(config.lora.tuning, tune, arm, "dydit-lora", seed, also) for seed in numbers]
        found[name] = [measure(tree) for tree in trees]
    metric = "held-out loss; frozen weights, routers at the same budget; the baseline is LoRA of rank"
    reason = "factors for some times learn from a share of the examples, which is little in so few steps"
    return [
        claim(f"TD-LoRA is at least as good as {what}", f"{metric} {rank}", found[name], found["mixed"], "lower",
              "better than LoRA", factor=1.001, reason=reason)
        for name, rank, what in (
            ("plain", config.lora.rank, "LoRA of its rank"),
            ("equal", config.lora.equal_rank, "LoRA of as many parameters"),
        )
    ]  # fmt: skip


def thresholds(
    config: ConfigDict,
    tune: Experiment,
    routed: Timed,
    params: Params,
    *,
    learned: Any,
    losses: Any,
    costs: Any,
    times: Any,
) -> dict[str, tuple]:
    """Loss against the executed share, where thresholds are moved after training: first seed."""
    tree, points = learned["dynamic"][0], []
    for shift in config.shifts:
        moved = jax.tree_util.tree_map_with_path(
            lambda path, leaf, by=shift: leaf + by if path[-1].key == "bias" else leaf, tree["routers"]
        )
        shifted = {**tree, "routers": moved}
        share = dynamic.executed_share(dynamic.tabulated(routed.fill, shifted, tune.process, times), costs).mean()
        points.append((float(share), losses["dynamic"](shifted)))
    uniform, count = [], config.routed.groups
    for kept in range(max(count // 3, 1), count + 1) if "uniform" in learned else ():
        gates = parts.uniform_gates(routed, params, tune, kept)
        uniform.append((kept / count, losses["uniform"]({**learned["uniform"][0], "gates": gates})))
    low = min(share for share, _ in points)
    static = losses["static"](params)
    return {
        "by t": tuple(zip(*sorted(points), strict=True)),
        **({"the same at all t": tuple(zip(*uniform, strict=True))} if uniform else {}),
        "static": ([low, 1.0], [static, static]),
    }
