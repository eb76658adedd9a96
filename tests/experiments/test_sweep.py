"""A sweep: its members, what it refuses, what it leaves behind, and that each member is what it would be alone."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import command, sweep, train_sae
from experiments.sweep import Flags
from experiments.sweep_members import choices, knob
from sparse_jax.dictionaries import DICTIONARIES, L1, JumpReLU, TopK, load, read_card
from sparse_jax.errors import InputError

# 24 steps.
COMMON = {
    "context": 32, "batch": 128, "block_rows": 16, "tokens": 3072, "eval_tokens": 2048, "statistics_tokens": 2048,
    "holdout": 0.2, "compute_dtype": "float32", "log_every": 5, "checkpoint_every": 7, "reuse_memory": False,
}  # fmt: skip


def flags(model, text, out, dictionary=None, **changes) -> Flags:
    dictionary = dictionary or TopK(expansion=2)
    fields = {
        "model": str(model), "text": str(text), "out": Path(out), "sites": ("resid_post.0", "resid_post.1"),
        "seeds": (0, 1), "sparsities": (2.0, 4.0), "measure_tokens": 512, "measure_at": (0.5, 1.0), **COMMON,
    }  # fmt: skip
    return Flags(dictionary, **{**fields, **changes})


def test_members_are_all_combinations(tmp_path):
    given = flags("m", "t", tmp_path, learning_rates=(1e-3, 1e-4), expansions=(2, 4))
    made = choices(given)
    assert len(made) == 2 * 2 * 2 * 2 * 2
    assert len({(choice.site, choice.name) for choice in made}) == len(made)
    first, last = made[0], made[-1]
    assert (first.site, first.name) == ("resid_post.0", "k-2_2x_lr-0.001_seed-0")
    assert (first.dictionary, first.sparsity, first.target_l0) == (TopK(expansion=2, k=2), 2.0, None)
    assert (last.site, last.name) == ("resid_post.1", "k-4_4x_lr-0.0001_seed-1")
    assert (last.dictionary, last.seed, last.learning_rate) == (TopK(expansion=4, k=4), 1, 1e-4)


def test_a_wished_l0_leaves_the_coefficient_as_it_is(tmp_path):
    given = flags("m", "t", tmp_path, L1(l1=3.0, n_features=64), sparsities=(), target_l0s=(8.0, 16.0), seeds=(5,))
    made = [choice for choice in choices(given) if choice.site == "resid_post.0"]
    assert [(choice.target_l0, choice.sparsity, choice.dictionary.l1) for choice in made] == [
        (8, 8, 3.0),
        (16, 16, 3.0),
    ]
    assert made[0].name == "target-l0-8_n64_lr-0.001_seed-5"


@pytest.mark.parametrize("kind", sorted(set(DICTIONARIES) - {"pca", "neurons", "random"}))
def test_every_architecture_has_a_knob_at_its_own_value(kind, tmp_path):
    dictionary = DICTIONARIES[kind](expansion=2)
    (choice,) = choices(flags("m", "t", tmp_path, dictionary, sparsities=(), seeds=(0,), sites=("resid_post.0",)))
    coefficients = choice.dictionary.coefficients
    assert coefficients == dictionary.coefficients
    assert choice.sparsity in coefficients.values()
    (other,) = choices(flags("m", "t", tmp_path, dictionary, sparsities=(3.0,), seeds=(0,), sites=("resid_post.0",)))
    assert getattr(other.dictionary, knob(dictionary)) == 3
    assert other.dictionary.coefficients != coefficients


BAD = {
    "no site": ({"sites": ()}, "--sites: give at least one"),
    "no seed": ({"seeds": ()}, "--seeds: give at least one"),
    "no learning rate": ({"learning_rates": ()}, "--learning-rates: give at least one"),
    "a site twice": ({"sites": ("resid_post.0", "blocks.0.hook_resid_post")}, "there twice"),
    "a seed twice": ({"seeds": (1, 1)}, "--seeds 1 1"),
    "a sparsity twice": ({"sparsities": (4.0, 4.0)}, "--sparsities 4 4"),
    "a share twice": ({"measure_at": (0.5, 0.5)}, "--measure-at 0.5 0.5"),
    "a share beyond the end": ({"measure_at": (1.5,)}, "at most 1"),
    "a negative seed": ({"seeds": (-1,)}, "negative"),
    "half a feature": ({"sparsities": (2.5,)}, "whole number"),
    "no feature": ({"sparsities": (0.0,)}, "whole number"),
    "a negative rate": ({"learning_rates": (1e-3, -1.0)}, "--learning-rates 0.001 -1.0"),
    "no width": ({"expansions": (0,)}, "--expansions 0"),
    "two widths": ({"dictionary": TopK(n_features=64), "expansions": (2,)}, "give one of them"),
    "two sparsities": ({"dictionary": L1(), "target_l0s": (8.0,)}, "give one of them"),
    "a wished L0 without a coefficient": ({"sparsities": (), "target_l0s": (8.0,)}, "no sparsity coefficient"),
    "a negative coefficient": ({"dictionary": JumpReLU(), "sparsities": (-1.0,)}, "cannot be negative"),
    "a wished L0 of nothing": ({"dictionary": L1(), "sparsities": (), "target_l0s": (0.0,)}, "--target-l0s 0"),
    "k above the features": ({"dictionary": TopK(n_features=8), "sparsities": (4.0, 9.0)}, "exceeds the 8 features"),
    "k below where it anneals from": ({"dictionary": TopK(anneal_from=40), "sparsities": (48.0,)}, "--anneal-from"),
    "an unknown site": ({"sites": ("residual.0",)}, "give NAME.LAYER"),
    "tokens below a batch": ({"tokens": 100}, "below one batch"),
    "nothing to measure along the way": ({"measure_tokens": 0}, "--measure-tokens 0"),
    "a share at which nothing is resampled": ({"resample_at": (1.0,)}, "--resample-at"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_are_refused_before_anything_is_loaded(case, tmp_path):
    """The model does not exist: it is not looked for."""
    changes, words = BAD[case]
    with pytest.raises(InputError) as caught:
        sweep.main(flags("./no/such/model", "no-text.txt", tmp_path / "out", **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_only_the_model_decides_is_refused_before_training(model, text, tmp_path):
    for changes, words in (
        ({"sparsities": (33.0,)}, "exceeds the 32 features"),  # two times a width of 16
        ({"sites": ("resid_post.0", "resid_post.7")}, "layers 0 to 1"),
    ):
        with pytest.raises(InputError, match=words):
            sweep.main(flags(model, text, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
