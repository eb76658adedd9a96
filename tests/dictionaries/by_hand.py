"""What the tests of gradients written by hand share: the comparison with autodiff and with finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.dictionaries import Batch, Dictionary
from sparse_jax.numerics import row_blocks

by_autodiff = jax.jit(Dictionary.value_and_grad, static_argnums=0)


def in_small_blocks(monkeypatch):
    """Blocks of 4 rows, so that small batches have several."""
    monkeypatch.setattr(row_blocks, "BLOCK", 4)
    monkeypatch.setattr(row_blocks, "_SMALLEST", 2)


def normal_batch(rows, d_in, d_out=None, dtype=np.float64, seed=5):
    """A batch with masked rows and with weights other than 0 and 1; the target is x itself unless `d_out` is given."""
    generator = np.random.default_rng(seed)
    x = jnp.array(generator.normal(size=(rows, d_in)), dtype)
    target = x if d_out is None else jnp.array(generator.normal(size=(rows, d_out)), dtype)
    return Batch(x, target, jnp.array([(0.0, 1.0, 0.5, 1.0, 2.0)[i % 5] for i in range(rows)], dtype))


def shifted(params, batch, distance=20):
    """(parameters, batch) with `distance` standard deviations added to every dimension; b_dec holds them."""
    params = params | {"b_dec": params["b_dec"] + distance}
    return params, batch._replace(x=batch.x + distance, target=batch.target + distance)


def assert_as_close_as_autodiff(dictionary, form, params, batch, ctx, autodiff=by_autodiff):
    """bfloat16 gradients of `form` are as near to float32's as those of `autodiff` are."""
    exact = dataclasses.replace(dictionary, compute_dtype="float32")
    rounded = dataclasses.replace(dictionary, compute_dtype="bfloat16")
    _, _, grads = by_autodiff(exact, params, batch, ctx)
    _, _, expected = autodiff(rounded, params, batch, ctx)
    _, _, made = form(rounded, params, batch, ctx)
    for name, grad in grads.items():
        error = relative_error(made[name], grad)
        assert 0 < error < max(2 * relative_error(expected[name], grad), 1e-2), name


def assert_same(one, other, rtol=1e-12, atol=1e-12):
    """(value, losses, gradients) equal, with the same names."""
    assert one[1].terms.keys() == other[1].terms.keys()
    assert one[2].keys() == other[2].keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, other)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), (one, other))
    assert shapes[0] == shapes[1]
    np.testing.assert_array_equal(one[1].fired, other[1].fired)


def assert_finite_differences(objective, params, grads, atol=1e-7):
    """`grads` against central differences of the scalar `objective(params)`."""
    params = jax.tree.map(np.asarray, params)
    for name, grad in grads.items():
        for index in np.ndindex(*grad.shape):
            step = np.zeros_like(params[name])
            step[index] = 1e-6
            above, below = (objective({**params, name: params[name] + sign * step}) for sign in (1, -1))
            np.testing.assert_allclose(grad[index], (above - below) / 2e-6, atol=atol, err_msg=f"{name}{index}")


def relative_error(made, exact):
    """Of two gradients, as vectors."""
    return float(np.linalg.norm(np.asarray(made) - exact) / np.linalg.norm(exact))
