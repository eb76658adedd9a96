"""Harvesting a store and training from it: the same bits as without, faults that leave whole shards, refusals."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import contexts, harvest, perplexity, sweep, train_sae
from experiments.data import load_data
from sparse_jax.activations import open_store
from sparse_jax.errors import InputError
from tests.experiments.conftest import write_model
from tests.experiments.test_sweep import flags as sweep_flags
from tests.experiments.test_train_sae import flags as train_flags
from tests.experiments.test_train_sae import params

ROOT = Path(__file__).parents[2]


def flags(model, text, out, **changes) -> harvest.Flags:
    fields = {
        "model": str(model), "text": str(text), "out": Path(out), "sites": ("resid_post.0",), "context": 32,
        "holdout": 0.2, "compute_dtype": "float32", "shard_rows": 64, "reuse_memory": False,
    }  # fmt: skip
    return harvest.Flags(**{**fields, **changes})


def from_store(given, store, **changes):
    """Flags of training, the model and text left to the store."""
    defaults = type(given).__dataclass_fields__
    plain = {name: defaults[name].default for name in ("model", "text", "context", "holdout")}
    return dataclasses.replace(given, **{**plain, "store": Path(store), **changes})


@pytest.fixture(scope="module")
def store(model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "whole"
    assert harvest.main(flags(model, text, out, sites=("resid_post.0", "mlp_out.1"))) == 0
    return out


def rows_of(model, text):
    return load_data(train_flags(model, text, "unused", bos="none"), "resid_post.0")[0].train


def test_the_store_holds_every_row_of_the_training_text_once(store, model, text):
    due, found = rows_of(model, text), open_store(store)
    assert len(found) == len(due)
    for one, other in zip(found[:], due[:]):
        assert np.array_equal(one, other)
    assert tuple(found.documents.values()) == due.documents
    assert found.damage() == []
    identity = found.manifest.identity
    assert identity["rows"].startswith("joined documents, no begin-of-text token")
    assert {"weights_sha256", "tokenizer_sha256", "text_fingerprint", "side", "compute_dtype"} <= set(identity)
    assert harvest.main(harvest.Flags(check=True, out=store)) == 0


@pytest.mark.slow
def test_training_from_a_store_ends_with_the_bits_of_training_without(store, model, text, tmp_path):
    given = train_flags(model, text, tmp_path / "streamed", tokens=4096, eval_tokens=512, report_features=0)
    assert train_sae.main(given) == 0
    stored = from_store(given, store, out=tmp_path / "stored")
    assert train_sae.main(stored) == 0
    one, other = params(tmp_path / "streamed"), params(tmp_path / "stored")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    figures = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("streamed", "stored")]
    assert figures[0]["fvu"] == figures[1]["fvu"]
    assert figures[0]["ce_increase"] == figures[1]["ce_increase"]
    # What reads the run later has its model and text.
    assert contexts.train_flags(tmp_path / "stored").text == str(text)
    resumed = dataclasses.replace(stored, resume=True)
    assert train_sae.main(resumed) == 0


@pytest.mark.slow
def test_a_sweep_from_a_store_ends_with_the_bits_of_one_without(store, model, text, tmp_path):
    smaller = {"seeds": (0,), "sparsities": (2.0,), "measure_at": (1.0,), "tokens": 2048, "eval_tokens": 512}
    given = sweep_flags(model, text, tmp_path / "streamed", sites=("resid_post.0", "mlp_out.1"), **smaller)
    assert sweep.main(given) == 0
    assert sweep.main(from_store(given, store, out=tmp_path / "stored")) == 0
    streamed = sorted((tmp_path / "streamed").glob("dictionaries/**/params.safetensors"))
    assert len(streamed) > 1
    for path in streamed:
        other = tmp_path / "stored" / path.relative_to(tmp_path / "streamed")
        assert path.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_perplexity_takes_model_and_text_of_a_store(store, tmp_path):
    given = perplexity.Flags(store=store, tokens=640, out=tmp_path / "perplexity")
    assert perplexity.main(given) == 0
    final = json.loads((tmp_path / "perplexity" / "metrics.json").read_text())
    identity = open_store(store).manifest.identity
    assert [final[name] for name in ("model", "text", "context")] == [
        identity[name] for name in ("model", "text", "context")
    ]


def test_codes_of_a_dictionary_are_stored_beside_the_site(model, text, tmp_path):
    assert train_sae.main(train_flags(model, text, tmp_path / "run", tokens=2048, report_features=0)) == 0
    given = flags(model, text, tmp_path / "store", sites=(), codes=(tmp_path / "run",), slots=16, tokens=2048)
    assert harvest.main(given) == 0
    assert [entry.name for entry in open_store(tmp_path / "store").manifest.entries] == ["codes.resid_post.0"]
    codes = open_store(tmp_path / "store").codes("codes.resid_post.0", np.arange(4))
    assert codes.values.shape == codes.indices.shape == (4, 32, 16)
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="trained on"):
        harvest.main(dataclasses.replace(given, model=str(other), out=tmp_path / "other-store"))
    with pytest.raises(InputError, match="has nothing of resid_post"):
        train_sae.main(from_store(train_flags(model, text, tmp_path / "b"), tmp_path / "store"))


def test_prompts_stand_in_rows_of_their_own(model, tmp_path, capsys):
    given = flags(model, "truthfulqa-six-shot", tmp_path / "store", context=64, tokens=64 * 64)
    assert harvest.main(given) == 0
    shown = capsys.readouterr().out
    assert "training prompts, as many shots up to 6 as fit in 64 tokens" in shown
    found = open_store(tmp_path / "store")
    assert found.manifest.identity["rows"].startswith("documents apart")
    assert all(name.startswith("truthfulqa/") for name in found.documents.values())
    batch = found[np.arange(64)]
    for row in batch.document:
        assert len(set(row.tolist()) - {-1}) == 1
    for wrong in ({"packing": "joined"}, {"eval_text": "austen"}):
        with pytest.raises(InputError, match="truthfulqa"):
            harvest.main(dataclasses.replace(given, out=tmp_path / "x", **wrong))


# Faults


def start(given: harvest.Flags) -> subprocess.Popen:
    arguments = []
    for name in given.__dataclass_fields__:
        value, option = getattr(given, name), f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(option if value else f"--no-{option[2:]}")
        elif value is not None and value != ():
            arguments += [option, *map(str, value if isinstance(value, tuple) else (value,))]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.harvest", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "ignore"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def assert_same_store(one: Path, other: Path) -> None:
    """Every row is in both, once, with the same tokens, documents and activations."""
    one, other = open_store(one), open_store(other)
    assert len(one) == len(other)
    assert one.damage() == other.damage() == []
    for left, right in zip(one[:], other[:]):
        assert np.array_equal(left, right)
    for entry in one.manifest.entries:
        site, numbers = entry.name, np.arange(len(one))
        np.testing.assert_array_equal(one.activations(site, numbers), other.activations(site, numbers))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_harvest_that_is_killed_goes_on_and_ends_with_the_same_store(number, store, model, text, tmp_path):
    given = flags(model, text, tmp_path / "killed", sites=("resid_post.0", "mlp_out.1"))
    process = start(given)
    deadline = time.monotonic() + 120
    while not list((given.out / "shards").glob("[0-9]*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    time.sleep(random.random() * 0.3)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    # It may have ended before, or be past the part that a signal asks to end.
    assert process.returncode in (0, 130, -number)
    assert (process.returncode == 130) == ("go on with --resume" in output)
    with pytest.raises(InputError, match="already holds a store"):
        harvest.main(given)
    assert harvest.main(dataclasses.replace(given, resume=True)) == 0
    assert_same_store(given.out, store)
    assert not list((given.out / "shards").glob("*tmp*"))


@pytest.mark.slow
def test_four_processes_make_one_store(store, model, text, tmp_path):
    given = flags(model, text, tmp_path / "four", sites=("resid_post.0", "mlp_out.1"), processes=4)
    started = [start(dataclasses.replace(given, process=process)) for process in range(4)]
    for process in started:
        assert (process.communicate(timeout=240)[0], process.returncode)[1] == 0
    assert_same_store(given.out, store)


def test_damage_is_named_and_made_good(store, model, text, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    path = copy / "shards" / "00002" / "resid_post.0.values.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    assert harvest.main(harvest.Flags(check=True, out=copy)) == 1
    assert "00002 is damaged: row 191 of resid_post.0.values.npy" in capsys.readouterr().out
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match="00002 is damaged"):
        train_sae.main(from_store(train_flags(model, text, tmp_path / "run"), copy))
    again = flags(model, text, copy, sites=("resid_post.0", "mlp_out.1"), resume=True)
    assert harvest.main(again) == 0
    assert_same_store(copy, store)


def test_a_text_that_stops_leaves_whole_shards_and_goes_on(store, model, text, tmp_path):
    broken = tmp_path / "words.jsonl"
    whole = [json.dumps({"text": document}) for document in text.read_text().split("<|endoftext|>")]
    broken.write_text("\n".join([*whole[:20], "{"]))
    given = flags(model, broken, tmp_path / "store", window_rows=64, shard_rows=32)
    with pytest.raises(InputError, match=r"after \d+ rows of text: line 21 .*is not JSON"):
        harvest.main(given)
    part = open_store(tmp_path / "store", unfinished=True)
    assert len(part) >= 64
    assert part.damage() == []
    with pytest.raises(InputError, match="unfinished"):
        train_sae.main(from_store(train_flags(model, text, tmp_path / "run"), tmp_path / "store"))
    # Mended, it is another text: a store is of one.
    broken.write_text("\n".join(whole))
    with pytest.raises(InputError, match="text_fingerprint"):
        harvest.main(dataclasses.replace(given, resume=True))


class Hub:
    """A dataset of the hub that loses its connection after `until` examples."""

    def __init__(self, documents, until=None):
        self.documents, self.until = documents, until

    def __iter__(self):
        for number, document in enumerate(self.documents):
            if number == self.until:
                raise ConnectionError("connection reset by peer")
            yield {"text": document}


def test_a_dataset_stream_that_stops_goes_on_and_every_row_is_there_once(model, text, tmp_path, monkeypatch):
    import datasets

    contents = text.read_text().split("<|endoftext|>")
    given = flags(model, "hub:someone/words", tmp_path / "store", window_rows=48, shard_rows=32)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Hub(contents, until=15))
    with pytest.raises(InputError, match=r"after \d+ rows of text: .*connection reset by peer"):
        harvest.main(given)
    before = open_store(given.out, unfinished=True)
    assert 0 < len(before) < 400
    with pytest.raises(InputError, match="already holds a store"):
        harvest.main(given)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Hub(contents))
    assert harvest.main(dataclasses.replace(given, resume=True)) == 0
    found = open_store(given.out)
    assert found.manifest.window_rows == 48
    # By token and document, against the same text read whole.
    due = rows_of(model, text)
    assert len(found) == len(due)
    assert np.array_equal(found[:].tokens, due[:].tokens)
    assert np.array_equal(found[:].document, due[:].document)
    # A run on the stream sees the stored rows in the same order, in and beyond the first epoch.
    (data,) = load_data(train_flags(model, "hub:someone/words", "unused", window_rows=48, bos="none"), "resid_post.0")
    for start in (0, 37, 600, 1300):
        assert np.array_equal(data.train.ordered(3, start, 40), found.ordered(3, start, 40))
    assert data.train.n_rows == len(found)


@pytest.mark.slow
def test_training_on_a_stream_and_from_its_store_ends_with_the_same_bits(model, text, tmp_path):
    given = train_flags(model, text, tmp_path / "a", tokens=4096, eval_tokens=512, report_features=0, window_rows=40)
    assert train_sae.main(given) == 0
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["epochs"] is None
    assert harvest.main(flags(model, text, tmp_path / "store", window_rows=40)) == 0
    assert train_sae.main(from_store(given, tmp_path / "store", out=tmp_path / "b", window_rows=None)) == 0
    one, other = params(tmp_path / "a"), params(tmp_path / "b")
    assert all(np.array_equal(one[name], other[name]) for name in one)


# Refusals


def test_a_store_of_other_things_is_refused(store, model, text, tmp_path):
    given = from_store(train_flags(model, text, tmp_path / "run"), store)
    for wrong, words in (
        ({"context": 64}, "--context 64: the store in .* was made with 32"),
        ({"model": str(tmp_path)}, "--model"),
        ({"site": "resid_post.1"}, "has nothing of resid_post.1"),
        ({"store": tmp_path}, "holds no activation store"),
    ):
        with pytest.raises(InputError, match=words):
            train_sae.main(dataclasses.replace(given, **wrong))
    assert not (tmp_path / "run").exists()
    # The model changes under the store.
    moved = tmp_path / "moved"
    shutil.copytree(store, moved)
    other = write_model(tmp_path / "other", seed=1)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["identity"]["model"] = str(other)
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="made with another model"):
        train_sae.main(dataclasses.replace(given, store=moved))


def test_held_out_documents_can_be_stored_but_not_trained_on(model, text, tmp_path):
    assert harvest.main(flags(model, text, tmp_path / "held", side="evaluation", tokens=1024)) == 0
    with pytest.raises(InputError, match="holds evaluation documents"):
        train_sae.main(from_store(train_flags(model, text, tmp_path / "run"), tmp_path / "held"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"tokens": 8}, "below one row"),
        ({"tokens": 0}, "positive"),
        ({"process": 2, "processes": 2}, "give 0 to 1"),
        ({"processes": 2, "overwrite": True}, "remove it first"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"resume": True}, "no store that could be resumed"),
        ({"stride": 40}, "--stride 40: give 1 to 32"),
        ({"window_rows": 0}, "--window-rows 0"),
        ({"sites": ("resid_post.0", "blocks.0.hook_resid_post")}, "given twice"),
        ({"sites": ("resid_post.9",)}, "layers 0 to 1"),
        ({"sites": ("attn_pattern.0",)}, "no fixed width"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(model, text, tmp_path, wrong, words):
    with pytest.raises(InputError, match=words):
        harvest.main(flags(model, text, tmp_path / "store", **wrong))
    assert not (tmp_path / "store").exists()


def test_a_folder_of_other_things_is_not_written_into(model, text, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="something else than a store"):
        harvest.main(flags(model, text, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
