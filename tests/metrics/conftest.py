"""The judges of the tests are trained once a session, in a cache of their own."""

import pytest

from diffusion_jax import metrics

STEPS = 200
"""A third of the default: the judge is good enough to judge by then."""


@pytest.fixture(scope="session")
def judge_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("DIFFUSION_JAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def judge(judge_cache):
    return metrics.feature_network("digits", steps=STEPS)
