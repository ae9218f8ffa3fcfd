"""Runs that are cut off and go on, for the laws that they are those that never stopped."""

from diffusion_jax import data, training


def trained(objective, source, params, steps, workdir=None, *, batch_size, optimizer=None, mesh=None):
    """The state after so many steps of an objective on a source, from these parameters; goes on in `workdir`."""
    return training.train(
        objective,
        training.optimizers.sgd(0.1) if optimizer is None else optimizer,
        data.pipeline(source, batch_size, seed=0),
        init_params=lambda key: params,
        steps=steps,
        workdir=workdir,
        mesh=mesh,
        progress=False,
        log_to=(),
    )
