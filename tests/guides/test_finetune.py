"""The how-to of fine-tuning."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffusion_jax import data, interop
from tests.guides.running import run
from tests.interop.folders import SIZE, sd_folder


def test_finetune(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = sd_folder(tmp_path / "sd15")
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.fromarray(np.full((SIZE, SIZE + 4, 3), 50 * i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "photos" / f"{i}.txt").write_text(f"a value of {i}")
    smaller = {
        '"checkpoints/sd15"': repr(str(folder)),
        "(512, 512)": f"({SIZE}, {SIZE})",
        "steps=1000": "steps=2, mesh=one, progress=False",
        '["a red cube"], size=size': '["a red cube"], size=size, num_steps=2',
        "size = (": "from diffusion_jax import distributed\none = distributed.make_mesh(devices=1)\nsize = (",
    }
    names = run("finetune.md", smaller)
    assert names["images"].shape == (1, SIZE, SIZE, 3)
    read = interop.load_lora("out/style/pytorch_lora_weights.safetensors", names["pipeline"].network)
    assert read.keys() == names["state"].params.keys()
    # Four steps of the same checkpoint can be differentiated.
    tuned, key, batch = names["tuned"], jax.random.key(0), data.stacked_examples(names["examples"], range(4))
    learned = tuned.init(key)
    assert names["space"].bank.shape == (4, 64 * (SIZE // 4) ** 2)
    state = tuned.objective.init(key, learned, batch)
    slopes = jax.eval_shape(jax.grad(lambda part: tuned.objective.loss(part, state, batch, key)[0].mean()), learned)
    assert jax.tree.map(jnp.shape, slopes) == jax.tree.map(jnp.shape, learned)
