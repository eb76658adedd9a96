"""benchmarks.quality from end to end with our own trainer, on a stream of a few thousand tokens."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import quality
from benchmarks.quality_measure import figures, held_out
from benchmarks.quality_stream import Stream, open_stream
from benchmarks.quality_table import print_table, read_results
from sparse_jax.errors import InputError
from sparse_jax.metrics import EvalBatch, Setting, evaluate
from sparse_jax.training import fit_floors

TOKENS = 40 * 1024


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    return quality.Flags(
        libraries=("sparse_jax",),
        architectures=("topk",),
        learning_rates=(1e-3, 3e-3),
        seeds=(0, 1),
        trial_tokens=20 * 1024,
        tokens=TOKENS,
        eval_tokens=2000,
        expansion=1,
        text="austen",
        eval_text="state-of-the-union",
        stream=folder / "stream",
        results=folder / "results",
    )


@pytest.fixture(scope="module")
def results(flags):
    quality.run_missing(flags)
    return read_results(flags.results)


def stored(flags, site):
    source = {"model": flags.model, "site": site, "text": flags.text, "eval_text": flags.eval_text}
    return open_stream(flags.stream, **source, tokens=TOKENS)


@pytest.mark.slow
def test_a_run_from_end_to_end(flags, results, capsys):
    (row,) = results["rows"]
    assert (row["library"], row["architecture"], row["seeds"]) == ("sparse_jax", "topk", 2)
    assert row["l0"][0] == pytest.approx(32, abs=0.5)
    assert 0 < row["fvu"][0] < 1
    assert row["tokens_evaluated"] >= 2000
    assert row["fvu"][1] > 0  # the seeds differ
    print_table(results)
    assert "pca 32" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_done_is_not_done_again(flags, results, monkeypatch):
    monkeypatch.setattr(quality, "train", lambda *_: pytest.fail("a finished run was repeated"))
    quality.run_missing(flags)
    assert read_results(flags.results) == results
    # A run without a result is done again.
    (flags.results / "sparse_jax/topk/seed-1/metrics.json").unlink()
    with pytest.raises(pytest.fail.Exception, match="repeated"):
        quality.run_missing(flags)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"l0": 16.0}, {"learning_rates": (5e-4,)}, {"expansion": 2}])
def test_results_of_other_flags_are_refused(flags, results, change):
    with pytest.raises(InputError, match="is of another"):
        quality.run_missing(dataclasses.replace(flags, trial_tokens=20 * 1024, **change))


@pytest.mark.slow
def test_figures_are_those_of_the_library_s_own_evaluation(flags, results):
    stream = stored(flags, flags.site)
    held = held_out(flags.model, flags.site, flags.text, flags.eval_text, 2000, 256, flags.stream / "held.npz")
    floors = fit_floors(stream.statistics, jnp.array(stream.x[:1024]), 16, 64, seed=0)
    mean = stream.statistics.mean
    ours = figures(held, floors["pca"].params, mean)
    batch = EvalBatch(*(jnp.array(a) for a in (held.tokens, held.targets, held.mask)))
    whole = evaluate(
        held.lm, Setting(held.site), [batch], {"dictionary": floors["pca"]}, mean=mean, outlier_norm=np.inf
    ).figures
    for name in ("l0", "fvu", "ce_increase", "ce_clean", "tokens_evaluated"):
        assert ours[name] == pytest.approx(whole[name], rel=1e-4), name


@pytest.mark.slow
def test_a_stream_of_something_else_is_refused(flags, results):
    with pytest.raises(InputError, match="holds the stream"):
        stored(flags, "resid_post.2")


def test_the_stream_is_the_same_bytes_for_all_and_each_seed_has_its_order(tmp_path):
    rows = np.arange(8 * 1024, dtype=np.float32)[:, None]
    stream = Stream(rows, rows[:8], None, {})
    orders = [[int(stream.batch_of(seed)(step)[0, 0]) // 1024 for step in range(8)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"libraries": ("torch",)}, "--libraries torch"),
        ({"architectures": ("sparse",)}, "--architectures sparse"),
        ({"tokens": 1000}, "multiples of 1024"),
        ({"trial_tokens": 5 * TOKENS}, "no longer than the stream"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_made(flags, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        quality.main(dataclasses.replace(flags, stream=tmp_path / "none", results=tmp_path / "none", **change))
    assert not (tmp_path / "none").exists()


def test_a_table_of_nothing(tmp_path, capsys):
    print_table(json.loads(json.dumps(read_results(tmp_path))))
    assert "0 minutes" in capsys.readouterr().out
