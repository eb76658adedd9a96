"""The stress test of kills: it sees a bit that differs, and a small version of it loses nothing."""

import json
import random

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import kill_stress
from benchmarks.kill_stress import Flags, Tally, differences, print_table, resumed_at, with_flags
from sparse_jax.errors import InputError


def finished(out, value=1.0, losses=(0.5, 0.25), extra=()):
    folder = out / "dictionaries" / "resid_post.0"
    folder.mkdir(parents=True)
    save_file({"W_dec": np.full((2, 3), value, np.float32)}, folder / "params.safetensors")
    rows = [{"step": 3 * i, "loss": loss} for i, loss in enumerate(losses)] + list(extra)
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_what_differs_is_found(tmp_path):
    whole = finished(tmp_path / "whole")
    # A run that goes on logs its first step too.
    assert differences(whole, finished(tmp_path / "a", extra=[{"step": 4, "loss": 0.3}])) == []
    nearly = np.nextafter(np.float32(1), np.float32(2))
    assert differences(whole, finished(tmp_path / "b", value=nearly)) == [
        "b: dictionaries/resid_post.0/params.safetensors W_dec"
    ]
    assert differences(whole, finished(tmp_path / "c", losses=(0.5,))) == ["c: metrics.jsonl"]
    assert differences(whole, finished(tmp_path / "d", losses=(0.5, 0.2500001))) == ["d: metrics.jsonl"]
    (tmp_path / "e").mkdir()
    assert len(differences(whole, tmp_path / "e")) == 2
    assert differences(tmp_path / "e", tmp_path / "e") == ["e: dictionaries is missing"]


def test_resume_is_asked_for_where_a_run_has_begun(tmp_path):
    assert with_flags(["sweep", "--a", "--", "topk"], tmp_path) == ["sweep", "--a", "--out", str(tmp_path), "topk"]
    (tmp_path / "config.json").write_text("{}")
    assert with_flags(["sweep", "--", "topk"], tmp_path) == ["sweep", "--out", str(tmp_path), "--resume", "topk"]
    assert resumed_at("resumed at step 12 of 40\nsomething\nresumed at step 4 of 40\n") == [12, 4]


def test_the_table_says_what_was_lost(capsys):
    print_table({"text, single": Tally(runs=2, kills=3, in_a_save=1, resumed_at=[4, 8])})
    assert "3 kills, none lost" in capsys.readouterr().out
    print_table({"text, single": Tally(runs=1, kills=1, lost=["killed-0: W_dec"])})
    assert "1 kills, LOST: killed-0: W_dec" in capsys.readouterr().out


def test_bad_flags_are_refused():
    for changes in ({"kills": 0}, {"data": ("disk",)}, {"trained": ()}):
        with pytest.raises(InputError, match="--kills"):
            kill_stress.main(Flags(**changes))


@pytest.mark.matrix
def test_kills_at_random_instants_lose_nothing(tmp_path, capsys):
    """An ensemble from a store; test_train_sae.py kills a single dictionary of streamed text."""
    seed = random.SystemRandom().randrange(2**32)
    given = Flags(kills=2, data=("store",), trained=("ensemble",), seed=seed, folder=tmp_path / "runs")
    assert kill_stress.main(given) == 0, f"seed {seed}: {capsys.readouterr().out}"
    assert "2 kills, none lost" in capsys.readouterr().out
