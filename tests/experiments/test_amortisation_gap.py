"""The four rows on a tiny model: what must hold between them, SAELens' format, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import amortisation_gap, fista_dictionary
from experiments.amortisation_gap import Flags
from experiments.amortisation_gap_run import refitted, solved
from sparse_jax.activations import Normaliser
from sparse_jax.coding import objective
from sparse_jax.dictionaries import L1, Fista, Normalised, load, read_card, save
from sparse_jax.errors import InputError
from sparse_jax.formats import save_saelens
from tests.experiments.test_fista_dictionary import flags as sparse_coding_flags


def run(dictionary, out, **changes):
    fields = {"eval_tokens": 2048, "tune_tokens": 1024, "out": out, "overwrite": True, **changes}
    assert amortisation_gap.main(Flags(dictionary, **fields)) == 0
    return json.loads((out / "metrics.json").read_text())


def test_four_rows(autoencoder, tmp_path):
    final = run(autoencoder, tmp_path / "gap")
    rows = final["rows"]
    assert abs(final["solver_l0_on_tuning_tokens"] / final["encoder_l0_on_tuning_tokens"] - 1) <= 0.01
    assert final["objective"]["solver"] < final["objective"]["encoder"]
    np.testing.assert_allclose(final["objective_gap"], final["objective"]["encoder"] / final["objective"]["solver"] - 1)
    # The best values of the same features leave no more than others.
    for name in ("encoder", "solver"):
        assert rows[f"{name}'s support"]["fvu"] <= rows[name]["fvu"] + 1e-6
        assert rows[f"{name}'s support"]["l0"] <= rows[name]["l0"] + 1e-6
    # The encoder's row is what the run itself measured, on the same tokens.
    own = json.loads((autoencoder / "metrics.json").read_text())
    np.testing.assert_allclose(rows["encoder"]["fvu"], own["fvu"], rtol=1e-3)
    np.testing.assert_allclose(rows["encoder"]["ce_increase"], own["ce_increase"], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_saelens_format_gives_the_same(autoencoder, tmp_path):
    provenance = read_card(autoencoder)["provenance"]
    save_saelens(tmp_path / "theirs", load(autoencoder), provenance)
    ours = run(autoencoder, tmp_path / "ours")
    theirs = run(
        tmp_path / "theirs", tmp_path / "gap", model=provenance["model"], text=provenance["text"], eval_text=None
    )
    assert theirs["dictionary"] == ours["dictionary"]
    # Folded into raw units: atoms of another length, another lambda, the same codes.
    np.testing.assert_allclose(theirs["objective_gap"], ours["objective_gap"], rtol=0.05)
    assert theirs["lambda"] != ours["lambda"]


@pytest.mark.slow
def test_a_solver_has_no_gap(model, text, tmp_path):
    assert fista_dictionary.main(sparse_coding_flags(model, text, tmp_path / "run")) == 0
    final = run(tmp_path / "run", tmp_path / "gap")
    np.testing.assert_allclose(final["rows"]["encoder"]["fvu"], final["rows"]["solver"]["fvu"], rtol=0.05)
    assert abs(final["objective_gap"]) < 0.02


def test_refitted_codes_by_hand():
    """One feature of two: its best value is x . w / w . w, whatever the encoder gave; negative ones become 0."""
    dictionary = L1(n_features=2).sized(2)
    W = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    params = {"W_enc": W.T, "W_dec": W, "b_enc": jnp.array([0.0, -1.0]), "b_dec": jnp.zeros(2)}
    trained = Normalised(dictionary, params, Normaliser(jnp.zeros(2), jnp.float32(1)))
    encoder = lambda params, x: params["trained"].encode(x)  # noqa: E731
    codes = refitted(encoder, 2, False, {"trained": trained}, jnp.array([[3.0, 0.2], [1.0, 4.0]]))
    np.testing.assert_allclose(codes, [[3.0, 0.0], [1.0, 2.0]], atol=1e-6)
    # Where least squares would take a feature of negative value, the other's best value without it is due.
    tilted = trained.params | {"W_dec": jnp.array([[1.0, 0.0], [0.8, 0.6]]), "b_enc": jnp.array([0.0, 9.0])}
    tilted = Normalised(dictionary, tilted, trained.normaliser)
    for signed, due in ((False, [[1.0, 0.0]]), (True, [[7.0 / 3, -5.0 / 3]])):
        codes = refitted(encoder, 2, signed, {"trained": tilted}, jnp.array([[1.0, -1.0]]))
        np.testing.assert_allclose(codes, due, atol=1e-5)
    solution = solved({"trained": trained, "penalty": jnp.float32(2.0)}, jnp.array([[3.0, 1.0]]), False, 1e-6)
    np.testing.assert_allclose(solution, [[2.0, 0.25]], atol=1e-5)
    np.testing.assert_allclose(objective(jnp.array([[3.0, 1.0]]), W, 2.0, solution), 5.75, rtol=1e-5)


def test_what_cannot_be(autoencoder, tmp_path):
    with pytest.raises(InputError, match="--tune-tokens 0"):
        amortisation_gap.main(Flags(autoencoder, tune_tokens=0, out=tmp_path / "gap"))
    with pytest.raises(InputError, match="holds no dictionary"):
        amortisation_gap.main(Flags(tmp_path / "nothing", out=tmp_path / "gap"))
    homeless = Fista(n_features=4).sized(16)
    normaliser = Normaliser(jnp.zeros(16), jnp.ones(()))
    save(tmp_path / "homeless", Normalised(homeless, homeless.init(jax.random.key(0)), normaliser), {})
    with pytest.raises(InputError, match="does not say which site"):
        amortisation_gap.main(Flags(tmp_path / "homeless", out=tmp_path / "gap"))
    assert not (tmp_path / "gap").exists()
