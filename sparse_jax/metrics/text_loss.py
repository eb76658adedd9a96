"""The loss of a language model on a text: nats by row, and the figures made of them."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.lm.losses import cross_entropy
from sparse_jax.lm.model import LanguageModel, forward


@jax.jit
def row_nats(lm: LanguageModel, tokens: jax.Array, targets: jax.Array, counted: jax.Array) -> jax.Array:
    """`[rows]` float32: the sum of -log p(target), nats, over the predictions of each row that count.

    Args:
        lm: the model.
        tokens, targets, counted: `[rows, position]` ids, the ids that follow them, and which predictions count.
    """
    return jnp.sum(jnp.where(counted, cross_entropy(forward(lm, tokens).logits, targets), 0), axis=1)


def standard_error(nats: np.ndarray, predictions: np.ndarray) -> float | None:
    """Of the mean nats of a prediction: the standard deviation of the rows' means over the root of their number.

    Rows are taken as independent and must count equally many predictions. None for a single row.

    Args:
        nats, predictions: `[rows]` sum of each row and how many predictions it is of.
    """
    if len(nats) < 2:
        return None
    return float(np.std(nats / predictions, ddof=1) / np.sqrt(len(nats)))


def loss_figures(nats: np.ndarray, predictions: np.ndarray, n_bytes: int) -> dict[str, float | None]:
    """nats_per_token, its standard error, perplexity = exp(nats_per_token), bits_per_byte = nats / ln 2 / bytes.

    Args:
        nats, predictions: `[rows]` float64 sum of each row, and how many predictions it is of.
        n_bytes: UTF-8 bytes of the text of all targets; bits_per_byte is None if there are none.
    """
    total = float(nats.sum())
    per_token = total / float(predictions.sum())
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(per_token))
    return {
        "nats_per_token": per_token,
        "nats_per_token_standard_error": standard_error(nats, predictions),
        "perplexity": perplexity,
        "bits_per_byte": total / float(np.log(2)) / n_bytes if n_bytes else None,
    }
