"""DiT and SiT in their two layouts: the folders of diffusers (`DiTTransformer2DModel`), and the state dict of the
original code (facebookresearch/DiT, willisma/SiT) as one safetensors file.

What PixArt shares with the former is here too; the rest of it is in `pixart`.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.fields import MOST_SIDE, Fields
from diffusion_jax.interop.tables import StoredTensor, TensorTable, dense, vector
from diffusion_jax.models import dit, label, param_shapes
from diffusion_jax.models.conditions import Label
from diffusion_jax.models.dit import SIZES
from diffusion_jax.models.layers import image_positions, sincos_positions
from diffusion_jax.models.layers.conditioning import find_stream
from diffusion_jax.typing import Network

BLOCK = "blocks/block"
PATCHES = "o i p q -> (p q i) o"
"""A convolution over patches is a dense layer of their rows."""

EMBEDDERS = {
    "condition/time/up": "timestep_embedder.linear_1",
    "condition/time/down": "timestep_embedder.linear_2",
}
LABELS = "class_embedder.embedding_table.weight"


def check_stored(module: Any, family: str, **expected: Any) -> None:
    """Raises InvalidInput where the network has an option that the family's files cannot tell."""
    for name, value in expected.items():
        if getattr(module, name) != value:
            raise invalid(name, getattr(module, name), f"a {family} has {name}={value!r}")


def stored_conditions(module: Any, family: str, *kinds: type) -> list[Any]:
    """The conditions of these kinds, None for each that is absent. Raises InvalidInput where there are others."""
    for stream in module.conditions:
        if not isinstance(stream, kinds):
            raise invalid(
                "conditions", module.conditions, f"a {family} has {', '.join(k.__name__ for k in kinds)} only"
            )
    return [find_stream(module.conditions, kind) for kind in kinds]


def example_condition(conditions: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """A condition for data of `shape` with which the parameters have their shapes; axes that are free have size 1."""
    cond = {}
    for stream in conditions:
        if getattr(stream, "channels", None) == 0:
            raise invalid("channels", 0, f"to be loaded or stored the network must know those of {stream}")
        for key in stream.keys:
            axes = sum(((shape[:-1] if axis == "*x" else (axis,)) for axis in key.shape), ())
            # A pooled vector has the channels that the ids leave it.
            free = {"P": getattr(stream, "channels", 1), "n": 0}
            sizes = tuple(axis if isinstance(axis, int) else free.get(axis, 1) for axis in axes)
            kind = jnp.int32 if key.kind is jnp.integer else jnp.float32
            if not key.optional:
                cond[key.name] = jax.ShapeDtypeStruct(sizes, kind)
    return cond


def patch_embedding(module: Any, theirs: str) -> TensorTable:
    """`patch_embed` from a convolution whose stride is its size."""
    sizes = (("p", module.patch), ("q", module.patch))
    return {
        "patch_embed/kernel": StoredTensor(f"{theirs}.weight", PATCHES, sizes=sizes),
        "patch_embed/bias": StoredTensor(f"{theirs}.bias"),
    }


def block_layers(module: Any) -> TensorTable:
    """Self-attention and feed-forward layer of a transformer block of diffusers."""
    table = attention_layer(module, "attention", "attn1")
    table |= dense(f"{BLOCK}/mlp/feed_forward/up", "transformer_blocks.{}.ff.net.0.proj")
    return table | dense(f"{BLOCK}/mlp/feed_forward/down", "transformer_blocks.{}.ff.net.2")


def attention_layer(module: Any, branch: str, theirs: str) -> TensorTable:
    """An attention layer of a transformer block of diffusers."""
    ours, theirs = f"{BLOCK}/{branch}/attention", f"transformer_blocks.{{}}.{theirs}"
    table = dense(f"{ours}/out", f"{theirs}.to_out.0")
    for name in "qkv":
        table |= dense(f"{ours}/{name}", f"{theirs}.to_{name}", module.qkv_bias)
    return table


def shapes(network: Network) -> Any:
    """The parameters of a diffusion transformer whose channels are known."""
    module = network.module
    if not module.in_channels:
        raise invalid("in_channels", 0, "to be loaded or stored the network must know it: give it to the constructor")
    # Learned positions are parameters; the table of fixed ones would be computed for a size that tells nothing.
    size = module.patch * (max(module.base_size, 1) if module.positions == "learned" else 1)
    shape = (1, size, size, module.in_channels)
    return param_shapes(network, shape, example_condition(module.conditions, shape))


IRRELEVANT = ("norm_num_groups", "upcast_attention")
"""The norm of images that are no patches; softmax is float32 here anyway."""


def common_fields(config: Fields, sample_size: int, out_channels: int | None) -> dict[str, Any]:
    """What the configs of DiT and PixArt say alike; the two numbers are the defaults of the peer."""
    config.choice("activation_fn", ("gelu-approximate",))
    config.choice("norm_elementwise_affine", (False,))
    config.choice("dropout", (0.0,))
    heads = config.whole("num_attention_heads", 16)
    patch = config.whole("patch_size", 2, most=MOST_SIDE)
    channels = config.whole("in_channels", 4)
    size = config.whole("sample_size", sample_size, most=MOST_SIDE)
    if size < patch:
        raise config.wrong("sample_size", f"with patch_size={patch} at least that is needed")
    out = config.choice("out_channels", (None, channels, 2 * channels), out_channels)
    return {
        "patch": patch,
        "width": heads * config.whole("attention_head_dim", 72),
        "depth": config.layers("num_layers", 28),
        "heads": heads,
        "in_channels": channels,
        "learn_sigma": out == 2 * channels,
        "qkv_bias": config.flag("attention_bias", True),
        "base_size": size // patch,
    }


def common_config(module: Any) -> dict[str, Any]:
    """The inverse of `common_fields`."""
    if not module.base_size:
        raise invalid("base_size", 0, "to be stored the network must know it: give it to the constructor")
    return {
        "num_attention_heads": module.heads,
        "attention_head_dim": module.width // module.heads,
        "in_channels": module.in_channels,
        "out_channels": module.in_channels * (2 if module.learn_sigma else 1),
        "num_layers": module.depth,
        "attention_bias": module.qkv_bias,
        "sample_size": module.base_size * module.patch,
        "patch_size": module.patch,
        "activation_fn": "gelu-approximate",
        "dropout": 0.0,
        "norm_elementwise_affine": False,
    }


PLAIN = {"qk_norm": False, "swiglu": False}
"""Options that no published image transformer of this kind has."""


def dit_fields(config: Fields, files: Any) -> dict[str, Any]:
    """Fields of `DiT` that make the peer's."""
    config.choice("norm_type", ("ada_norm_zero",))
    fields = common_fields(config, 32, None)
    classes = config.whole("num_embeds_ada_norm", 1000)
    return {
        **fields,
        "conditions": (label(classes),),
        "mlp_norm_eps": config.number("norm_eps", 1e-5, least=0.0),
        "frequency_shift": 1.0,
        "embeddings": "shared" if files is None or _copies(files, fields["depth"]) else "per_block",
    }


def _embedder(name):
    return f"transformer_blocks.{{}}.norm1.emb.{name}"


def _copies(files: Any, depth: int) -> bool:
    """Whether all blocks of the file embed time and label by the same weights."""
    there = set(files.names)
    stems = [_embedder(LABELS)]
    stems += [_embedder(f"{name}.{kind}") for name in EMBEDDERS.values() for kind in ("bias", "weight")]
    for stem in sorted(stems):
        first, *others = [stem.replace("{}", str(i)) for i in range(depth)]
        if not there.issuperset((first, *others)):
            # What is missing is told, with everything else, when the names are checked.
            return True
        value = files.read(first)
        if not all(np.array_equal(value, files.read(other)) for other in others):
            return False
    return True


def _table(module) -> TensorTable:
    check_stored(module, "DiTTransformer2DModel", **PLAIN, positions="sincos", modulation="block")
    stored_conditions(module, "DiTTransformer2DModel", Label)
    copies = {"copies": module.depth} if module.embeddings == "shared" else {}
    table = patch_embedding(module, "pos_embed.proj") | block_layers(module)
    for ours, theirs in EMBEDDERS.items():
        table |= dense(ours, _embedder(theirs), **copies)
    table |= vector("condition/label/embedding", _embedder(LABELS), **copies)
    for part, branch in enumerate(("attention", "mlp")):
        modulation = f"{BLOCK}/{branch}/modulation/dense"
        table |= dense(modulation, "transformer_blocks.{}.norm1.linear", part=part, parts=2)
    return table | dense("final_modulation/dense", "proj_out_1") | dense("final", "proj_out_2")


def _config(module):
    fixed = {"frequency_shift": 1.0, "norm_eps": 1e-6, "interpolation_scale": 1.0, "mlp_ratio": 4.0}
    check_stored(module, "DiTTransformer2DModel", **fixed)
    return {
        "_class_name": "DiTTransformer2DModel",
        **common_config(module),
        "num_embeds_ada_norm": find_stream(module.conditions, Label).num_classes,
        "norm_type": "ada_norm_zero",
        "norm_eps": module.mlp_norm_eps,
    }


DIT = Family(
    "diffusers",
    dit,
    dit_fields,
    _table,
    _config,
    shapes,
    ignored=(r"^pos_embed\.pos_embed$",),
    irrelevant=IRRELEVANT,
    sample_size=32,
)


def _made(**fields):
    if not fields.get("heads"):
        known = ", ".join(str(width) for width, _, _ in SIZES.values())
        raise InvalidInput(f"How many heads a width of {fields['width']} has is known for {known} only: give heads=.")
    return dit(**fields)


def _original_fields(config, files):
    if files is None:
        raise InvalidInput("The fields of a dit_original are read off its tensors: a safetensors file is needed.")
    needed = ("x_embedder.proj.weight", "final_layer.linear.bias", "blocks.0.mlp.fc1.bias")
    needed += ("y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight")
    missing = [name for name in needed if name not in files.names]
    if missing:
        raise InvalidInput(f"{files.path} is no dit_original: it lacks {', '.join(missing)}.")
    width, channels, patch, _ = files.shape(needed[0])
    (out,) = files.shape(needed[1])
    ratio = out / (channels * patch**2)
    if ratio not in (1, 2):
        raise invalid("final_layer.linear.bias", [out], f"{channels * patch**2} or twice as many entries are needed")
    heads = {size_width: heads for size_width, _, heads in SIZES.values()}
    positions, base_size = _positions(files, width)
    return {
        "patch": patch,
        "width": width,
        "depth": sum(re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name) is not None for name in files.names),
        "heads": config.whole("heads", heads.get(width, 0)),
        "mlp_ratio": files.shape(needed[2])[0] / width,
        "conditions": (label(files.shape(needed[3])[0] - 1),),
        "qkv_bias": "blocks.0.attn.qkv.bias" in files.names,
        "learn_sigma": ratio == 2,
        "in_channels": channels,
        "positions": positions,
        "base_size": base_size,
    }


def _positions(files, width):
    """The kind of positions, and how many patches a side they are for: a file may hold the fixed table, or another."""
    if "pos_embed" not in files.names:
        return "sincos", 0
    table = files.read("pos_embed").astype(np.float32)[0]
    size = round(len(table) ** 0.5)
    fixed = sincos_positions(image_positions(size, size), width)
    # Numbers up to 1 have an error of 0.004 in bfloat16.
    tolerance = 1e-4 if files.dtype("pos_embed") == "F32" else 1e-2
    same = fixed.shape == table.shape and np.allclose(fixed, table, atol=tolerance)
    return ("sincos" if same else "learned"), size


def _original_table(module) -> TensorTable:
    check_stored(module, "dit_original", **PLAIN, modulation="block", embeddings="shared", frequency_shift=0.0)
    stored_conditions(module, "dit_original", Label)
    table = patch_embedding(module, "x_embedder.proj")
    table |= dense("condition/time/up", "t_embedder.mlp.0") | dense("condition/time/down", "t_embedder.mlp.2")
    table |= vector("condition/label/embedding", "y_embedder.embedding_table.weight")
    if module.positions == "learned":
        table["positions"] = StoredTensor("pos_embed", "1 n d -> n d")
    for part, name in enumerate("qkv"):
        ours = f"{BLOCK}/attention/attention/{name}"
        table |= dense(ours, "blocks.{}.attn.qkv", module.qkv_bias, part=part, parts=3)
    table |= dense(f"{BLOCK}/attention/attention/out", "blocks.{}.attn.proj")
    table |= dense(f"{BLOCK}/mlp/feed_forward/up", "blocks.{}.mlp.fc1")
    table |= dense(f"{BLOCK}/mlp/feed_forward/down", "blocks.{}.mlp.fc2")
    for part, branch in enumerate(("attention", "mlp")):
        table |= dense(f"{BLOCK}/{branch}/modulation/dense", "blocks.{}.adaLN_modulation.1", part=part, parts=2)
    table |= dense("final_modulation/dense", "final_layer.adaLN_modulation.1")
    return table | dense("final", "final_layer.linear")


def _original_config(module):
    check_stored(module, "dit_original", norm_eps=1e-6, mlp_norm_eps=1e-6, interpolation_scale=1.0)
    return {"_class_name": "dit_original", "heads": module.heads}


def _original_buffers(module):
    if module.positions == "learned" or not module.base_size:
        return {}
    positions = image_positions(module.base_size, module.base_size)
    return {"pos_embed": sincos_positions(positions, module.width)[None]}


DIT_ORIGINAL = Family(
    "diffusers",
    _made,
    _original_fields,
    _original_table,
    _original_config,
    shapes,
    ignored=(r"^pos_embed$",),
    buffers=_original_buffers,
    sample_size=32,
)
