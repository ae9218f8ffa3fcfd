"""The judges of the tests are trained once a session, in a cache of their own."""

import pytest

from diffusion_jax import metrics


@pytest.fixture(scope="session")
def judge_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("DIFFUSION_JAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def judge(judge_cache):
    return metrics.feature_network("digits")
