"""Figures of a text's loss, by hand."""

import math

import numpy as np
import pytest

from sparse_jax.metrics.text_loss import loss_figures, standard_error


def test_figures_by_hand():
    # Three rows of two predictions: means 1, 2 and 3 nats, so mean 2 and standard deviation 1; 8 bytes of text.
    nats, predictions = np.array([2.0, 4.0, 6.0]), np.array([2, 2, 2])
    assert loss_figures(nats, predictions, 8) == {
        "nats_per_token": 2.0,
        "nats_per_token_standard_error": pytest.approx(1 / math.sqrt(3)),
        "perplexity": pytest.approx(math.e**2),
        "bits_per_byte": pytest.approx(12 / math.log(2) / 8),
    }


def test_the_standard_error_is_that_of_means_drawn_again():
    rng = np.random.default_rng(0)
    drawn = rng.gamma(2.0, size=(2000, 50))
    errors = [standard_error(rows * 7, np.full(50, 7)) for rows in drawn]
    assert np.mean(errors) == pytest.approx(drawn.mean(1).std(), rel=0.05)


def test_what_is_not_defined_is_none_or_infinite():
    assert standard_error(np.array([3.0]), np.array([2])) is None
    assert loss_figures(np.array([3.0]), np.array([2]), 0)["bits_per_byte"] is None
    assert loss_figures(np.array([1e4]), np.array([1]), 1)["perplexity"] == math.inf
