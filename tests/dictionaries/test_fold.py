"""Folding the normaliser: exact for every architecture where it is possible, refused for those where it is not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import DICTIONARIES, L1, Normalised
from sparse_jax.dictionaries.fold import NOT_FOLDED, RULES, fold
from sparse_jax.errors import InputError

ROWS, D, N = 50, 6, 16

# Every other registered architecture folds.
REFUSED = {"matching-pursuit": "atom by atom"}

VARIANTS = [
    {},
    {"centring": True},
    {"centring": False},
    {"decoder_bias": False},
    {"tied": True},
    {"tied": True, "centring": False},
    {"tied": True, "decoder_bias": False},
    {"activation": "softplus"},
]


def cases() -> list:
    """Every registered architecture, in every variant whose options it has."""
    found = []
    for kind in sorted(DICTIONARIES):
        names = {field.name for field in dataclasses.fields(DICTIONARIES[kind])}
        for options in VARIANTS:
            if options.keys() <= names:
                small = options | ({"k": 3} if "k" in names else {})
                name = "-".join([kind, *(f"{k}={v}" for k, v in options.items())])
                found.append(pytest.param(kind, small, id=name))
    return found


def made(kind, options):
    """A dictionary with every parameter away from where it starts, behind a normaliser that does something; float64."""
    dictionary = DICTIONARIES[kind](n_features=N, **options).sized(D, compute_dtype="float64")
    generator = np.random.default_rng(0)
    params = {
        name: jnp.array(np.asarray(value) + 0.2 * generator.normal(size=value.shape), jnp.float64)
        for name, value in dictionary.init(jax.random.key(0)).items()
    }
    if "threshold" in params:  # one that is known, so that encoding is by it
        params["threshold"] = jnp.array(0.7)
    normaliser = Normaliser(jnp.array(10 * generator.normal(size=D)), jnp.array(3.7))
    return Normalised(dictionary, params, normaliser)


@pytest.mark.parametrize(("kind", "options"), cases())
def test_folded_and_normalised_agree_on_raw_activations_or_the_fold_is_refused(x64, kind, options):
    x = jnp.array(10 * np.random.default_rng(1).normal(size=(ROWS, D)))
    trained = made(kind, options)
    if kind in REFUSED:
        with pytest.raises(InputError, match=REFUSED[kind]):
            fold(trained.dictionary, trained.params, trained.normaliser)
        return
    dictionary, params = fold(trained.dictionary, trained.params, trained.normaliser)

    @jax.jit
    def both(trained, params, x):
        codes, folded_codes = trained.encode(x), dictionary.encode(params, x)
        return codes, (
            (folded_codes, codes),
            (dictionary.decode(params, codes, x), trained.decode(codes, x)),
            (dictionary.decode(params, folded_codes, x), trained.reconstruct(x)),
            (dictionary.directions(params), trained.directions()),
        )

    codes, pairs = both(trained, params, x)
    assert np.count_nonzero(codes) > ROWS
    for folded, behind_normaliser in pairs:
        np.testing.assert_allclose(folded, behind_normaliser, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "options"), cases())
def test_a_folded_dictionary_has_the_parameters_of_its_static_choices(x64, kind, options):
    if kind in REFUSED:
        return
    trained = made(kind, options)
    before = jax.tree.map(np.array, trained.params)
    dictionary, params = fold(trained.dictionary, trained.params, trained.normaliser)
    due = jax.eval_shape(dictionary.init, jax.random.key(0))
    assert {name: value.shape for name, value in params.items()} == {name: value.shape for name, value in due.items()}
    assert {value.dtype for value in params.values()} == {jnp.dtype(jnp.float64)}
    jax.tree.map(np.testing.assert_array_equal, trained.params, before)


def test_every_registered_architecture_has_a_rule_or_a_reason():
    assert DICTIONARIES.keys() <= RULES.keys() | NOT_FOLDED.keys()
    assert not RULES.keys() & NOT_FOLDED.keys()
    assert NOT_FOLDED.keys() == REFUSED.keys()


def test_a_tied_encoder_becomes_an_untied_one():
    trained = L1(n_features=N, tied=True).sized(D)
    normaliser = Normaliser(jnp.ones(D), jnp.float32(2))
    dictionary, params = fold(trained, trained.init(jax.random.key(0)), normaliser)
    assert dictionary == dataclasses.replace(trained, tied=False)
    np.testing.assert_allclose(np.linalg.norm(params["W_enc"], axis=0), 0.5, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=1), 2, rtol=1e-6)


def test_without_a_decoder_bias_the_centre_becomes_one():
    trained = L1(n_features=N, decoder_bias=False).sized(D)
    centre = jnp.arange(D, dtype=jnp.float32)
    dictionary, params = fold(trained, trained.init(jax.random.key(0)), Normaliser(centre, jnp.float32(2)))
    assert (dictionary.decoder_bias, dictionary.centring) == (True, False)
    np.testing.assert_array_equal(params["b_dec"], centre)


def test_by_hand():
    """One feature in one dimension: n(x) = (x - 10) / 2, c = ReLU(3 (n - 1) - 1), y_hat = c + 1."""
    dictionary = L1(n_features=1).sized(1)
    params = {name: jnp.array(value, jnp.float32) for name, value in BY_HAND.items()}
    dictionary, params = fold(dictionary, params, Normaliser(jnp.array([10.0]), jnp.float32(2)))
    np.testing.assert_array_equal(params["W_enc"], [[1.5]])
    np.testing.assert_array_equal(params["b_enc"], [-1])
    np.testing.assert_array_equal(params["W_dec"], [[2]])
    np.testing.assert_array_equal(params["b_dec"], [12])
    np.testing.assert_array_equal(dictionary.encode(params, jnp.array([[14.0]])), [[2]])
    np.testing.assert_array_equal(dictionary.decode(params, jnp.array([[2.0]])), [[16]])


BY_HAND = {"W_enc": [[3.0]], "b_enc": [-1.0], "W_dec": [[1.0]], "b_dec": [1.0]}


def test_an_architecture_without_a_rule_is_refused_by_name():
    class Strange(L1):
        kind = "strange"

    with pytest.raises(InputError, match="cannot be folded into a strange dictionary"):
        fold(Strange(n_features=N).sized(D), {}, Normaliser(jnp.zeros(D), jnp.float32(1)))
