"""Networks of actions: what was observed becomes the vector that they are conditioned on."""

from diffusion_jax.errors import InvalidInput
from diffusion_jax.typing import Network


def observing(network: Network) -> Network:
    """The network told by `cond["observation"] [B, history, D]` in place of `cond["pooled"] [B, history D]`.

    It takes the conditions of demonstrations and of policies as they are (`data.tabletop`, `data.push_t`); parameters
    and other conditions are those of the network. Observations as one global vector are Diffusion Policy's (Chi et
    al. 2023). Raises InvalidInput for a condition without observations.
    """

    def told(cond):
        if not cond or "observation" not in cond:
            raise InvalidInput(f"cond has {sorted(cond or ())}, but this network needs cond['observation'].")
        rest = {name: value for name, value in cond.items() if name != "observation"}
        observation = cond["observation"]
        return {**rest, "pooled": observation.reshape(observation.shape[0], -1)}

    def init(key, x, t, cond=None):
        return network.init(key, x, t, told(cond))

    def apply(params, x, t, cond=None, train=False, key=None):
        return network.apply(params, x, t, told(cond), train=train, key=key)

    return Network(init, apply, network.module)
