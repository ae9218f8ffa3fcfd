"""Forecast features and first-block caches equal diffusers' hooks through whole DDIM runs, on the same weights.

Where the definitions differ ours are set to theirs (`benchmarks.caching`):
- TaylorSeer's interval is counted from one step behind the warm-up there, from its last step here and in the released
  code; ours takes their schedule as an array.
- Their default pattern of modules finds nothing in these networks; it is written out here, as attention and
  feed-forward modules before their gates, which is our default.
- Their differences are kept in bfloat16 by default, ours in float32 at least; here both are float32.
- Both first-block caches compare what the first block adds, relative to the last computed step. At an error that
  equals the threshold they reuse, and ours computes.
Needs the peers extra: `make test-peers`.
"""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig  # noqa: E402

from benchmarks.caching import CACHED, PROCESS, hooked, our_run, taylorseer_schedule, their_run  # noqa: E402
from diffusion_jax import interop  # noqa: E402
from diffusion_jax.acceleration import cached_features, first_block_cached, on_schedule, taylor  # noqa: E402
from diffusion_jax.denoisers import denoiser  # noqa: E402
from diffusion_jax.models import inner_modules  # noqa: E402
from diffusion_jax.models.layers.attention import Attention  # noqa: E402
from tests.peers.comparison import TOLERANCE, randomised  # noqa: E402
from tests.peers.figures import record  # noqa: E402

pytestmark = pytest.mark.peers

STEPS = 20
SIZE = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 4, "in_channels": 3, "sample_size": 8}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """By name: the peer, ours with the same weights, x, and the condition of both."""
    torch.set_num_threads(1)
    rng, found = np.random.default_rng(0), {}
    context = rng.normal(size=(2, 5, 20)).astype(np.float32)
    labels = np.array([1, 3])
    kinds = {
        "dit": (
            diffusers.DiTTransformer2DModel(**SIZE, num_embeds_ada_norm=5),
            {"class_labels": torch.tensor(labels)},
            {"label": labels},
        ),
        "pixart": (
            diffusers.PixArtTransformer2DModel(**SIZE, cross_attention_dim=24, caption_channels=20, out_channels=3),
            {"encoder_hidden_states": torch.tensor(context)},
            {"context": context},
        ),
    }
    for name, (peer, theirs, ours) in kinds.items():
        folder = tmp_path_factory.mktemp(name)
        randomised(peer).save_pretrained(folder)
        x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
        found[name] = peer, interop.load_pretrained(folder), x, theirs, ours
    return found


def compared(networks, name, config, make):
    """Both runs and the largest difference of x over all steps."""
    peer, loaded, x, theirs, cond = networks[name]
    expected = their_run(hooked(peer, config), x, STEPS, **theirs)
    xs, evaluations = jax.jit(our_run(make(loaded.network), STEPS, x.shape))(loaded.params, x, cond)
    return expected, float(evaluations), float(np.abs(np.asarray(xs) - expected.xs).max())


def attention(module):
    return inner_modules(module) and isinstance(module, Attention)


@pytest.mark.parametrize("name", ["dit", "pixart"])
@pytest.mark.parametrize(("interval", "warmup", "order", "only"), [(3, 3, 1, None), (4, 2, 2, None), (3, 3, 1, "attn")])
def test_taylorseer_is_the_peers(networks, name, interval, warmup, order, only):
    pattern = CACHED.replace("|ff", "") if only else CACHED
    config = TaylorSeerCacheConfig(
        interval, warmup, max_order=order, taylor_factors_dtype=torch.float32, cache_identifiers=[pattern]
    )
    refresh, select = on_schedule(taylorseer_schedule(interval, warmup, STEPS)), attention if only else inner_modules
    expected, evaluations, error = compared(
        networks, name, config, lambda network: cached_features(network, PROCESS, taylor(order), refresh, select=select)
    )
    assert expected.full == evaluations == taylorseer_schedule(interval, warmup, STEPS).sum() < STEPS
    record("cache", f"TaylorSeer, {name}", error)
    assert error <= TOLERANCE, error


@pytest.mark.parametrize(("name", "threshold"), [("dit", 0.75), ("dit", 1.0), ("pixart", 0.25)])
def test_the_first_block_cache_is_the_peers(networks, name, threshold):
    expected, evaluations, error = compared(
        networks,
        name,
        FirstBlockCacheConfig(threshold),
        lambda network: first_block_cached(network, PROCESS, threshold),
    )
    assert expected.full == evaluations and 1 < evaluations < STEPS, (expected.full, evaluations)
    record("cache", f"first block, {name}", error)
    assert error <= TOLERANCE, error


def test_their_default_pattern_caches_nothing_here(networks):
    """If this fails, the hooks have learnt to find `attn1`, and `CACHED` may go."""
    config = TaylorSeerCacheConfig(3, 3, taylor_factors_dtype=torch.float32)
    expected, _, error = compared(networks, "dit", config, lambda network: denoiser(network, PROCESS))
    assert expected.full == STEPS and error <= TOLERANCE
