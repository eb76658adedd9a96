"""The README's tables of dictionaries are what the committed results say."""

from pathlib import Path

import pytest

from benchmarks.quality_readme import OURS, Flags, main, ours_table, peers_table, with_tables
from benchmarks.quality_table import read_results
from benchmarks.quality_trial import ARCHITECTURES, OURS_ALONE
from sparse_jax.errors import InputError

ROOT = Path(__file__).parents[2]


def row(library, architecture, fvu):
    figures = {"l0": (32.0, 0.1), "raw_fvu": (fvu, 0.001), "fvu": (fvu, 0.001), "ce_increase": (0.05, 0.0)}
    return {"library": library, "architecture": architecture, "seeds": 3, "dead": (0.01, 0.0), **figures}


FLOORS = {f"{name} 32": {"fvu": 0.5, "ce_increase": 0.6} for name in ("pca", "neurons", "random")}


def test_the_readme_says_what_the_results_say():
    flags = Flags(results=ROOT / "benchmarks/quality_results", readme=ROOT / "README.md", check=True)
    assert read_results(flags.results)["rows"]
    assert main(flags) == 0


def test_rows_come_by_fvu_and_floors_last():
    results = {"rows": [row("sparse_jax", "standard", 0.2), row("sparse_jax", "topk", 0.1)], "floors": FLOORS}
    lines = ours_table(results).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == [
        f"`{OURS[name][0]}`" for name in ("topk", "standard")
    ]
    assert "0.1000 ± 0.0010" in lines[2]
    assert "| 1.0 % |" in lines[2]
    assert lines[-3].startswith("| PCA rotation, top 32")


def test_libraries_are_compared_only_where_all_have_been_run():
    rows = [row("sparse_jax", "topk", 0.1), row("saelens", "topk", 0.2), row("sparse_jax", "gated", 0.3)]
    assert "yet" in peers_table({"rows": rows, "floors": {}})
    rows.append(row("dictionary_learning", "topk", 0.3))
    lines = peers_table({"rows": rows, "floors": {}}).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| topk (3/3/3) | 32.0 | 0.1000 ± 0.0010 | 0.0500 ± 0.0000 | 32.0 | 0.2000 ± 0.0010 |")


def test_only_what_stands_between_the_marks_changes():
    text = "a\n<!-- ours: begin -->\nold\n<!-- ours: end -->\nb\n<!-- peers: begin -->\n<!-- peers: end -->\nc\n"
    results = {"rows": [row("sparse_jax", "topk", 0.1)], "floors": FLOORS}
    new = with_tables(text, results)
    assert new.startswith("a\n<!-- ours: begin -->\n| `train_sae ...`")
    assert "old" not in new
    assert new.endswith("<!-- peers: end -->\nc\n")
    assert with_tables(new, results) == new


def test_a_text_without_marks_is_refused():
    with pytest.raises(InputError, match="ours"):
        with_tables("nothing here", {"rows": [], "floors": FLOORS})


def test_every_architecture_has_its_flags():
    assert set(OURS) == {*ARCHITECTURES, *OURS_ALONE}
