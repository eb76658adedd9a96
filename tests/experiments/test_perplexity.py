"""The loss of a tiny model on a tiny text, with and without a dictionary in it, against NumPy; and what is refused."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tqdm

from experiments import command, perplexity
from experiments.data import weights_sha256
from experiments.perplexity import Flags
from sparse_jax.activations import Statistics
from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries import Neurons, Normalised, save
from sparse_jax.errors import InputError
from sparse_jax.lm import forward, load, load_tokenizer
from sparse_jax.lm.documents import documents
from sparse_jax.lm.embedded import MODELS
from sparse_jax.lm.packing import pack
from tests.experiments.conftest import write_model

ROOT = Path(__file__).parents[2]
SITE, WIDTH, CONTEXT, TOKENS = "resid_post.0", 16, 32, 640
N_ROWS = TOKENS // CONTEXT
LOSSES = ("nats_per_token", "nats_per_token_standard_error", "perplexity", "bits_per_byte")


@pytest.fixture
def flags(model, text, tmp_path) -> Flags:
    return Flags(model=str(model), text=str(text), context=CONTEXT, tokens=TOKENS, out=tmp_path / "run")


def run(flags: Flags, **changes) -> dict:
    """The figures of a run."""
    flags = dataclasses.replace(flags, overwrite=True, **changes)
    assert perplexity.main(flags) == 0
    return json.loads((flags.out / "metrics.json").read_text())


def write_dictionary(folder: Path, model: Path, *, k=WIDTH, width=WIDTH, site=SITE, **provenance) -> Path:
    """Neurons of which each token keeps the k largest: all of them are the identity."""
    dictionary = Neurons(n_features=width, d_in=width, d_out=width, k=k)
    normaliser = Normaliser(jnp.zeros(width), jnp.ones(()))
    card = {"model": str(model), "site": site, "weights_sha256": weights_sha256(str(model), None), **provenance}
    save(folder, Normalised(dictionary, dictionary.fit(jnp.zeros(width)), normaliser), card)
    return folder


def packed(flags: Flags, **options):
    return pack(documents(flags.text), load_tokenizer(flags.model), CONTEXT, limit=flags.tokens, **options)


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def nats_of(log_p: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]


def bytes_of(flags: Flags, targets: np.ndarray) -> int:
    """Of the text that the targets spell; it is ASCII, and id 0 stands between documents."""
    return len("".join(load_tokenizer(flags.model).token_strings(targets[targets != 0])))


def by_hand(nats: np.ndarray, n_bytes: int) -> dict[str, float]:
    """`nats [rows, predictions]`."""
    rows = nats.mean(1)
    return {
        "nats_per_token": nats.mean(),
        "nats_per_token_standard_error": np.sqrt(((rows - rows.mean()) ** 2).sum() / (len(rows) - 1) / len(rows)),
        "perplexity": np.exp(nats.mean()),
        "bits_per_byte": nats.sum() / np.log(2) / n_bytes,
    }


# The clean loss


def test_the_figures_are_those_of_numpy_on_the_same_rows(flags):
    found = run(flags)
    tokens, targets, _, _ = packed(flags)[:]
    nats = nats_of(log_softmax(forward(load(flags.model), tokens).logits), targets)
    n_bytes = bytes_of(flags, targets)
    assert {name: found[name] for name in LOSSES} == pytest.approx(by_hand(nats, n_bytes), rel=1e-5)
    assert (found["tokens"], found["bytes"], found["rows"]) == (TOKENS, n_bytes, N_ROWS)
    assert found["documents"] == len(packed(flags).documents)
    # Each token is predicted once, in its order, separators too.
    stream = packed(flags).stream
    assert targets.reshape(-1).tolist() == stream[1:].tolist()


def test_a_row_behind_a_begin_of_text_token_predicts_its_own_tokens_once(flags):
    found = run(flags, bos="row")
    rows = packed(flags, bos="row")
    tokens = rows[:].tokens
    assert (tokens[:, 0] == 0).all()
    own = tokens[:, 1:]
    assert own.reshape(-1).tolist() == rows.stream[: own.size].tolist()
    nats = nats_of(log_softmax(forward(load(flags.model), tokens).logits)[:, :-1], own)
    assert {name: found[name] for name in LOSSES} == pytest.approx(by_hand(nats, bytes_of(flags, own)), rel=1e-5)
    assert found["tokens"] == N_ROWS * (CONTEXT - 1)


def test_skipped_positions_do_not_count(flags):
    found = run(flags, skip_positions=5)
    tokens, targets, _, _ = packed(flags)[:]
    nats = nats_of(log_softmax(forward(load(flags.model), tokens).logits), targets)[:, 5:]
    assert {name: found[name] for name in LOSSES} == pytest.approx(
        by_hand(nats, bytes_of(flags, targets[:, 5:])), rel=1e-5
    )
    assert found["tokens"] == N_ROWS * (CONTEXT - 5)


@pytest.mark.parametrize("batch_rows", [7, 1000])
def test_the_figures_do_not_depend_on_the_batch(flags, tmp_path, model, batch_rows):
    dictionary = write_dictionary(tmp_path / "dictionary", model, k=4)
    one, other = (run(flags, dictionary=dictionary, batch_rows=rows) for rows in (10, batch_rows))
    for name in (*LOSSES, "tokens", "bytes", "rows"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)
    for name in ("nats_per_token", "ce_increase", "kl", "fvu", "l0", "replaced_tokens"):
        assert one["dictionary"][name] == pytest.approx(other["dictionary"][name], rel=1e-4)


def test_one_row_has_no_standard_error_and_the_limit_is_in_tokens(flags, capsys):
    found = run(flags, tokens=CONTEXT)
    assert (found["rows"], found["tokens"], found["nats_per_token_standard_error"]) == (1, CONTEXT, None)
    assert "clean" in capsys.readouterr().out
    assert run(flags, tokens=TOKENS + CONTEXT - 1)["tokens"] == TOKENS


def test_all_of_a_text_is_read_and_what_was_left_open_is_in_the_config(flags, model):
    found = run(flags, tokens=None, context=None)
    config = json.loads((flags.out / "config.json").read_text())
    assert (config["flags"]["context"], config["flags"]["bos"]) == (64, "none")
    assert (found["context"], found["bos"]) == (64, "none")
    assert found["tokens"] == pack(documents(flags.text), load_tokenizer(model), 64).n_tokens
    assert found["documents"] == 30
    identity = {"model", "revision", "weights_sha256", "tokenizer_sha256", "text", "text_fingerprint", "context", "bos"}
    assert set(config["resolved"]) == identity
    assert set(found) == identity | {*LOSSES, "tokens", "bytes", "rows", "documents", "seconds"}
    assert not list(flags.out.glob("*.tmp*"))


def test_the_embedded_model_on_austen(flags):
    found = run(flags, model="novel-neox", text="austen", tokens=5120, context=None)
    assert found["context"] == 256
    tokens, targets, _, _ = pack(documents("austen"), load_tokenizer(MODELS["novel-neox"]), 256)[:20]
    nats = nats_of(log_softmax(forward(load("novel-neox"), tokens).logits), targets)
    assert found["nats_per_token"] == pytest.approx(nats.mean(), rel=1e-5)
    # The whole text has 3.75761 (tests/lm/test_clean_loss.py); a part of it is near.
    assert abs(found["nats_per_token"] - 3.75761) < 5 * found["nats_per_token_standard_error"] < 0.5


# With a dictionary


def replaced_by_hand(flags: Flags, value, where) -> tuple[np.ndarray, np.ndarray]:
    """`[rows, position]` nats and KL from the clean run with the site set to `value` at `where`."""
    tokens, targets, _, _ = packed(flags)[:]
    lm = load(flags.model)
    clean = log_softmax(forward(lm, tokens).logits)
    # The site is the stream between the two layers.
    stream = np.where(where[..., None], value, forward(lm, tokens, stop=1).residual)
    log_p = log_softmax(forward(lm, jnp.array(stream, jnp.float32), start=1).logits)
    return nats_of(log_p, targets), (np.exp(clean) * (clean - log_p)).sum(-1)


def activations_of(flags: Flags) -> np.ndarray:
    return np.asarray(forward(load(flags.model), packed(flags)[:].tokens, capture=[SITE]).captured[SITE], np.float64)


def test_a_dictionary_that_is_the_identity_costs_nothing(flags, model, tmp_path):
    found = run(flags, dictionary=write_dictionary(tmp_path / "dictionary", model))
    assert found["dictionary"]["ce_increase"] == pytest.approx(0, abs=1e-5)
    assert found["dictionary"]["kl"] == pytest.approx(0, abs=1e-5)
    assert found["dictionary"]["fvu"] == pytest.approx(0, abs=1e-10)
    assert found["dictionary"]["l0"] == WIDTH
    assert set(found["floors"]) == {"zero_ablation"}
    # The model itself gives the same with the dictionary beside it as without.
    clean = run(flags)
    assert found["nats_per_token"] == pytest.approx(clean["nats_per_token"], rel=1e-6)


@pytest.mark.parametrize("skip", [None, 3])
def test_figures_with_the_site_replaced_are_those_of_numpy(flags, model, tmp_path, skip):
    told = {} if skip is None else {"skip_positions": skip}
    folder = write_dictionary(tmp_path / "dictionary", model, k=3, **told)
    found = run(flags, dictionary=folder)
    x, where = activations_of(flags), packed(flags, skip_positions=1 if skip is None else skip)[:].mask
    kept = np.abs(x) >= np.sort(np.abs(x), axis=-1)[..., -3:-2]
    clean, _ = replaced_by_hand(flags, x, np.zeros_like(where))
    for name, value in (("dictionary", np.where(kept, x, 0)), ("zero", np.zeros_like(x))):
        nats, kl = replaced_by_hand(flags, value, where)
        figures = found["dictionary"] if name == "dictionary" else found["floors"]["zero_ablation"]
        expected = by_hand(nats, found["bytes"])
        assert {key: figures[key] for key in LOSSES} == pytest.approx(expected, rel=1e-5)
        assert figures["ce_increase"] == pytest.approx((nats - clean).mean(), rel=1e-4)
        error = (nats - clean).mean(1).std(ddof=1) / np.sqrt(N_ROWS)
        assert figures["ce_increase_standard_error"] == pytest.approx(error, rel=1e-4)
        assert figures["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    x_hat, x = np.where(kept, x, 0)[where], x[where]
    fvu = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert found["dictionary"]["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert found["dictionary"]["l0"] == 3
    assert found["dictionary"]["replaced_tokens"] == where.sum() < TOKENS


def test_tokens_above_the_norm_that_training_masked_are_left_alone(flags, model, tmp_path):
    x, where = activations_of(flags), packed(flags)[:].mask
    norms = np.linalg.norm(x, axis=-1)
    limit = float(np.median(norms[where]))
    found = run(flags, dictionary=write_dictionary(tmp_path / "dictionary", model, k=3, max_norm=limit))
    assert abs(found["dictionary"]["replaced_tokens"] - (where & (norms <= limit)).sum()) <= 1
    assert found["dictionary"]["max_norm"] == limit


def test_the_mean_of_the_run_folder_is_a_floor(flags, model, tmp_path):
    folder, mean = tmp_path / "trained", np.arange(WIDTH) / 4
    write_dictionary(folder / "dictionaries" / SITE, model)
    empty = np.zeros((1, WIDTH))
    Statistics(1, mean, np.eye(WIDTH), 1.0, empty, np.zeros(1, np.int64)).save(folder / "statistics.npz")
    nats, _ = replaced_by_hand(flags, np.broadcast_to(mean, (N_ROWS, CONTEXT, WIDTH)), packed(flags)[:].mask)
    for path in (folder, folder / "dictionaries" / SITE):
        found = run(flags, dictionary=path)["floors"]["mean_ablation"]
        assert found["nats_per_token"] == pytest.approx(nats.mean(), rel=1e-5)
    (folder / "statistics.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="cannot be read"):
        run(flags, dictionary=folder)


def test_every_site_with_a_vector_per_token_can_be_replaced(flags, model, tmp_path):
    for site in ("attn_z.1", "mlp_in.1"):
        found = run(flags, dictionary=write_dictionary(tmp_path / site, model, site=site))
        assert found["dictionary"]["ce_increase"] == pytest.approx(0, abs=1e-5)
        assert found["floors"]["zero_ablation"]["kl"] > 1e-3


def test_a_dictionary_of_another_model_is_refused_unless_it_is_allowed(flags, model, tmp_path):
    other = write_model(tmp_path / "other", seed=1)
    dictionary = write_dictionary(tmp_path / "dictionary", other)
    with pytest.raises(InputError, match=r"was trained on .* with weights .* --allow-other-model") as caught:
        run(flags, dictionary=dictionary)
    assert "\n" not in str(caught.value)
    assert not flags.out.exists()
    assert run(flags, dictionary=dictionary, allow_other_model=True)["dictionary"]["l0"] == WIDTH
    # A card that does not know the weights cannot disagree.
    unknown = write_dictionary(tmp_path / "unknown", other, weights_sha256=None)
    assert run(flags, dictionary=unknown)["dictionary"]["l0"] == WIDTH


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 8}, "reads 8 and writes 8 numbers, site resid_post.0 of this model has 16"),
        ({"site": "mlp_hidden.0"}, "site mlp_hidden.0 of this model has 32"),
        ({"site": "resid_post.2"}, "layers 0 to 1"),
        ({"site": "resid_mid.0"}, "in parallel"),
        ({"site": "attn_pattern.0"}, "no fixed width"),
        ({"site": None}, "does not say which site"),
        ({"skip_positions": CONTEXT}, "skip_positions"),
        ({"max_norm": 0.0}, "no position is replaced"),
    ],
)
def test_a_dictionary_that_does_not_fit_is_refused(flags, model, tmp_path, changes, words):
    with pytest.raises(InputError) as caught:
        run(flags, dictionary=write_dictionary(tmp_path / "dictionary", model, **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (flags.out / "metrics.json").exists()


# What is refused, and ending early

BAD = {
    "unknown model": ({"model": "no-such-model"}, "neither embedded"),
    "missing text": ({"text": "nowhere.txt"}, "nowhere.txt"),
    "context beyond the model": ({"context": 65}, "at most 64 positions"),
    "no token": ({"tokens": 0}, "positive"),
    "less than a row": ({"tokens": CONTEXT - 1}, "give at least 32 tokens"),
    "no row in a batch": ({"batch_rows": 0}, "positive"),
    "negative positions": ({"skip_positions": -1}, "0 or more"),
    "all positions skipped": ({"skip_positions": CONTEXT}, "leaves none of the 32"),
    "all positions of a row with BOS skipped": ({"skip_positions": 31, "bos": "row"}, "leaves none of the 31"),
    "split of a file": ({"split": "test"}, "only hub datasets have splits"),
    "endless dataset": ({"text": "hub:owner/name", "tokens": None}, "may have no end"),
    "no dictionary": ({"dictionary": Path("nowhere")}, "holds no dictionary"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(case, flags):
    changes, words = BAD[case]
    with pytest.raises(InputError) as caught:
        perplexity.main(dataclasses.replace(flags, **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not flags.out.exists()


def test_a_used_folder_is_refused_without_overwrite_and_kept_when_input_is_bad(flags):
    run(flags)
    with pytest.raises(InputError, match=r"already holds a run .*: give --overwrite or another --out$"):
        perplexity.main(flags)
    with pytest.raises(InputError, match="at most 64 positions"):
        perplexity.main(dataclasses.replace(flags, overwrite=True, context=65))
    assert (flags.out / "metrics.json").exists()


def test_losses_that_are_not_finite_are_named(flags, tmp_path):
    folder = write_model(tmp_path / "nan", poison="gpt_neox.layers.0.mlp.dense_4h_to_h.weight")
    with pytest.raises(InputError, match=r"the loss \(clean\) is not finite in batch 0"):
        run(flags, model=str(folder))
    assert not (flags.out / "metrics.json").exists()


def test_ctrl_c_ends_with_code_130_and_without_figures(flags, monkeypatch, capsys, request):
    class Interrupted(tqdm.tqdm):
        def update(self, n=1):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(tqdm, "tqdm", Interrupted)
    # Under a shell that started the tests in the background the signal would be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    arguments = ["--model", flags.model, "--text", flags.text, "--context", "32", "--out", str(flags.out)]
    monkeypatch.setattr(sys, "argv", ["perplexity", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main(Flags, perplexity.main)
    assert ended.value.code == command.EXIT_INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert (flags.out / "config.json").exists()
    assert not (flags.out / "metrics.json").exists()


def test_help_does_not_wait_for_jax():
    code = "import sys, experiments.perplexity; sys.exit(any(name in sys.modules for name in ('jax', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
