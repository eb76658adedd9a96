"""`--accumulate`, `--feature-chunks` and `--offload` in whole runs: the dictionary that a run without them learns."""

import numpy as np
import pytest

from experiments import fista_dictionary, train_sae
from sparse_jax.dictionaries import TopK
from sparse_jax.errors import InputError
from tests.experiments.test_train_sae import flags, params


def test_the_same_dictionary_with_less_memory(model, text, tmp_path):
    given = {"tokens": 1024, "report_features": 0, "eval_tokens": 256}
    assert train_sae.main(flags(model, text, tmp_path / "whole", **given)) == 0
    cut = {"accumulate": 2, "feature_chunks": 2, "offload": True, "mesh": "data=4,features=2"}
    assert train_sae.main(flags(model, text, tmp_path / "cut", **given, **cut)) == 0
    for name, value in params(tmp_path / "whole").items():
        np.testing.assert_allclose(params(tmp_path / "cut")[name], value, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_is_said_before_the_run(model, text, tmp_path):
    with pytest.raises(InputError, match="--accumulate 3 does not divide the 128 tokens"):
        train_sae.main(flags(model, text, tmp_path / "out", accumulate=3))
    with pytest.raises(InputError, match="topk has no step in chunks of features"):
        train_sae.main(flags(model, text, tmp_path / "out", feature_chunks=2, dictionary=TopK()))
    with pytest.raises(InputError, match="--offload needs a mesh"):
        train_sae.main(flags(model, text, tmp_path / "out", offload=True))
    with pytest.raises(InputError, match="--learner adam"):
        fista_dictionary.main(fista_dictionary.Flags(out=tmp_path / "out", accumulate=2))
    assert not (tmp_path / "out").exists()
