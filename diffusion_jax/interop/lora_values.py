"""What the tensors of one adapted layer come to: factors of its weight, or a change of its weight and of its bias.

    LoRA   scale B A            B [O, r], A [r, *I]; with a core `mid` [r, r, p, q] the window is in that
    LoHa   scale (W1a W1b) * (W2a W2b)            (Hyeon-Woo et al. 2021), entry by entry; with cores t1, t2
    LoKr   scale kron(W1, W2)                     (Yeh et al. 2023), W2 = W2a W2b, or of a core t2
    DoRA   m V / |V| - W,  V = W + any of these   (Liu et al. 2024), |V| of each output, or of each input

All in the layout of the file; `lora_targets` knows where it belongs here.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.lora_targets import Module, Target

TUCKER = "ijkl,jr,ip->prkl"
"""A core of two ranks, its inputs and its outputs."""

COMPLETE = (
    {"down", "up"},
    {"down", "up", "mid"},
    {"down", "up", "change"},
    {"embedding_down", "embedding_up"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"},
    *(
        {*first, *second}
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
    ),
    {"change"},
    {"weight"},
)
"""The roles of which the change of a weight is made."""

DECOMPOSED = {"dora_scale", "magnitude"}
"""The roles that make it DoRA: the lengths of kohya and LyCORIS, and of PEFT."""

BESIDE = DECOMPOSED | {"alpha", "up_bias", "bias_change", "bias"}
"""Roles that stand beside those of a weight, or alone."""


class LayerChange(NamedTuple):
    """What an adapter adds to one layer, in the layout of the file; None where it adds nothing.

    factors: `(down [r, *I], up [O, r])` of the weight, with the scale in `up`. weight, bias: the changes themselves.
    """

    factors: tuple[np.ndarray, np.ndarray] | None
    weight: np.ndarray | None
    bias: np.ndarray | None


class Layer:
    """The tensors of one layer: `names` by role, read through `read(name)`; see `update`.

    where: the file, for errors. scale: (module, rank or None, alpha or None) -> what the product is multiplied by.
    base: (target) -> the network's own tensor, in the layout of the file.
    """

    def __init__(
        self,
        where: Any,
        module: Module,
        names: Mapping[str, str],
        read: Callable[[str], np.ndarray],
        scale: Callable[[str, int | None, str | None], float],
        base: Callable[[Target], np.ndarray],
    ):
        self.where, self.module, self.names = where, module, names
        self._read, self._scale, self._base = read, scale, base

    def update(self) -> LayerChange:
        """Raises InvalidInput for tensors that do not belong together, or not to this layer."""
        found = self._update()
        for value in (*(found.factors or ()), found.weight, found.bias):
            if value is not None and not np.isfinite(value).all():
                raise InvalidInput(f"{self.where}: what {self.module.name} is changed by is not finite.")
        return found

    def _update(self) -> LayerChange:
        roles = set(self.names) - BESIDE
        decomposed = bool(DECOMPOSED & set(self.names))
        of_weight = roles or decomposed or "up_bias" in self.names
        if not (roles in COMPLETE if of_weight else {"bias_change", "bias"} & set(self.names)):
            raise self._incomplete(roles)
        bias = self._bias()
        if not roles:
            return LayerChange(None, None, bias)
        weight = self.module.weight
        if weight is None:
            raise self._misfit("a weight there and none here")
        if not roles <= {"change", "weight"} and len(weight.shape) < 2:
            raise self._misfit("factors there")
        if decomposed and not weight.low_rank:
            raise InvalidInput(f"{self.where}: {self.module.name} has DoRA of an embedding, which is not read.")
        if "down" in roles and not decomposed and weight.low_rank:
            more = self._like(self.get("change"), weight.shape, "change") if "change" in roles else None
            return LayerChange(self._factors(weight), more, bias)
        change = self._change(roles, weight)
        return LayerChange(None, self._decomposed(change, weight) if decomposed else change, bias)

    @property
    def rank(self) -> int:
        """The rank of the factors, 0 where the layer has none."""
        return self.get("down").shape[0] if {"down", "up"} <= set(self.names) and self.get("down").ndim else 0

    def get(self, role: str) -> np.ndarray:
        """A tensor of the layer, float32."""
        name = self.names[role]
        value = self._read(name).astype(np.float32)
        if not np.isfinite(value).all():
            raise InvalidInput(f"{self.where}: {name} holds numbers that are not finite.")
        return value

    def _change(self, roles, weight: Target) -> np.ndarray:
        shape = weight.shape
        if roles == {"weight"}:
            return self._like(self.get("weight"), shape, "weight") - self._base(weight)
        if roles == {"change"}:
            return self._like(self.get("change"), shape, "change")
        if "embedding_down" in roles:
            down, up = self.get("embedding_down"), self.get("embedding_up")
            self._fits("embedding_down", down.shape == (len(down), shape[0]) and up.shape == (shape[1], len(down)))
            return self.scale(len(down)) * (up @ down).T
        if "down" in roles:
            down, up = self._factors(weight)
            product = (up @ down.reshape(len(down), -1)).reshape(shape)
            return product + (self._like(self.get("change"), shape, "change") if "change" in roles else 0)
        if "hada_w1_a" in roles:
            return self._loha(shape)
        return self._lokr(shape)

    def _factors(self, weight: Target) -> tuple[np.ndarray, np.ndarray]:
        """`down [r, *I]` and the scaled `up [O, r]`."""
        down, up = self.get("down"), self.get("up")
        outputs, *inputs = weight.shape
        own = len(down) if down.ndim else 0
        if not own:
            raise InvalidInput(f"{self.where}: {self.names['down']} is {list(down.shape)}: factors need a rank.")
        if up.ndim < 2 or up.shape[1] != own:
            raise InvalidInput(
                f"{self.where}: {self.names['down']} {list(down.shape)} and {self.names['up']} {list(up.shape)} "
                "differ in their rank."
            )
        if "mid" in self.names:
            mid = self.get("mid")
            self._fits("mid", mid.ndim == 4 and mid.shape[:2] == (own, own) and down.size == own * inputs[0])
            down = np.einsum("stpq,ti->sipq", mid, down.reshape(own, -1))
        # A window of one entry may be there or not, and windows may be flat.
        window = inputs[:1] if all(size == 1 for size in inputs[1:]) else inputs
        if up.size != outputs * own or list(down.shape[1:]) not in (window, [*window, 1, 1], [math.prod(inputs)]):
            raise self._misfit(f"factors {list(up.shape)} and {list(down.shape)} there")
        return down.reshape(own, *inputs), self.scale(own) * up.reshape(outputs, own)

    def _loha(self, shape) -> np.ndarray:
        first, second = (
            self._product(f"hada_{w}_a", f"hada_{w}_b", f"hada_{core}") for w, core in (("w1", "t1"), ("w2", "t2"))
        )
        if first.shape != second.shape:
            raise self._misfit(f"products {list(first.shape)} and {list(second.shape)} there")
        rank = self.get("hada_w1_b").shape[0]
        return self.scale(rank) * self._like(first * second, shape, "hada_w1_a")

    def _lokr(self, shape) -> np.ndarray:
        sides, rank = [], None
        for side, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2")):
            if side in self.names:
                sides.append(self.get(side))
            else:
                sides.append(self._product(f"{side}_a", f"{side}_b", core))
                rank = rank or self.get(f"{side}_b").shape[0]
        first, second = sides
        self._fits("lokr_w1" if "lokr_w1" in self.names else "lokr_w1_a", first.ndim == 2 and second.ndim >= 2)
        product = np.kron(first.reshape(*first.shape, *(1,) * (second.ndim - 2)), second)
        return self.scale(rank) * self._like(product, shape, "lokr_w2" if "lokr_w2" in self.names else "lokr_w2_a")

    def _product(self, left, right, core) -> np.ndarray:
        a, b = self.get(left), self.get(right)
        if core in self.names:
            t = self.get(core)
            self._fits(core, t.ndim == 4 and a.ndim == b.ndim == 2 and t.shape[:2] == (len(a), len(b)))
            return np.einsum(TUCKER, t, b, a)
        self._fits(left, a.ndim == b.ndim == 2 and a.shape[1] == len(b) > 0)
        return a @ b

    def _decomposed(self, change, target: Target) -> np.ndarray:
        """The change with which the direction of `W + change` has the lengths that the file says."""
        weight = self._base(target)
        role = "dora_scale" if "dora_scale" in self.names else "magnitude"
        sizes = self.get(role)
        new = weight + change
        outputs, inputs = new.shape[:2]
        # kohya's may be of inputs, [1, I, ...]; PEFT's, [O] or [1, O, 1, 1], are of outputs always.
        of_inputs = role == "dora_scale" and sizes.ndim > 1 and sizes.shape[:2] == (1, inputs) and outputs > 1
        axis, count = (1, inputs) if of_inputs else (0, outputs)
        self._fits(role, sizes.size == count)
        others = tuple(i for i in range(new.ndim) if i != axis)
        norm = np.sqrt(np.sum(new**2, axis=others, keepdims=True))
        sizes = sizes.reshape([-1 if i == axis else 1 for i in range(new.ndim)])
        return sizes * new / np.maximum(norm, np.finfo(np.float32).tiny) - weight

    def _bias(self) -> np.ndarray | None:
        roles = [role for role in ("up_bias", "bias_change", "bias") if role in self.names]
        if not roles:
            return None
        if self.module.bias is None:
            raise InvalidInput(
                f"{self.where}: {self.names[roles[0]]} is for a bias, which {self.module.name} has not here."
            )
        total = np.zeros(self.module.bias.shape, np.float32)
        for role in roles:
            value = self._like(self.get(role), total.shape, role)
            if role == "up_bias":
                value = self.scale(self.rank) * value
            total += value - self._base(self.module.bias) if role == "bias" else value
        return total

    def scale(self, rank: int | None) -> float:
        return self._scale(self.module.name, rank, self.names.get("alpha"))

    def _like(self, value, shape, role) -> np.ndarray:
        if value.size != math.prod(shape) or (value.shape and len(value) != shape[0]):
            raise self._misfit(f"{self.names[role]} makes {list(value.shape)} there")
        return value.reshape(shape)

    def _fits(self, role, holds) -> None:
        if not holds:
            raise self._misfit(f"{self.names[role]} {list(self.get(role).shape)} there")

    def _misfit(self, reason: str) -> InvalidInput:
        weight = self.module.weight
        here = f", but a weight {list(weight.shape)} here" if weight else ""
        return InvalidInput(f"{self.where} is a LoRA for another base: {self.module.name} has {reason}{here}.")

    def _incomplete(self, roles) -> InvalidInput:
        near = min(COMPLETE, key=lambda known: (not known & roles, len(known ^ roles)))
        lacking, idle = sorted(near - roles), sorted(roles - near)
        told = [f"lacks {', '.join(lacking)}"] if lacking else []
        told += [f"has {', '.join(self.names[role] for role in idle)} besides"] if idle else []
        there = ", ".join(self.names.values())
        return InvalidInput(f"{self.where}: the layer {self.module.name} has {there}, but {' and '.join(told)}.")
