"""Put the normaliser into a dictionary's weights, so that it takes and gives raw activations.

With the normaliser n(x) = (x - m) / s, the folded dictionary gives raw x the codes that the dictionary gave n(x), and
decodes them to s y_hat + m. For the family  c = phi((x - b_dec) W_enc + b_enc),  y_hat = c W_dec + b_dec:

    W_enc' = W_enc / s        W_dec' = s W_dec        b_dec' = s b_dec + m

and nothing else changes, thresholds included, because the pre-activations stay the same. Where b_dec is not subtracted
from the input, the centre goes into the encoder's bias instead: b_enc' = b_enc - (m / s) W_enc.

Codes keep their meaning, so the folded directions have norm s, not 1, and a tied encoder (which would have to be both
W / s and s W) becomes an untied one. For the same reason a pursuit, whose encoder is its decoder, does not fold.

A folded dictionary is for use, not for further training: its coefficients and learning rates were for normalised units.
Without centring its products see raw activations: keep their compute dtype at float32.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries.protocol import Dictionary, Params
from sparse_jax.errors import InputError

Rule = Callable[[Dictionary, Params, Normaliser], tuple[Dictionary, Params]]


def fold(dictionary: Dictionary, params: Params, normaliser: Normaliser) -> tuple[Dictionary, Params]:
    """A dictionary that needs no normaliser, with its parameters: the same codes, reconstructions in raw units.

    Args:
        dictionary: the static choices; the folded ones may differ (tied becomes untied).
        params: its parameters.
        normaliser: what stood before it in training.

    Raises:
        InputError: no exact fold exists for this architecture.
    """
    rule = RULES.get(dictionary.kind)
    if rule is None:
        reason = NOT_FOLDED.get(dictionary.kind, "its encoder is not of a form that is known to fold")
        raise InputError(f"the normaliser cannot be folded into a {dictionary.kind} dictionary: {reason}")
    return rule(dictionary, params, normaliser)


def _one_bias(dictionary: Dictionary, params: Params, normaliser: Normaliser) -> tuple[Dictionary, Params]:
    """Codes are a function of (x - b_dec) W_enc + b_enc: L1, JumpReLU, TopK and their like."""
    dictionary, folded, shift = _linear(dictionary, params, normaliser)
    return dictionary, folded | {"b_enc": params["b_enc"] - shift}


def _gated(dictionary: Dictionary, params: Params, normaliser: Normaliser) -> tuple[Dictionary, Params]:
    """Two biases beside shared weights, which the magnitudes see scaled by exp(r_mag)."""
    dictionary, folded, shift = _linear(dictionary, params, normaliser)
    biases = {"b_gate": params["b_gate"] - shift, "b_mag": params["b_mag"] - jnp.exp(params["r_mag"]) * shift}
    return dictionary, folded | biases


def _linear(dictionary: Dictionary, params: Params, normaliser: Normaliser) -> tuple[Dictionary, Params, jnp.ndarray]:
    """Weights and b_dec folded, and what is to be subtracted from a pre-activation's bias (0 with centring)."""
    centre, scale = normaliser.centre, normaliser.scale
    static = {"tied": False} if getattr(dictionary, "tied", False) else {}
    W_enc = (params["W_dec"].T if static else params["W_enc"]) / scale
    if "b_dec" not in params:
        # Now there is something to add to every reconstruction: the centre, which the encoder has had as a shift.
        static |= {"decoder_bias": True, "centring": False}
    centred = "b_dec" in params and getattr(dictionary, "centring", True)
    shift = jnp.zeros_like(W_enc[0]) if centred else centre @ W_enc
    b_dec = scale * params.get("b_dec", jnp.zeros_like(centre)) + centre
    folded = params | {"W_enc": W_enc, "W_dec": scale * params["W_dec"], "b_dec": b_dec}
    return dataclasses.replace(dictionary, **static), folded, shift


def _fista(dictionary: Dictionary, params: Params, normaliser: Normaliser) -> tuple[Dictionary, Params]:
    """Both sides of the objective are s^2 times as large in raw units, if the penalty is."""
    centre, scale = normaliser.centre, normaliser.scale
    b_dec = scale * params.get("b_dec", jnp.zeros_like(centre)) + centre
    folded = {"W_dec": scale * params["W_dec"], "b_dec": b_dec, "penalty": scale**2 * params["penalty"]}
    return dataclasses.replace(dictionary, decoder_bias=True), folded


def _lista(dictionary: Dictionary, params: Params, normaliser: Normaliser) -> tuple[Dictionary, Params]:
    """What an iteration leaves of x is s times as large, and W_enc takes the factor back; thresholds are of codes."""
    dictionary, folded, _ = _linear(dictionary, params, normaliser)
    return dictionary, folded


def _linear_top_k(dictionary: Dictionary, params: Params, normaliser: Normaliser) -> tuple[Dictionary, Params]:
    """The floors: W is both encoder and decoder, but they have a gain on the codes, which takes the factor between."""
    centre, scale = normaliser.centre, normaliser.scale
    return dictionary, {
        "W_dec": scale * params["W_dec"],
        "mean": scale * params["mean"] + centre,
        "gain": params["gain"] / scale**2,
    }


# By kind, so that nothing is imported for the sake of an architecture that is not used.
RULES: dict[str, Rule] = {
    "l1": _one_bias,
    "lp": _one_bias,
    "gated": _gated,
    "jump-relu": _one_bias,
    "topk": _one_bias,
    "batch-topk": _one_bias,
    "matryoshka": _one_bias,
    "multi-topk": _one_bias,
    "fista": _fista,
    "lista": _lista,
    "pca": _linear_top_k,
    "neurons": _linear_top_k,
    "random": _linear_top_k,
}

NOT_FOLDED: dict[str, str] = {
    "matching-pursuit": "its encoder subtracts, atom by atom, what its decoder will add, so the same W would have to "
    "be W / s for the correlations and s W for the reconstruction; keep the normaliser beside it",
}
