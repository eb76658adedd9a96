"""The GPT-NeoX port against stored values of transformers' PyTorch model (made by `make_golden.py`); needs no torch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.lm import forward

FILES = {path.stem: path for path in sorted((Path(__file__).parent / "golden").glob("*.npz"))}
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def test_golden_files_are_of_the_models_here(reference):
    assert FILES.keys() == reference.MODELS.keys()
    for name, path in FILES.items():
        with np.load(path) as golden:
            assert str(golden["fingerprint"]) == reference.fingerprint(reference.MODELS[name]), (
                f"{path.name} was made from other configs, weights or tokens: run make_golden.py again"
            )
    assert sum(path.stat().st_size for path in FILES.values()) < 1_000_000


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FILES)
def test_every_site_and_the_logits(name, dtype, reference, loaded):
    tiny = reference.MODELS[name]
    sites = reference.sites(tiny.config)
    with jax.enable_x64(dtype == "float64"), np.load(FILES[name]) as golden:
        out = forward(loaded(name, dtype), reference.random_tokens(tiny), capture=sites)
        assert out.captured.keys() == set(sites)
        assert {value.dtype for value in (*out.captured.values(), out.logits)} == {jnp.dtype(dtype)}
        errors = {site: reference.relative_error(out.captured[site], golden[f"{dtype} {site}"]) for site in sites}
        errors["logits"] = reference.relative_error(out.logits, golden[f"{dtype} logits"])
    assert max(errors.values()) <= TOLERANCE[dtype], errors


def test_logits_without_captures(reference, loaded):
    """Nothing is looked into, so the layers run as one loop."""
    for name in ("parallel", "sequential"):
        logits = forward(loaded(name), reference.random_tokens(reference.MODELS[name])).logits
        with np.load(FILES[name]) as golden:
            assert reference.relative_error(logits, golden["float32 logits"]) <= TOLERANCE["float32"]


def test_reference_is_not_degenerate(reference):
    """Float32 and float64 golden values agree, and no site is flat: a port that ignores a part cannot pass."""
    for name, path in FILES.items():
        with np.load(path) as golden:
            for site in (*reference.sites(reference.MODELS[name].config), "logits"):
                exact = golden[f"float64 {site}"]
                assert exact.dtype == np.float64
                assert golden[f"float32 {site}"].dtype == np.float32
                assert reference.relative_error(golden[f"float32 {site}"], exact) < 1e-5
                if exact.size > 6:  # the pattern of one position is all ones
                    assert np.std(exact) > 0.05, f"{name} {site}"
