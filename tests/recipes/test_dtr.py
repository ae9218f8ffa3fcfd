"""What the study of DTR adds: arms that differ in what they claim to differ in, and the published setting."""

import jax

from diffusion_jax.config import build, load
from diffusion_jax.recipes.__main__ import main

FILE = "configs/recipes/dtr.py"


def test_arms_have_the_same_parameters_and_updates_and_differ_in_channels_or_loss():
    config = load(FILE)
    plain = config.arms["all channels"]
    for name, arm in config.arms.items():
        network = arm.model.network if "network" in arm.model else arm.model
        assert network == plain.model and arm.train == plain.train and arm.optimizer == plain.optimizer, name
        assert (name.startswith("DTR") or name == "random") == ("network" in arm.model)
    assert len({str((arm.model, arm.objective)) for arm in config.arms.values()}) == len(config.arms)


def test_the_published_setting_has_the_parameters_of_the_transformer(capsys):
    config = load(f"{FILE}:paper")
    shapes = [
        jax.eval_shape(build(model).init, jax.random.key(0), *inputs())
        for model in (config.model, config.model.network)
    ]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    main(["dtr:paper"])
    assert 450 < float(capsys.readouterr().out.split("network: ")[1].split()[0].replace(",", "")) < 470


def inputs():
    shape = jax.ShapeDtypeStruct
    return shape((1, 32, 32, 4), "float32"), shape((1,), "float32"), {"label": shape((1,), "int32")}
