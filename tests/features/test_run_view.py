"""A run's folder as a table in a notebook."""

import json
import re

import pytest

from sparse_jax.errors import InputError
from sparse_jax.features.run_view import Run, compare

METRICS = {
    "site": "resid_post.3",
    "dictionary": "l1",
    "fvu": 0.17748,
    "l0": 34.5539,
    "tokens": 522208,
    "revision": None,
    "best": True,
    "floors": {"pca": {"fvu": 0.2866, "l0": 35.0}, "random": {"fvu": 0.5, "kl": 0.1}},
    "unmasked": {"fvu": 0.1763},
    "cells": [{"width": 47, "codes": {"lasso": 0.99}}, {"width": 48}],
    "nothing": {},
}
CONFIG = {"flags": {"seed": 0, "schedule": {"warmup": 0.02}, "resample_at": [1, 2]}, "environment": {"python": "3"}}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "run<1>", METRICS)


def write(folder, metrics, config=CONFIG):
    folder.mkdir()
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_run_shows_its_figures_and_flags(folder):
    run = Run(folder)
    assert run.metrics == METRICS
    assert run.flags == CONFIG["flags"]
    html = run._repr_html_()
    assert "run&lt;1&gt;</h3>" in html
    facts = dict(re.findall("<dt>([^<]*)</dt><dd>([^<]*)</dd>", html))
    assert facts["fvu"] == "0.1763"  # of unmasked, which comes later
    assert "<dt>fvu</dt><dd>0.1775</dd>" in html
    assert (facts["tokens"], facts["revision"], facts["best"], facts["site"]) == ("522,208", "–", "yes", "resid_post.3")
    assert (facts["seed"], facts["schedule.warmup"], facts["resample_at"]) == ("0", "0.02", "[1, 2]")
    assert "<details><summary>Flags</summary>" in html
    heads = [re.findall('scope="col"[^>]*>([^<]*)<', table) for table in re.findall("<thead>.*?</thead>", html)]
    assert heads == [["", "fvu", "l0", "kl"], ["", "width", "codes.lasso"]]
    rows = re.findall('<tr><th scope="row">([^<]*)</th>(.*?)</tr>', html)
    cells = {name: re.findall("<td[^>]*>([^<]*)<", row) for name, row in rows}
    assert cells == {
        "pca": ["0.287", "35", "–"],
        "random": ["0.500", "–", "0.100"],
        "0": ["47", "0.990"],
        "1": ["48", "–"],
    }


def test_a_run_in_a_line(folder):
    assert repr(Run(folder)) == f"Run({str(folder)!r}, site=resid_post.3, dictionary=l1, fvu=0.1775, l0=34.55)"


def test_a_run_that_is_not_done(tmp_path):
    run = Run(write(tmp_path / "run", None))
    assert run.metrics == {}
    assert "no final figures yet" in run._repr_html_()


def test_runs_side_by_side(folder, tmp_path):
    other = Run(write(tmp_path / "other", {"fvu": 0.3, "name": "x"}))
    found = compare([Run(folder), other], ["fvu", "floors.pca.fvu", "name"])
    assert found.table.columns == ("run", "fvu", "floors.pca.fvu", "name")
    assert found.table.rows == ((str(folder), 0.17748, 0.2866, None), (str(other.path), 0.3, None, "x"))
    lines = repr(found).splitlines()
    assert [line.split()[1:] for line in lines] == [
        ["fvu", "floors.pca.fvu", "name"],
        ["0.1775", "0.2866", "–"],
        ["0.3", "–", "x"],
    ]
    assert re.findall("<td class=n>([^<]*)</td>", found._repr_html_()) == ["0.177", "0.287", "–", "0.300", "–", "x"]
    with pytest.raises(InputError, match="no run has f1: the first has site, dictionary"):
        compare([Run(folder), other], ["fvu", "f1"])


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        Run(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Run(tmp_path)
    (tmp_path / "metrics.json").write_text("[1]")
    with pytest.raises(InputError, match="no figures by name"):
        Run(tmp_path)
