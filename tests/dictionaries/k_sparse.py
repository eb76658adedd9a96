"""What the tests of the TopK family share: small cases, finite differences, short training runs."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import Batch, Context
from sparse_jax.training.schedules import Schedule
from sparse_jax.training.state import init_state, settings_for
from sparse_jax.training.step import adam, make_step

DEAD_WINDOW = 1000

# One compilation for each case: a step taken operation by operation compiles dozens of small programs.
loss = jax.jit(lambda dictionary, params, batch, ctx: dictionary.loss(params, batch, ctx), static_argnums=0)
encode = jax.jit(lambda dictionary, params, x: dictionary.encode(params, x), static_argnums=0)
value_and_grad = jax.jit(
    lambda dictionary, params, batch, ctx: dictionary.value_and_grad(params, batch, ctx), static_argnums=0
)


def context(dictionary, k=None, dead=(), step=0, dtype=jnp.float32):
    """A context with this k in use, in which the features numbered in `dead` have been silent for too long."""
    coefficients = dictionary.coefficients | ({} if k is None else {"k_now": k})
    age = np.full(dictionary.n_features, DEAD_WINDOW, np.int32)  # at the window itself: not yet dead
    age[list(dead)] += 1
    return Context(
        {name: jnp.array(value, dtype) for name, value in coefficients.items()},
        jnp.array(age),
        jax.random.key(0),
        jnp.int32(step),
        jnp.int32(DEAD_WINDOW),
    )


def small(architecture, dtype=np.float64, rows=9, d=4, n=8, seed=0, **options):
    """(dictionary, parameters away from zero, a batch with masked rows)."""
    dictionary = architecture(n_features=n, **options).sized(d, compute_dtype=np.dtype(dtype).name)
    generator = np.random.default_rng(seed)
    params = {
        name: jnp.array(np.asarray(value) + (name not in dictionary.frozen) * 0.3 * generator.normal(size=value.shape))
        for name, value in dictionary.init(jax.random.key(seed)).items()
    }
    params = {name: value.astype(dtype) for name, value in params.items()}
    x = jnp.array(generator.normal(size=(rows, d)), dtype)
    return dictionary, dictionary.project(params), Batch(x, x, jnp.array(np.arange(rows) % 3 != 1, dtype))


def assert_gradients(terms, params, names, atol=1e-7):
    """`terms(params) -> dict of scalars`: its gradients in the parameters `names` against central differences."""
    terms = jax.jit(terms)
    grads = jax.jit(jax.jacrev(terms))(params)
    params = jax.tree.map(np.asarray, params)
    for name in names:
        for index in np.ndindex(*params[name].shape):
            step = np.zeros_like(params[name])
            step[index] = 1e-6
            above, below = (terms({**params, name: params[name] + sign * step}) for sign in (1, -1))
            for term, grad in grads.items():
                numeric = (above[term] - below[term]) / 2e-6
                np.testing.assert_allclose(grad[name][index], numeric, atol=atol, err_msg=f"{term} {name}{index}")
    return grads


def sparse_data(rows, d=16, n=32, active=3, seed=0, used=None):
    """`[rows, d]` of norm about sqrt(d): each the sum of a few of n directions, in the first `used` dimensions."""
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(n, d))
    directions[:, used or d :] = 0
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    generator = np.random.default_rng(seed + 1)
    codes = generator.uniform(0.5, 1.5, size=(rows, n)) * (generator.random((rows, n)).argsort(1) < active)
    x = codes @ directions
    return jnp.array(x * np.sqrt(d / np.mean(np.sum(x**2, axis=1))), jnp.float32)


def train(dictionary, steps=500, rate=3e-3, change=lambda params: params, batch=128, used=None, dead_window=2500):
    """(parameters before, parameters after, metrics of the first and last step), by the real training step."""
    d = dictionary.d_in
    optimisation = adam(rate)
    normaliser = Normaliser(jnp.zeros(d), jnp.ones(()))
    state = init_state(dictionary, optimisation.transform, normaliser, 0, settings_for(dictionary, optimisation))
    before = dictionary.project(change(state.params))
    state = jax.tree.map(lambda value: value, state)
    object.__setattr__(state, "params", jax.tree.map(jnp.copy, before))
    step = make_step(dictionary, optimisation, Schedule(), steps, dead_window)
    x, weight, metrics = sparse_data(batch * 100, d, used=used).reshape(100, batch, d), jnp.ones(batch), []
    for i in range(steps):
        state, made = step(state, x[i % 100], weight)
        if i in (0, steps - 1):
            metrics.append(jax.tree.map(float, made))
    return before, state.params, metrics
