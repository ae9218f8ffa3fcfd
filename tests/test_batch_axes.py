"""Where the batch stands in what solvers and denoisers remember is named, not guessed from shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, solvers
from diffusion_jax.denoisers import guided, in_one_batch
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from diffusion_jax.streaming import rolling, sample_windowed
from diffusion_jax.time_axes import batch_axes
from diffusion_jax.timesteps import linspace, staircase, windows
from diffusion_jax.typing import Cost, Denoiser, Solver, Step
from tests.models.shared import now
from tests.solvers.test_solver_laws import smooth

FLOW = processes.rectified_flow()
KEY = jax.random.key(2)
BATCH, FRAMES = 3, 2
X = np.zeros((BATCH, 1), np.float32)
COND = {"label": np.arange(1.0, 1 + BATCH, dtype=np.float32)}
NULL = {"label": 0.0}
STEP = Step(jnp.int32(0), jnp.float32(0.5), jnp.float32(0.4), jnp.int32(2))


def remembering(axes, ring=None):
    """A denoiser that answers with what it remembers, and then remembers ten times as much.

    last: by sample. merged: frames merged with the batch. ring: shared; as long as two batches where nothing is given.
    """

    def init(params, x, cond):
        last = cond["label"]
        return {"last": last, "merged": jnp.repeat(last, FRAMES)[None], "ring": jnp.arange(ring or 2.0 * x.shape[0])}

    def apply(params, carry, x, step, cond):
        told = carry["last"] + carry["merged"].reshape(-1, FRAMES).sum(axis=1)
        prediction = FLOW.from_x0((told + carry["ring"][-1])[:, None], x, step.t)
        carry = {"last": 10 * carry["last"], "merged": 10 * carry["merged"], "ring": carry["ring"] + 1}
        return prediction._replace(cost=Cost(jnp.float32(1), jnp.float32(1))), carry

    return Denoiser(init, apply, FLOW, axes)


def named(carry):
    return {"last": 0, "merged": 1, "ring": None}


def test_guidance_hands_the_main_answer_its_own_rows_and_everything_that_is_shared():
    branches = in_one_batch(remembering(named), NULL)

    def made():
        begun = branches.init(None, X, COND)
        first, guide, carry = branches.both(None, begun, X, STEP, COND)
        alone, after = branches.main(None, carry, X, STEP, COND)
        return first.x0, guide.x0, alone.x0, after

    first, guide, alone, after = now(made)
    last, label = 4.0 * BATCH - 1, COND["label"][:, None]
    np.testing.assert_array_equal(first, (1 + FRAMES) * label + last)
    np.testing.assert_array_equal(guide, np.full_like(label, last))
    np.testing.assert_array_equal(alone, 10 * (1 + FRAMES) * label + last + 1)
    rows = np.stack([100 * COND["label"], np.zeros(BATCH)], axis=1).reshape(-1)
    np.testing.assert_array_equal(after["last"], rows)
    np.testing.assert_array_equal(after["merged"], np.repeat(rows, FRAMES)[None])
    np.testing.assert_array_equal(after["ring"], np.arange(4 * BATCH) + 2)


def test_guidance_nests():
    """Four answers of which the main two have neighbouring rows: and a shared memory as long as they are."""
    inner = guided(remembering(named, 4.0 * BATCH), 2.0, NULL, interval=(0.45, 1.0))
    branches = in_one_batch(inner, lambda cond: {"label": cond["label"] + 1})

    def made():
        first, guide, carry = branches.both(None, branches.init(None, X, COND), X, STEP, COND)
        return first.x0, guide.x0, branches.main(None, carry, X, STEP, COND)[0].x0

    first, guide, alone = now(made)
    told, last = 2 * (1 + FRAMES) * COND["label"][:, None], 4.0 * BATCH - 1
    np.testing.assert_allclose(first, told + last)
    np.testing.assert_allclose(guide, told + 2 * (1 + FRAMES) + last)
    np.testing.assert_allclose(alone, 10 * told + last + 1)


def test_a_memory_that_nobody_named_or_that_has_no_batch_there_is_told():
    def alone(denoiser):
        branches = in_one_batch(denoiser, NULL)
        branches.main(None, branches.init(None, X, COND), X, STEP, COND)

    with pytest.raises(InvalidInput, match="does not say where the batch stands"):
        alone(remembering(None))
    with pytest.raises(InvalidInput, match="a prefix tree of what is remembered"):
        alone(remembering(lambda carry: {"last": 0}))
    longer = remembering(lambda carry: 0)
    with pytest.raises(InvalidInput, match="no batch of 6 in axis 0"):
        alone(longer._replace(init=lambda params, x, cond: jnp.zeros(2 * BATCH + 1)))


ENTRIES = 6
PLAN = np.asarray(staircase(linspace(4), ENTRIES, 2))
STARTS = windows(PLAN, 4)


def with_table(inner, named=True):
    """A solver that keeps a table which all samples share, though as long as there are entries; it begins with 0."""

    def init(process, x, grid):
        return inner.init(process, x, grid), jnp.arange(float(x.shape[1]))

    def step(process, denoise, carry, state, x, step, key):
        x, own, carry = inner.step(process, denoise, carry, state[0], x, step, key)
        return x + state[1][0], (own, state[1]), carry

    return Solver(init, step, inner.order, (lambda state: (batch_axes(inner, state[0]), None)) if named else None)


def streamed(solver):
    buffer = rolling(smooth(), solver, linspace(6), entries=ENTRIES, chunk=2)
    stream = buffer.prime(KEY, jnp.zeros((2, ENTRIES)))
    return jax.lax.scan(lambda s, _: buffer.advance(None, s), stream, None, 4)[1]


def windowed(solver):
    x = jax.random.normal(KEY, (2, ENTRIES))
    return sample_windowed(KEY, smooth(), None, solver, PLAN, 4, x_init=x, starts=STARTS).x


@pytest.mark.parametrize("stream", [streamed, windowed])
def test_what_solvers_share_stays_where_it_is_when_entries_move(stream):
    inner = solvers.unipc(2)
    own, plain = now(lambda: (stream(with_table(inner)), stream(inner)))
    np.testing.assert_array_equal(own, plain)
    with pytest.raises(InvalidInput, match="does not say where the batch stands"):
        stream(with_table(inner, named=False))


def test_a_leaf_without_the_entries_that_its_axis_promises_is_told():
    wrong = solvers.ddim()._replace(init=lambda process, x, grid: jnp.zeros((2, 4)), axes=lambda state: 0)
    with pytest.raises(InvalidInput, match="4 entries in axis 1"):
        streamed(wrong)


def test_a_memory_that_nobody_splits_needs_no_axes():
    denoiser = guided(remembering(None), 2.0, NULL)
    found = now(lambda: sample(KEY, denoiser, None, solvers.ddim(), linspace(2), x_init=X, cond=COND).x)
    assert np.isfinite(found).all()
