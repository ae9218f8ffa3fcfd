"""Parameters as after training, drawn with NumPy: no compilation, and no initial zeros that hide anything."""

import jax
import numpy as np


def drawn(shapes, seed=0):
    """Kernels of variance 1 / fan in, scales about 1, everything else about 0, for a tree of shapes."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        value = rng.standard_normal(shape.shape)
        name = path[-1].key
        if name == "kernel":
            value /= np.sqrt(np.prod(shape.shape[-4:-1] if value.ndim == 4 else shape.shape[-2:-1]))
        elif name == "scale":
            value = 1 + 0.2 * value
        else:
            value *= 0.2
        return jax.device_put(value.astype(np.float32))

    return jax.tree_util.tree_map_with_path(leaf, shapes)
