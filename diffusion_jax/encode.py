"""`diffusion-jax encode`: the latents of a folder of pictures, computed once, for training on them.

The pictures of --data go through the autoencoder of --pretrained, captions through its text encoder where it has one.
The result is a folder that `--config=latents:FOLDER` trains on. Shards that are there are kept, so an interrupted
command goes on; latents of another autoencoder, of other pictures or of another size are refused.
"""

import argparse
import hashlib
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from diffusion_jax import data, distributed, interop, pixels
from diffusion_jax.command import cache_compilations, leave, run_command, size_in_pixels
from diffusion_jax.command_parser import CommandParser
from diffusion_jax.data.image_folders import ImageFolder
from diffusion_jax.data.latent_shards import check_same, describe_latents, shards_to_write
from diffusion_jax.data.picture_files import READERS, content_digest
from diffusion_jax.errors import invalid
from diffusion_jax.interop.latents import load_latent_autoencoder
from diffusion_jax.interop.prompts import PLAIN, text_encoder
from diffusion_jax.models import T5
from diffusion_jax.training.storage import params_digest

TEXT_LENGTH = 120
"""Tokens of T5; CLIP's tokenizer says its own."""

TEXTS_AT_ONCE = 16


def pictures_digest(parts: Sequence[ImageFolder]) -> str:
    """What tells the pictures, in their order, from others; copies of a folder are the same."""
    sums = [content_digest(file) for part in parts for file in part.files]
    return hashlib.sha256(b"".join(sums)).hexdigest()[:16]


class TextReader(NamedTuple):
    """encode: so many captions to `context [N, M, C]` and `context_mask [N, M]`. told: for the description."""

    encode: Callable[[Sequence[str]], dict[str, np.ndarray]]
    told: dict[str, Any]


def find_text_encoder(folder: str, mesh: Any) -> TextReader | None:
    """The text encoder of a folder with `text_encoder` and `tokenizer`; None where there is none."""
    root = Path(folder).expanduser()
    if not (root / "text_encoder" / "config.json").is_file() or not (root / "tokenizer").is_dir():
        return None
    pretrained = interop.load_pretrained(root / "text_encoder", mesh=mesh)
    tokenizer = interop.load_tokenizer(root / "tokenizer")
    module = pretrained.network.module
    is_t5 = isinstance(module, T5)
    length = TEXT_LENGTH if is_t5 else min(tokenizer.max_length or module.positions, module.positions)
    encoder = text_encoder(pretrained, tokenizer, length, masked=is_t5)

    def encode(texts: Sequence[str]) -> dict[str, np.ndarray]:
        found = encoder.encode(list(texts), PLAIN)
        return {"context": np.asarray(found.hidden, np.float32), "context_mask": np.asarray(found.mask, bool)}

    told = {"folder": str(root), "family": pretrained.family, "parameters": params_digest(pretrained.params)}
    return TextReader(encode, {**told, "length": length})


def conditions_of_rows(source: ImageFolder, reader: TextReader | None, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What is known of the pictures of some rows: their captions as the reader encodes them, or labels, or bytes."""
    chosen = source.rows(np.isin(np.arange(len(source)), rows))
    known = chosen if reader is None else data.encoded_captions(chosen, reader.encode, TEXTS_AT_ONCE)
    return {key: np.asarray(values[np.arange(len(rows))]) for key, values in known.cond.items()}


def chosen_size(summary: data.FolderSummary, factor: int) -> tuple[int, int]:
    """The side of the pictures where none is asked for: as they are, up to 256 pixels, in whole tokens of 2 latents."""
    shorter = np.percentile([min(size) for size in summary.sizes], 25)
    step = 2 * factor
    side = max(step, min(256, int(shorter)) // step * step)
    return side, side


def write_part(
    folder: Path,
    source: ImageFolder,
    cond: Callable[[np.ndarray], Mapping[str, Any]],
    encode: Callable[[Any], Any],
    batch_size: int,
    shard_size: int,
    advance: Callable[[int], Any],
) -> int:
    """Writes the shards of latents of `source` that are not there, this process's share of them; returns how many.

    cond: what is known of the pictures of some rows, arrays `[rows, ...]`.
    encode: pictures `[batch_size, H, W, 3]` to latents; every call has this many, so it compiles once.
    """
    written = 0
    for name, within, there in shards_to_write(folder, len(source), shard_size):
        if there:
            advance(len(within))
            continue
        rows = np.asarray(within)
        latents = np.concatenate(list(_encoded(source, rows, encode, batch_size, advance)))
        data.write_latents(folder, name, latents, cond(rows))
        written += 1
    return written


def _encoded(source, rows, encode, batch_size, advance) -> Iterator[np.ndarray]:
    """Latents of the rows; while one batch is encoded the next one is read."""

    def pictures(part):
        # The last ones are repeated until the batch is full.
        wanted = np.concatenate([part, np.full(batch_size - len(part), part[-1])])
        return np.stack(list(pool.map(lambda row: source[int(row)]["x0"], wanted)))

    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    with ThreadPoolExecutor(READERS) as pool:
        waiting = None
        for part in parts:
            made = (part, encode(pictures(part)))
            if waiting is not None:
                yield np.asarray(waiting[1], np.float32)[: len(waiting[0])]
                advance(len(waiting[0]))
            waiting = made
        if waiting is not None:
            yield np.asarray(waiting[1], np.float32)[: len(waiting[0])]
            advance(len(waiting[0]))


def read_pictures(arguments: argparse.Namespace, summary: data.FolderSummary, size: tuple[int, int]) -> ImageFolder:
    """The source that the flags describe, looked at as a whole: what cannot be read is told before anything is made."""
    options = {
        "size": size,
        "fit": arguments.fit,
        "background": arguments.background,
        "on_error": arguments.on_error,
        "held_out": arguments.held_out,
    }
    if summary.captions:
        tokenizer = data.byte_tokenizer()
        source = data.captioned_folder(
            summary.folder, tokenizer=tokenizer, text_column=arguments.text_column, **options
        )
    else:
        source = data.image_folder(summary.folder, classes=bool(summary.class_names), **options)
    source.check()
    return source


def described_latents(
    arguments: argparse.Namespace,
    folder: str,
    autoencoder: Any,
    reader: TextReader | None,
    size: tuple[int, int],
    parts: Mapping[str, ImageFolder],
) -> dict[str, Any]:
    """What the latents are made by and of, as `latents.json` holds it. folder, parts: the pictures, by part."""
    module, source = autoencoder.network.module, parts["train"]
    return {
        "autoencoder": {
            "folder": os.path.abspath(os.path.expanduser(arguments.pretrained)),
            "parameters": params_digest(autoencoder.params),
            "scaling_factor": module.scaling_factor,
            "shift_factor": module.shift_factor,
            "dtype": arguments.dtype,
        },
        "pictures": {
            "folder": folder,
            "digest": pictures_digest(list(parts.values())),
            "size": list(size),
            "fit": arguments.fit,
            "background": arguments.background,
        },
        "text": None if reader is None else reader.told,
        "class_names": None if source.class_names is None else list(source.class_names),
        "vocab_size": source.vocab_size if reader is None else None,
        "examples": {name: len(part) for name, part in parts.items()},
        "shard_size": arguments.shard_size,
        "shape": [size[0] // module.factor, size[1] // module.factor, module.latent_channels],
    }


def _parser() -> CommandParser:
    parser = CommandParser(
        "encode",
        description=__doc__,
        epilog="example: diffusion-jax encode --pretrained=checkpoints/sd15 --data=my_pictures --size=256 "
        "--output=out/latents; then diffusion-jax train --config=latents:out/latents --workdir=out/mine",
    )
    parser.add_argument("--pretrained", required=True, help="a folder with an autoencoder, or a pipeline with one")
    parser.add_argument(
        "--data", required=True, help="a folder of pictures: classes in subfolders, captions, or neither"
    )
    parser.add_argument("--output", type=Path, required=True, help="where the latents go")
    parser.add_argument("--size", help="side, or HEIGHTxWIDTH, in pixels (default: that of the pictures, at most 256)")
    parser.add_argument("--fit", choices=pixels.FITS, default="crop", help="how pictures get it (default crop)")
    parser.add_argument("--background", default="white", help="seen where a picture is transparent (default white)")
    parser.add_argument("--on-error", choices=("refuse", "skip"), default="refuse", help="pictures that cannot be read")
    parser.add_argument("--held-out", type=float, default=0.1, help="share that is not trained on (default 0.1)")
    parser.add_argument("--text-column", default="text", help="of metadata.jsonl or captions.csv (default text)")
    parser.add_argument(
        "--text-encoder",
        metavar="FOLDER",
        help="with text_encoder and tokenizer in it, or none: captions then stay bytes (default: that of --pretrained)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at once on each device (default 8)")
    parser.add_argument("--shard-size", type=int, default=1000, help="pictures a file (default 1000)")
    parser.add_argument("--dtype", default="float32", help="of the arithmetic: float32 (default) or bfloat16")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    for name in ("batch_size", "shard_size"):
        if getattr(arguments, name) < 1:
            raise invalid("--" + name.replace("_", "-"), getattr(arguments, name), "it must be at least 1")
    asked = None if arguments.size is None else size_in_pixels(arguments.size)
    summary = data.folder_summary(arguments.data)
    distributed.initialize()
    cache_compilations()
    mesh = distributed.make_mesh(devices=jax.local_devices())
    autoencoder = load_latent_autoencoder(arguments.pretrained, mesh=mesh, dtype=arguments.dtype)
    module = autoencoder.network.module
    size = chosen_size(summary, module.factor) if asked is None else asked
    if min(size) < 1 or any(side % module.factor for side in size):
        raise invalid("--size", arguments.size, f"both sides must be multiples of {module.factor}, a latent's pixels")
    source = read_pictures(arguments, summary, size)
    reader = None
    if summary.captions and arguments.text_encoder != "none":
        reader = find_text_encoder(arguments.text_encoder or arguments.pretrained, mesh)
        if reader is None and arguments.text_encoder:
            raise invalid(
                "--text-encoder", arguments.text_encoder, "a folder with text_encoder and tokenizer is needed"
            )

    sources = {"train": source, **({"held_out": source.held_out} if source.held_out else {})}
    description = described_latents(arguments, summary.folder, autoencoder, reader, size, sources)
    check_same(arguments.output, description, "latents", "give another --output")
    print(
        f"{summary.told}\nat {size[0]} x {size[1]}, latents {' x '.join(map(str, description['shape']))}; "
        + ", ".join(f"{len(part)} {name.replace('_', ' ')}" for name, part in sources.items())
    )
    if jax.process_index() == 0:
        describe_latents(arguments.output, description)
    distributed.wait_for_all("description")
    run = jax.jit(autoencoder.network.encode)
    batch_size = arguments.batch_size * math.prod(mesh.shape.values())

    def encode(images):
        return run(autoencoder.params, distributed.shard_batch(images, mesh))

    # None: where standard error is a terminal.
    hidden = True if jax.process_index() or arguments.no_progress else None
    written = 0
    with tqdm(total=sum(map(len, sources.values())), unit="picture", disable=hidden, dynamic_ncols=True) as bar:
        for name, part in sources.items():
            cond = partial(conditions_of_rows, part, reader)
            written += write_part(
                arguments.output / name, part, cond, encode, batch_size, arguments.shard_size, bar.update
            )
    distributed.wait_for_all("latents")
    if jax.process_index() == 0:
        wanted = sum(-(-len(part) // arguments.shard_size) for part in sources.values())
        there = f"; the other {wanted - written} were there" if written < wanted and jax.process_count() == 1 else ""
        print(
            f"Wrote {written} of {wanted} shards to {arguments.output}{there}. Train on them: diffusion-jax train "
            f"{shlex.quote(f'--config=latents:{arguments.output}')} --workdir=out/latents_run"
        )


if __name__ == "__main__":
    leave(run_command(main))
