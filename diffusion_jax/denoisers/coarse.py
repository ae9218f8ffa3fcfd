"""Coarser mixtures: a model of the small network in trajectory stitching, in closed form.

At high noise only the coarse statistics of the data are left in x_t, so a mixture with merged components predicts the
same as the finer one. At low noise it does not. Trajectory stitching (`switched`) relies on this.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from diffusion_jax.denoisers.analytic import GaussianMixture, gaussian_mixture
from diffusion_jax.errors import InvalidInput, invalid


def merged_components(mixture: GaussianMixture, groups: Int[np.ndarray, " K"] | list[int]) -> GaussianMixture:
    """`mixture` with the components of each group replaced by one Gaussian of their mean and covariance.

        w_g = sum_k w_k,        m_g = sum_k w_k m_k / w_g,        C_g = sum_k w_k (C_k + (m_k - m_g)(m_k - m_g)') / w_g

    so mean and covariance of the whole are what they were. groups: the number of each component's group, `[K]`, all of
    0 .. G - 1. The result has dense covariances and no labels. Raises InvalidInput for joint data and other groups.
    """
    if isinstance(mixture.means, dict):
        raise InvalidInput("merged_components merges components of one array, not of joint data.")
    weights, means = np.exp(np.asarray(mixture.log_weights, np.float64)), np.asarray(mixture.means, np.float64)
    groups, shape = np.asarray(groups), means.shape[1:]
    means = means.reshape(len(means), -1)
    if groups.shape != weights.shape or sorted(set(groups.tolist())) != list(range(groups.max() + 1)):
        raise invalid("groups", groups.tolist(), f"{len(weights)} numbers that are all of 0 .. G - 1 were expected")
    if mixture.covariances is None:
        covariances = np.stack([np.diag(row) for row in np.asarray(mixture.variances, np.float64).reshape(means.shape)])
    else:
        covariances = np.asarray(mixture.covariances, np.float64)
    share = weights * (groups == np.arange(groups.max() + 1)[:, None])
    total = share.sum(axis=1)
    share /= total[:, None]
    centres = share @ means
    away = means - centres[:, None]
    spread = np.einsum("gk,gki,gkj->gij", share, away, away) + np.einsum("gk,kij->gij", share, covariances)
    return gaussian_mixture(jnp.asarray(centres.reshape(-1, *shape)), weights=total, covariances=spread)
