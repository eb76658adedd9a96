"""`--plan` prints and ends: it loads no weights, trains nothing, writes nothing, and asks for no devices."""

import json

import pytest

from experiments import sweep, train_sae
from experiments.sweep import Flags as SweepFlags
from sparse_jax.dictionaries import Fista, TopK
from sparse_jax.errors import InputError
from tests.experiments.conftest import CONFIG
from tests.experiments.test_train_sae import flags


@pytest.fixture(scope="module")
def config_only(tmp_path_factory):
    """A model's folder without weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def planned(config_only, tmp_path, capsys, **changes):
    given = flags(config_only, "no text", tmp_path / "out", plan=True, **changes)
    assert train_sae.main(given) == 0
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().out


def test_a_plan_needs_no_devices_and_no_weights(config_only, tmp_path, capsys):
    text = planned(config_only, tmp_path, capsys, mesh="data=64,features=16", batch=256, plan_chip="v5p")
    assert "1024 x v5p as data=64,features=16" in text
    # W_enc and W_dec of 16 x 32 over 16 devices, b_enc, b_dec; two moments and a count.
    parameters = 4 * (2 * 16 * 2 + 2 + 16)
    lines = {line[2:36].strip(): line[36:].strip() for line in text.splitlines()}
    assert lines["parameters"] == f"{parameters} B"
    assert lines["learner state"] == f"{2 * parameters + 4} B"
    assert "all-reduce over data=64" in lines["gradients"]
    assert "fits" in lines["in all"]
    assert "tokens/s" in text


def test_what_does_not_fit_is_said_with_what_would(config_only, tmp_path, capsys):
    wide = TopK(n_features=2**24)
    text = planned(
        config_only, tmp_path, capsys, dictionary=wide, batch=2**14, tokens=2**15, context=64, block_rows=256
    )
    assert "does not fit" in text
    assert "it would fit with" in text
    assert "features=" in text.split("it would fit with")[1]


def test_what_iterates_has_no_predicted_speed(config_only, tmp_path, capsys):
    assert "not predicted" in planned(config_only, tmp_path, capsys, dictionary=Fista())


def test_a_sweep_plans_each_width(config_only, tmp_path, capsys):
    given = SweepFlags(
        dictionary=TopK(), model=str(config_only), text="no text", out=tmp_path / "out", sites=("resid_post.0",),
        seeds=(0, 1), sparsities=(2, 4), expansions=(2, 4), context=32, batch=128, block_rows=16, tokens=8192,
        mesh="ensemble=4", plan=True,
    )  # fmt: skip
    assert sweep.main(given) == 0
    text = capsys.readouterr().out
    assert text.count("4 x v5e as ensemble=4") == 2
    assert text.count("(4 of 8 dictionaries)") == 2
    assert "all groups are in memory together" in text
    assert not (tmp_path / "out").exists()


def test_bad_input(config_only, tmp_path, capsys):
    with pytest.raises(InputError, match="chip 'v9'"):
        planned(config_only, tmp_path, capsys, plan_chip="v9")
    with pytest.raises(InputError, match="features=3 does not divide the 32 features"):
        planned(config_only, tmp_path, capsys, mesh="features=3")
    with pytest.raises(InputError, match="feature chunks 3"):
        planned(config_only, tmp_path, capsys, feature_chunks=3)
