"""The whole experiment on a tiny model: what it leaves behind, what it refuses, killing it and resuming it."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import command, contexts, run_folder, train_sae, train_sae_run
from experiments.train_sae import Flags
from sparse_jax.activations import Statistics
from sparse_jax.dictionaries import DICTIONARIES, L1, load, read_card
from sparse_jax.errors import InputError
from sparse_jax.training.loop import run as take_steps
from tests.experiments.conftest import write_model

ROOT = Path(__file__).parents[2]
FIGURES = """
    tokens_trained tokens_evaluated fvu explained_variance l0 l1 ce_clean ce_spliced ce_increase ce_zero ce_mean
    ce_recovered kl dead_fraction tokens_per_second seconds model site floors mask unmasked shrinkage perplexity_clean
    perplexity_spliced perplexity_increase dense_fraction
""".split()


def flags(model_folder, text_file, out, **changes) -> Flags:
    fields = {
        "model": str(model_folder), "text": str(text_file),
        "out": Path(out), "site": "resid_post.0", "context": 32, "batch": 128,
        "block_rows": 16, "tokens": 8192, "eval_tokens": 2048, "statistics_tokens": 2048, "holdout": 0.2,
        "report_features": 4, "compute_dtype": "float32", "log_every": 5, "checkpoint_every": 7, "reuse_memory": False,
    }  # fmt: skip
    return Flags(**{"dictionary": L1(expansion=2, l1=0.5), **fields, **changes})


def as_arguments(given, *dictionary: str) -> list[str]:
    """The same flags for a command line, before those of the dictionary: by default of the one above."""
    plain = {
        name: getattr(given, name) for name in given.__dataclass_fields__ if name not in ("dictionary", "schedule")
    }
    arguments = []
    for name, value in plain.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None and value != ():
            arguments += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    return [*arguments, *(dictionary or ("l1", "--expansion", "2", "--l1", "0.5"))]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train_sae", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def params(out: Path) -> dict[str, np.ndarray]:
    (path,) = out.glob("dictionaries/*/params.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train_sae.main(flags(model, text, out)) == 0
    return out


KINDS = (
    "l1",
    "lp",
    "gated",
    "jump-relu",
    "topk",
    "batch-topk",
    "matryoshka",
    "multi-topk",
    "matching-pursuit",
    "fista",
    "lista",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_trains_is_saved_and_read_again(kind, model, text, tmp_path, capsys):
    """With features started again half-way, and L0 held where there is a coefficient to move."""
    architecture = DICTIONARIES[kind]
    k = {"k": 4} if "k" in architecture.__dataclass_fields__ else {}
    held = {} if k else {"target_l0": 6.0}
    given = dataclasses.replace(
        flags(model, text, tmp_path / "run", resample_at=(0.5,), dead_window=200, **held),
        dictionary=architecture(expansion=2, **k),
    )
    assert train_sae.main(given) == 0
    final = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert final["dictionary"] == kind
    assert np.isfinite([final["fvu"], final["l0"], final["ce_increase"]]).all()
    assert final["l0"] > 0
    trained = load(tmp_path / "run")
    assert trained.dictionary.kind == kind
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if "resampled" in event] == [32]
    assert any("coefficient" in event for event in events) == bool(held)
    assert contexts.train_flags(tmp_path / "run") == given_as_resolved(given)
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()


def given_as_resolved(given: Flags) -> Flags:
    return dataclasses.replace(given, bos="none")


def test_the_kinds_are_those_that_can_be_trained():
    assert set(KINDS) == set(DICTIONARIES) - {"pca", "neurons", "random"}


@pytest.mark.slow
def test_a_run_leaves_all_that_is_promised(finished, model, text, capsys):
    final = json.loads((finished / "metrics.json").read_text())
    assert not [name for name in FIGURES if name not in final]
    assert set(final["floors"]) == {"pca", "neurons", "random", "token_mean"}
    for floor in final["floors"].values():
        assert {"fvu", "l0", "ce_increase"} <= set(floor)
    assert final["tokens_trained"] == pytest.approx(8192, rel=0.05)
    assert final["tokens_trained"] < 8192  # the mask drops the first position of each row
    config = json.loads((finished / "config.json").read_text())
    assert config["flags"]["dictionary"]["kind"] == "l1"
    assert config["resolved"]["dictionary"]["n_features"] == 32
    assert (config["flags"]["bos"], config["resolved"]["bos"]) == ("none", "none")  # what "auto" came to
    card = read_card(finished)["provenance"]
    assert (card["site"], card["skip_positions"], card["max_norm"]) == ("resid_post.0", 1, None)
    steps = [json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, *range(5, 65, 5), 64]
    page = (finished / "report.html").read_text()
    assert "feature" in page
    ratio = Statistics.load(finished / "statistics.npz").mean_over_std
    assert final["mean_over_std"] == pytest.approx(ratio)
    assert f"centre-scale; raw ||mean|| / ||std|| {ratio:.3f}" in page
    assert load(finished).dictionary.n_features == 32
    assert not list(finished.rglob("*.tmp*"))


@pytest.fixture
def before_the_first_step(monkeypatch):
    """What the loop is given when it starts: (step, b_dec, raw rows of block 0 that count, normaliser) of each run."""
    seen = []

    def watched(state, step, blocks, *others, **options):
        rows = np.asarray(blocks[0].x, np.float64)[np.asarray(blocks[0].weight) > 0]
        seen.append((int(state.step), np.array(state.params["b_dec"]), rows, jax.tree.map(np.array, state.normaliser)))
        return take_steps(state, step, blocks, *others, **options)

    monkeypatch.setattr(train_sae_run, "take_steps", watched)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("normalise", ["scale", "centre-scale"])
@pytest.mark.parametrize("rule", ["zero", "mean", "geometric-median"])
def test_the_decoder_bias_starts_where_it_is_told_to(
    rule, normalise, before_the_first_step, model, text, tmp_path, capsys
):
    given = flags(
        model, text, tmp_path / "run", decoder_bias_start=rule, normalise=normalise, tokens=1024, report_features=0,
        statistics_tokens=512,
    )  # fmt: skip
    assert train_sae.main(given) == 0
    ((step, b_dec, rows, normaliser),) = before_the_first_step
    x = (rows - normaliser.centre) / normaliser.scale
    assert step == 0
    if rule == "zero":
        np.testing.assert_array_equal(b_dec, np.zeros(16))
    elif rule == "mean":  # of the very rows that the normaliser is fitted on
        np.testing.assert_allclose(b_dec, x.mean(0), atol=1e-5)
        assert (np.linalg.norm(b_dec) < 1e-4) == (normalise == "centre-scale")
    else:
        difference = x - b_dec
        slope = (difference / np.linalg.norm(difference, axis=1, keepdims=True)).mean(0)
        assert np.linalg.norm(slope) < 1e-4
        assert np.linalg.norm(b_dec - x.mean(0)) > 1e-2
    ratio = Statistics.load(tmp_path / "run" / "statistics.npz").mean_over_std
    said = {"zero": "zero", "mean": "the mean", "geometric-median": "the geometric median"}[rule]
    printed = capsys.readouterr().out
    assert f"||mean|| / ||std|| {ratio:.3f} over " in printed
    assert f"normaliser {normalise}, decoder bias starts at {said}\n" in printed


@pytest.mark.slow
def test_a_started_bias_is_not_started_again_on_resume(before_the_first_step, model, text, tmp_path, monkeypatch):
    """Stopped before the first step and within the run, with outliers masked: the same bits as in one go."""
    common = {"decoder_bias_start": "geometric-median", "normalise": "scale", "tokens": 1536, "report_features": 0}
    common |= {"drop_outliers": True}
    assert train_sae.main(flags(model, text, tmp_path / "whole", **common)) == 0
    out = tmp_path / "stopped"
    for steps in (0, 5, None):  # how many are taken before the run is asked to stop
        asked = iter(range(100))
        with monkeypatch.context() as patch:
            if steps is not None:
                patch.setattr(command.StopRequest, "__call__", lambda self, n=steps, i=asked: next(i) >= n)
            code = train_sae.main(flags(model, text, out, resume=steps != 0, **common))
        assert code == (0 if steps is None else command.EXIT_INTERRUPTED)
    whole, fresh, again, later = before_the_first_step
    assert [whole[0], fresh[0], again[0], later[0]] == [0, 0, 0, 5]
    np.testing.assert_array_equal(whole[1], fresh[1])
    np.testing.assert_array_equal(whole[1], again[1])
    assert np.abs(later[1] - whole[1]).max() > 1e-4  # it has learned since
    one, two = params(tmp_path / "whole"), params(out)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.slow
def test_a_used_folder_is_refused_and_flags_must_match_on_resume(finished, model, text):
    with pytest.raises(InputError, match="already holds a run"):
        train_sae.main(flags(model, text, finished))
    with pytest.raises(InputError, match="seed: 0 there, 1 now"):
        train_sae.main(flags(model, text, finished, resume=True, seed=1))
    with pytest.raises(InputError, match="give one of them"):
        train_sae.main(flags(model, text, finished, resume=True, overwrite=True))
    assert (finished / "metrics.json").exists()


@pytest.mark.parametrize("changes", [{}, {"overwrite": True}])
def test_a_second_writer_is_refused_before_it_removes_or_writes_anything(changes, model, text, tmp_path):
    out = tmp_path / "run"
    with run_folder.hold(out):
        (out / "metrics.json").write_text("of the first") if changes else None
        with pytest.raises(InputError, match=f"is being written by process {os.getpid()} on"):
            train_sae.main(flags(model, text, out, **changes))
        assert sorted(path.name for path in out.iterdir()) == (["metrics.json"] if changes else []) + ["writer.lock"]


@pytest.mark.slow
def test_a_run_killed_at_a_random_step_and_resumed_ends_with_the_same_bits(finished, model, text, tmp_path):
    out = tmp_path / "killed"
    given = flags(model, text, out)
    process = start(as_arguments(given))
    kill_after = random.SystemRandom().randint(8, 55)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        log = out / "metrics.jsonl"
        if log.exists() and log.read_text().count("\n") and _last_step(log) >= kill_after:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / "metrics.jsonl").exists(), "the run never reached its first step"
    output, _ = start(_with_resume(given)).communicate(timeout=240)
    assert "report:" in output, output
    one, two = params(finished), params(out)
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=f"{name}, killed after step {kill_after}")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def _last_step(log: Path) -> int:
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return json.loads(lines[-1])["step"]


def _with_resume(given: Flags) -> list[str]:
    return ["--resume" if argument == "--no-resume" else argument for argument in as_arguments(given)]


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_cleanly(model, text, tmp_path):
    out = tmp_path / "stopped"
    given = flags(model, text, out, tokens=400_000, checkpoint_every=100_000)
    process = start(as_arguments(given))
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == command.EXIT_INTERRUPTED, output
    assert "Traceback" not in output
    assert "continue with --resume" in output
    saved = [int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(saved) >= 1
    assert not (out / "metrics.json").exists()


BAD = {
    "unknown model": ({"model": "no-such-model"}, "neither embedded"),
    "missing model folder": ({"model": "./nowhere/model"}, "does not exist"),
    "missing text": ({"text": "nowhere.txt"}, "nowhere.txt"),
    "unknown site": ({"site": "residual.0"}, "give NAME.LAYER"),
    "site that the family lacks": ({"site": "resid_mid.0"}, "in parallel"),
    "layer out of range": ({"site": "resid_post.2"}, "layers 0 to 1"),
    "pattern has no width": ({"site": "attn_pattern.0"}, "no fixed width"),
    "tokens below a batch": ({"tokens": 100}, "below one batch"),
    "batch that does not fit a block": ({"batch": 100}, "does not divide"),
    "context beyond the model": ({"context": 128}, "at most 64 positions"),
    "a decoder bias that is not there": (
        {"dictionary": L1(decoder_bias=False), "decoder_bias_start": "mean", "model": "no-such-model"},
        "no decoder bias",
    ),
    "a rule that is not there": ({"decoder_bias_start": "median", "model": "no-such-model"}, "geometric-median"),
    "negative learning rate": ({"learning_rate": -1.0}, "positive"),
    "revision of a local model": ({"revision": "step0"}, "revision"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(case, model, text, tmp_path):
    changes, words = BAD[case]
    with pytest.raises(InputError) as caught:
        train_sae.main(flags(model, text, tmp_path / "out", **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_and_a_short_text_are_refused(model, tmp_path):
    for name, content in (("empty.txt", ""), ("short.txt", "a few words")):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError):
            train_sae.main(flags(model, tmp_path / name, tmp_path / "out"))


def test_an_unwritable_folder_is_refused(model, text, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot be written|is a file"):
            train_sae.main(flags(model, text, out))


def test_a_truncated_weight_file_is_refused(text, tmp_path):
    folder = write_model(tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut short"):
        train_sae.main(flags(folder, text, tmp_path / "out"))


def test_activations_that_are_not_finite_are_named(text, tmp_path):
    folder = write_model(tmp_path / "nan", poison="gpt_neox.layers.0.mlp.dense_4h_to_h.weight")
    with pytest.raises(InputError, match=r"not finite \(block 0, row \d+ of the text, position 0, token id \d+\)"):
        train_sae.main(flags(folder, text, tmp_path / "out"))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_an_overwritten_folder_keeps_what_is_not_ours(model, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="layers 0 to 1"):
        train_sae.main(flags(model, text, out, overwrite=True, site="resid_post.5"))
    assert (out / "config.json").exists(), "nothing is removed before the flags are known to be good"


@pytest.mark.slow
def test_the_command_line_says_errors_in_one_line(model, text, tmp_path):
    given = flags(model, text, tmp_path / "out", site="resid_post.9")
    process = start(as_arguments(given))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == command.EXIT_BAD_INPUT
    assert output.startswith("error: site resid_post.9")
    assert output.count("\n") == 1
    process = start(["--debug" if a == "--no-debug" else a for a in as_arguments(given)])
    output, _ = process.communicate(timeout=120)
    assert "Traceback" in output


@pytest.mark.parametrize(
    "arguments", [["--no-such-flag", "l1"], ["l2"], ["--tokens", "many", "l1"], ["l1", "--l1", "-1"]]
)
def test_wrong_flags_end_with_code_2_and_no_traceback(arguments):
    process = start(arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == command.EXIT_BAD_INPUT, output
    assert "Traceback" not in output


@pytest.mark.slow
def test_contexts_of_a_finished_run(finished, capsys):
    assert contexts.main(contexts.Flags(run=finished, count=3)) == 0
    printed = capsys.readouterr().out
    assert printed.count("=== dictionary") == 4  # the features of the report
    assert printed.count("[[") >= 4
    assert contexts.main(contexts.Flags(run=finished, basis="neurons", features=(3,), k=2, count=5, at_least=0.5)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "[[" in line]
    assert len(lines) == 5
    assert all(float(line.split()[0]) >= 0.5 for line in lines)
    with pytest.raises(InputError, match="numbers 0 to 31"):
        contexts.main(contexts.Flags(run=finished, features=(32,)))
    with pytest.raises(InputError, match="holds no run"):
        contexts.main(contexts.Flags(run=finished / "nowhere"))
