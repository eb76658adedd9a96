"""The ports against stored values of transformers' PyTorch models (made by `make_golden.py`); needs no torch.

The tiny models' files are in the styles of the hub; `test_parity_torch.py` has those that transformers 5 writes.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.lm import forward
from tests.lm.reference.models import MODELS

FILES = {path.stem: path for path in sorted((Path(__file__).parent / "golden").glob("*.npz"))}
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def test_golden_files_are_of_the_models_here(reference):
    assert FILES.keys() == MODELS.keys()
    for name, path in FILES.items():
        with np.load(path) as golden:
            assert str(golden["fingerprint"]) == reference.fingerprint(MODELS[name]), (
                f"{path.name} was made from other configs, weights or tokens: run make_golden.py again"
            )
    assert sum(path.stat().st_size for path in FILES.values()) < 3_000_000


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_every_site_and_the_logits(name, dtype, reference, loaded):
    tiny = MODELS[name]
    sites = reference.sites(tiny.config)
    with jax.enable_x64(dtype == "float64"), np.load(FILES[name]) as golden:
        out = forward(loaded(name, dtype), reference.random_tokens(tiny), capture=sites)
        assert out.captured.keys() == set(sites)
        assert {value.dtype for value in (*out.captured.values(), out.logits)} == {jnp.dtype(dtype)}
        errors = {site: reference.relative_error(out.captured[site], golden[f"{dtype} {site}"]) for site in sites}
        errors["logits"] = reference.relative_error(out.logits, golden[f"{dtype} logits"])
    print({site: f"{error:.1e}" for site, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("name", MODELS)
def test_logits_without_captures(name, reference, loaded, x64):
    """Nothing is looked into, so the layers run as one loop and attention in blocks of queries."""
    logits = forward(loaded(name, "float64"), reference.random_tokens(MODELS[name])).logits
    with np.load(FILES[name]) as golden:
        assert reference.relative_error(logits, golden["float64 logits"]) <= TOLERANCE["float64"]


@pytest.mark.parametrize("name", MODELS)
def test_reference_is_not_degenerate(name, reference):
    """Float32 and float64 golden values agree, and no site is flat: a port that ignores a part cannot pass."""
    with np.load(FILES[name]) as golden:
        for site in (*reference.sites(MODELS[name].config), "logits"):
            exact = golden[f"float64 {site}"]
            assert exact.dtype == np.float64
            assert golden[f"float32 {site}"].dtype == np.float32
            assert reference.relative_error(golden[f"float32 {site}"], exact) < 1e-5
            if exact.size > 6:  # the pattern of one position is all ones
                assert np.std(exact) > 0.05, f"{name} {site}"
