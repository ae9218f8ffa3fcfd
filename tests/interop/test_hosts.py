"""Loading on several hosts: each process reads its own slices and no others."""

import numpy as np

from diffusion_jax import interop, models
from diffusion_jax.models import by_path
from tests.distributed.hosts import outputs_of_two
from tests.interop.folders import drawn

SCRIPT = """
import sys, numpy as np, jax
from diffusion_jax import distributed, interop
from diffusion_jax.interop.files import TensorFiles
distributed.initialize()
read, entries = TensorFiles.read, []

def spy(self, name, index=()):
    value = read(self, name, index)
    entries.append(value.size)
    return value

TensorFiles.read = spy
mesh = distributed.make_mesh(fsdp=4)
params = interop.load_pretrained(sys.argv[1], mesh=mesh, rules=distributed.Rules(fsdp_min_size=0)).params
total = jax.jit(lambda p: sum(abs(leaf).sum() for leaf in jax.tree.leaves(p)))(params)
print("total", float(total), "read", sum(entries))
"""


def test_each_process_reads_half(tmp_path):
    network = models.dit("S/2", width=64, depth=2, heads=2, conditions=(models.label(5),), in_channels=4, base_size=2)
    pretrained = drawn("dit_original", network)
    folder = interop.save_pretrained(tmp_path, pretrained)
    leaves = by_path(pretrained.params).values()
    count = sum(leaf.size for leaf in leaves)
    expected = sum(float(np.abs(leaf).sum()) for leaf in leaves)
    for output in outputs_of_two(SCRIPT, str(folder)):
        words = output.split()
        np.testing.assert_allclose(float(words[words.index("total") + 1]), expected, rtol=1e-5)
        # A kernel of patches, and what no axis of divides, is read whole.
        assert int(words[words.index("read") + 1]) < 0.55 * count
