"""Formulas as people write them, against lines written by hand."""

import numpy as np
import pytest
from scipy import sparse

from sparse_jax.connectors.formula import formula_of, short_weight, sign_counts
from sparse_jax.errors import InputError

ONE = [("resid_pre.3", 3000)]


def column(n=3000, **weights):
    made = np.zeros(n)
    for name, weight in weights.items():
        made[int(name[1:])] = weight
    return made


def test_the_line():
    formula = formula_of(column(f259=0.23, f2797=0.26, f12=-0.15), "OF 30", ONE)
    assert str(formula) == "OF 30 = 0.26 IF 2797 + 0.23 IF 259 - 0.15 IF 12"
    assert formula.nonzeros == 3
    assert [(t.row, t.site, t.feature, t.weight) for t in formula.terms] == [
        (2797, "resid_pre.3", 2797, 0.26),
        (259, "resid_pre.3", 259, 0.23),
        (12, "resid_pre.3", 12, -0.15),
    ]


@pytest.mark.parametrize(
    ("weights", "options", "line"),
    [
        ({}, {}, "OF 1 = 0"),
        ({}, {"bias": -0.5}, "OF 1 = -0.50"),
        ({"f3": -1.25}, {"bias": 0.125}, "OF 1 = -1.25 IF 3 + 0.12"),
        ({"f3": 1}, {"bias": -0.5, "relu": True}, "OF 1 = ReLU(1.00 IF 3 - 0.50)"),
        ({"f3": 1}, {"bias": 0.0}, "OF 1 = 1.00 IF 3"),
        ({"f3": 0.5, "f4": -0.5}, {}, "OF 1 = 0.50 IF 3 - 0.50 IF 4"),
    ],
)
def test_signs_and_biases(weights, options, line):
    assert str(formula_of(column(**weights), "OF 1", ONE, **options)) == line


def test_several_sites_are_named():
    sites = [("resid_pre.3", 10), ("mlp_out.3", 5), ("attn_out.3", 5)]
    formula = formula_of(column(20, f9=0.3, f10=0.2, f19=-0.1), "OF 2", sites)
    assert str(formula) == "OF 2 = 0.30 resid_pre.3 IF 9 + 0.20 mlp_out.3 IF 0 - 0.10 attn_out.3 IF 4"


def test_few_terms_are_shown():
    formula = formula_of(column(f1=0.4, f2=0.3, f3=-0.2), "OF 2", ONE, bias=1.0)
    assert formula.text(2) == "OF 2 = 0.40 IF 1 + 0.30 IF 2 + ... (1 more) + 1.00"
    assert formula.text(3) == str(formula)


def test_strength_orders():
    strengths = np.ones(3000)
    strengths[2] = 10
    formula = formula_of(column(f1=0.4, f2=0.3), "OF 2", ONE, strengths=strengths)
    assert str(formula) == "OF 2 = 0.30 IF 2 + 0.40 IF 1"


@pytest.mark.parametrize(
    ("weight", "text"),
    [(0.26, "0.26"), (0.0312, "0.031"), (0.1, "0.10"), (12.34, "12.3"), (256.4, "256"), (3e-5, "3e-05"),
     (0.999, "1.00"), (9.99, "10.0"), (0.0996, "0.10"), (99.97, "100.0")],
)  # fmt: skip
def test_weights_are_short(weight, text):
    assert short_weight(weight) == text
    assert short_weight(-weight) == "-" + text


def test_sites_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="3,000"):
        formula_of(np.zeros(10), "OF 1", ONE)
    with pytest.raises(InputError, match="strengths"):
        formula_of(np.zeros(3000), "OF 1", ONE, strengths=np.ones(2))


def test_weights_are_counted_by_sign():
    W = np.array([[0.2, 0.1, -5.0], [-0.3, 0.11, 0.0], [0.5, -0.1, -0.11]])
    for given in (W, sparse.csr_array(W)):
        counts = sign_counts(given)
        assert counts.positive.tolist() == [2, 1, 0]
        assert counts.negative.tolist() == [1, 0, 2]
    assert sign_counts(W, above=0).positive.tolist() == [2, 2, 0]
    with pytest.raises(InputError, match="above -1"):
        sign_counts(W, above=-1)
