"""Loading a checkpoint of two gigabytes: seconds and peak memory, ours against the peer's loader.

`python -m benchmarks.loading ours|peers FOLDER` loads in a process of its own and prints seconds and MiB beyond what
the process had with its libraries imported. Weights count as loaded once they could be computed with.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ratio, summarise
from benchmarks.report import Row

LAYERS = 24
"""Of a PixArt transformer of width 1152: 528 M parameters, 2.1 GB in float32."""


def make_folder(folder: Path, layers: int, width: int) -> int:
    """A folder as the peer saves it, in shards of at most 500 MB; returns the bytes of its weights."""
    from diffusers import PixArtTransformer2DModel

    heads = width // 72
    model = PixArtTransformer2DModel(num_layers=layers, num_attention_heads=heads, cross_attention_dim=width)
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def resident(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MiB."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def load(side: str, folder: str) -> dict[str, float]:
    """Seconds of loading, and the peak of resident memory beyond what was there before."""
    if side == "ours":
        import jax

        from diffusion_jax import interop

        jax.block_until_ready(jax.numpy.zeros(1))

        def run():
            return jax.block_until_ready(interop.load_pretrained(folder).params)
    else:
        from diffusers import PixArtTransformer2DModel

        def run():
            model = PixArtTransformer2DModel.from_pretrained(folder)
            # The peer leaves its weights in the mapped file until they are looked at.
            for weight in model.parameters():
                weight.max()
            return model

    before = resident("VmRSS")
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    del kept
    return {"seconds": seconds, "peak": resident("VmHWM") - before}


def loading(rounds: int, smoke: bool, compiled_peers: bool) -> list[Row]:
    """The same folder read by both, in turns, each time by a new process; the files are in the system's cache."""
    del compiled_peers
    with tempfile.TemporaryDirectory() as name:
        size = make_folder(Path(name), 2 if smoke else LAYERS, 144 if smoke else 1152) / 2**20
        found = {"ours": [], "peers": []}
        for turn in range(2 if smoke else max(3, min(rounds, 6) + 1)):
            for side in found:
                command = [sys.executable, "-m", "benchmarks.loading", side, name]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                # The first turn fills the system's cache of files.
                if turn:
                    found[side].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {side: [one["seconds"] for one in ones] for side, ones in found.items()}
    peak = {side: max(one["peak"] for one in ones) for side, ones in found.items()}
    row = Row(
        case=f"load {size:.0f} MiB of weights in shards",
        ours=summarise(seconds["ours"]),
        peer="from_pretrained, each weight looked at once",
        theirs=summarise(seconds["peers"]),
        ratio=ratio(seconds["peers"], seconds["ours"]),
        memory=peak["ours"],
        their_memory=peak["peers"],
        note=f"memory beyond the weights: ours {peak['ours'] - size:.0f} MiB, peer's {peak['peers'] - size:.0f} MiB",
    )
    print(f"  {row.case}: {row.ratio.value:.2f}×; {row.note}", flush=True)
    return [row]


if __name__ == "__main__":
    print(json.dumps(load(sys.argv[1], sys.argv[2])))
