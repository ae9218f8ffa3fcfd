"""ControlNet: a copy of a U-Net's way down that sees a picture and adds to the skip connections (Zhang et al. 2023).

The copy ends in convolutions that start at zero, so an untrained ControlNet adds nothing, bit for bit. `controlled`
combines a U-Net and ControlNets into one `Network`, for every denoiser, solver and guidance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models.anatomy import anatomy_of, prefixed
from diffusion_jax.models.interception import wrapped
from diffusion_jax.models.layers.conditioning import ConditionStream, CondKey
from diffusion_jax.models.layers.convolution import conv
from diffusion_jax.models.network import chosen, make_module, network
from diffusion_jax.models.unet import PRESETS
from diffusion_jax.models.unet_encoder import UNetEncoder, check_encoder, encoder_anatomy
from diffusion_jax.typing import Network


@dataclass(frozen=True)
class Control(ConditionStream):
    """`cond["control"]`, pictures in [0, 1] of `factor` times the size of x."""

    channels: int
    factor: int

    keys = (CondKey("control"),)
    enters = ("control",)

    def embed(self, cond, place):
        batch, height, width, _ = place.shape
        shape = (batch, height * self.factor, width * self.factor, self.channels)
        if cond["control"].shape != shape:
            told = f"{shape} is needed, {self.factor} times the size of x"
            raise invalid("cond['control'].shape", cond["control"].shape, told)
        return {"control": cond["control"]}


class ControlNet(UNetEncoder):
    """`(x, t, cond)` to a tuple of float32 residuals: one for each skip connection of the U-Net, a last for its middle.

    The fields of `UNetEncoder`, and
    control_features: channels of the convolutions over `cond["control"] [B, f H, f W, control_channels]`, f =
        2^(len(control_features) - 1): each but the first halves the picture, down to the size of x.
    """

    control_channels: int = 3
    control_features: tuple[int, ...] = (16, 32, 96, 256)

    @nn.compact
    def __call__(self, x, t, cond, train):
        control = Control(self.control_channels, 2 ** (len(self.control_features) - 1))
        residual, attention, h, own = self.parts(x, t, cond, train, control)
        h, skips = self.down(h + self._picture(own["control"]), residual, attention)
        dtype = jnp.dtype(self.dtype)
        ends = [conv(s.shape[-1], 1, dtype=dtype, zero=True, name=f"zero_{i}")(s) for i, s in enumerate(skips)]
        h = self.middle(h, residual, attention)
        ends.append(conv(h.shape[-1], 1, dtype=dtype, zero=True, name="zero_mid")(h))
        return tuple(end.astype(jnp.float32) for end in ends), {}

    def _picture(self, picture):
        dtype = jnp.dtype(self.dtype)
        y = jax.nn.silu(conv(self.control_features[0], dtype=dtype, name="control_in")(picture.astype(dtype)))
        for i, features in enumerate(self.control_features[1:]):
            y = jax.nn.silu(conv(y.shape[-1], dtype=dtype, name=f"control_{i}")(y))
            halve = nn.Conv(features, (3, 3), (2, 2), [(1, 1)] * 2, dtype=dtype, name=f"control_{i}_down")
            y = jax.nn.silu(halve(y))
        return conv(self.channels, dtype=dtype, zero=True, name="control_out")(y)


def controlnet(preset: str = "sd15", **fields) -> Network:
    """A ControlNet for a U-Net of `models.unet.PRESETS`, with any fields of `ControlNet` that differ from it.

    Its output is a tuple of residuals. Raises InvalidInput for a preset, field or value that does not exist.
    """
    module = make_module(ControlNet, "controlnet", chosen(preset, PRESETS), fields)
    check_encoder(module)
    if not module.control_features or min(module.control_features) < 1:
        raise invalid("control_features", module.control_features, "positive integers are needed")
    if module.control_channels < 1:
        raise invalid("control_channels", module.control_channels, "it must be a positive integer")
    return network(module, encoder_anatomy(module))


def control_from_unet(unet_params: Mapping[str, Any], control_params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with which training of a ControlNet begins: those of the U-Net wherever the two share a module."""
    return {name: unet_params.get(name, entry) for name, entry in control_params.items()}


class Controlled(nn.Module):
    """A U-Net and its ControlNets as one module, whose parameters are those of `controlled`; for interception."""

    unet: nn.Module
    control: nn.Module | tuple[nn.Module, ...]
    scale: Any = 1.0

    def __call__(self, x, t, cond, train):
        controls = self.control if isinstance(self.control, tuple) else (self.control,)
        calls = [lambda *told, each=each: each(*told, train) for each in controls]
        return self.unet(x, t, _controlled_condition(calls, self.scale, x, t, cond), train)


def controlled(unet: Network, control: Network | Sequence[Network], scale: Any = 1.0) -> Network:
    """The U-Net with the residuals of a ControlNet, times `scale`, added to its skip connections and its middle.

    Its parameters are `{"unet": the U-Net's, "control": the ControlNet's}`, and its condition is the U-Net's and
    `control`, the picture. With several ControlNets the parameters are `unet`, `control_0`, `control_1`, ..., the
    pictures and scales are tuples, and residuals add up. A ControlNet gets the condition of the U-Net, except `concat`.
    scale: may be a traced number; 0 leaves the U-Net as it is, bit for bit.
    What opens it opens the whole, with the paths "unet/..." and "control/..."; where a part is open already or stands
    within another network (`controlled(lora(unet).network, control)`), the U-Net alone.
    Raises InvalidInput for no ControlNet, and for as many scales or pictures as there are not.
    """
    single = isinstance(control, Network)
    controls = (control,) if single else tuple(control)
    names = ("control",) if single else tuple(f"control_{i}" for i in range(len(controls)))
    if not controls:
        raise InvalidInput("controlled needs at least one ControlNet.")
    scales = tuple(scale) if isinstance(scale, tuple | list) else (scale,) * len(controls)
    if len(scales) != len(controls):
        raise invalid("scale", scale, f"one number for each of the {len(controls)} ControlNets is needed")

    def init(key, x, t, cond=None):
        first, *others = jax.random.split(key, len(controls) + 1)
        own, told = _conditions(cond, len(controls))
        params = {"unet": unet.init(first, x, t, own)}
        made = [each.init(k, x, t, c) for each, k, c in zip(controls, others, told, strict=True)]
        return params | dict(zip(names, made, strict=True))

    def around(inner, params, x, t, cond, train, key):
        if not isinstance(params, Mapping) or set(params) != {"unet", *names}:
            raise InvalidInput(f"The controlled network needs params with the entries unet, {', '.join(names)}.")
        calls = [
            lambda *told, each=each, name=name: each.apply(params[name], *told, train, key)
            for each, name in zip(controls, names, strict=True)
        ]
        return inner(params["unet"], x, t, _controlled_condition(calls, scales, x, t, cond), train, key)

    result = wrapped(unet, around, init, ("unet",))
    if not all(each.inside and each.inside.bare for each in (unet, *controls)):
        return result
    # Copies, since linen takes the same object twice for one with shared parameters.
    modules = tuple(each.module.clone() for each in controls)
    module = Controlled(unet.module, modules[0] if single else modules, scales)
    anatomy, *others = (
        prefixed(anatomy_of(each), name) for each, name in zip((unet, *controls), ("unet", *names), strict=True)
    )
    condition = sum((each.condition for each in others), anatomy.condition)
    enters = {**anatomy.enters, "control": names[0] if single else "control_*"}
    whole = network(module, anatomy._replace(condition=condition, enters=enters))
    return whole._replace(init=init, apply=result.apply)


def _conditions(cond, count):
    """What the U-Net is told, and what each ControlNet is told."""
    pictures = (cond or {}).get("control")
    if pictures is None:
        raise InvalidInput("A controlled network needs cond['control'], the picture (a tuple of them for several).")
    pictures = pictures if isinstance(pictures, tuple | list) else (pictures,)
    if len(pictures) != count:
        raise InvalidInput(f"cond['control'] has {len(pictures)} pictures, but there are {count} ControlNets.")
    own = {name: value for name, value in cond.items() if name != "control"}
    shared = {name: value for name, value in own.items() if name not in ("concat", "residuals")}
    return own, [{**shared, "control": picture} for picture in pictures]


def _controlled_condition(calls, scales, x, t, cond):
    """The U-Net's condition, with the sum of what the ControlNets say in `residuals`."""
    own, told = _conditions(cond, len(calls))
    total = own.get("residuals")
    for call, scale, told_one in zip(calls, scales, told, strict=True):
        residuals, _ = call(x, t, told_one)
        residuals = tuple(scale * entry for entry in residuals)
        total = residuals if total is None else jax.tree.map(jnp.add, tuple(total), residuals)
    return {**own, "residuals": total}
