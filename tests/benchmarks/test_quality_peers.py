"""The peers' own trainers, driven by `benchmarks.quality_peers`: they learn, repeat, and what comes out is theirs."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.quality_trial import ARCHITECTURES, BATCH, Trial, WithinAQuarter
from sparse_jax.errors import InputError

pytestmark = pytest.mark.torch

WIDTH, N, STEPS, K = 16, 64, 32, 4
LIBRARIES = ("dictionary_learning", "saelens")
# What each must scale in a run of 32 steps.
_PENALISED = ("warmup_steps", "sparsity_warmup_steps")
_K_SPARSE = ("warmup_steps", "threshold_start_step", "1 - threshold_beta", "dead_feature_threshold")
_BATCH_TOPK = ("topk_threshold_lr", "dead_feature_window")
SCALED = {
    "dictionary_learning": {
        "standard": _PENALISED,
        "gated": _PENALISED,
        "jump-relu": _PENALISED,
        "topk": _K_SPARSE,
        "batch-topk": _K_SPARSE,
        "matryoshka": _K_SPARSE,
    },
    "saelens": {
        "standard": ("dead_feature_window",),
        "gated": ("dead_feature_window",),
        "jump-relu": ("dead_feature_window",),
        "topk": ("dead_feature_window",),
        "batch-topk": _BATCH_TOPK,
        "matryoshka": _BATCH_TOPK,
    },
}


@pytest.fixture(scope="module")
def peers():
    """The module under test; what the libraries warn of while they are imported is their own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LIBRARIES:
            pytest.importorskip(f"benchmarks.quality_{name}", exc_type=ImportError)
        return pytest.importorskip("benchmarks.quality_peers")


def _stream(n_batches=8):
    """Sums of a few of 32 directions, beside a mean, in raw units far from 1."""
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(32, WIDTH))
    rows = n_batches * BATCH
    codes = generator.exponential(size=(rows, 32)) * (generator.random((rows, 32)) < 0.1)
    return (3 * (codes @ directions + generator.normal(size=WIDTH))).astype(np.float32)


STREAM = _stream()


def batch_of(step):
    start = step * BATCH % len(STREAM)
    return STREAM[start : start + BATCH]


def train(peers, library, architecture, steps=STEPS, seed=0, learning_rate=1e-2):
    sparsity = K if (library, architecture) in peers.SPARSITY_IS_L0 else peers.FIRST_SPARSITY[library, architecture]
    norms = np.linalg.norm(STREAM, axis=1)
    return peers.train(
        Trial(library, architecture, learning_rate, float(sparsity), steps, seed),
        batch_of,
        width=WIDTH,
        n_features=N,
        mean=STREAM.mean(axis=0),
        mean_norm=float(norms.mean()),
        mean_square=float(np.mean(norms**2)),
    )


def fvu(trained):
    error = STREAM - np.asarray(trained.reconstruct(jnp.array(STREAM)))
    return np.sum(error**2) / np.sum((STREAM - STREAM.mean(axis=0)) ** 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_it_learns_and_repeats(peers, library, architecture):
    """A learning rate of next to nothing shows the start."""
    out, start = (train(peers, library, architecture, learning_rate=rate) for rate in (1e-2, 1e-9))
    assert fvu(out.trained) < 0.9 * fvu(start.trained)
    assert set(out.scaled) == set(SCALED[library][architecture])
    assert out.seconds > 0
    assert np.asarray(out.trained.normaliser.centre).tolist() == [0] * WIDTH
    again, other = train(peers, library, architecture), train(peers, library, architecture, seed=1)
    for name, value in out.trained.params.items():
        np.testing.assert_array_equal(value, again.trained.params[name])
    assert np.any(out.trained.params["W_dec"] != other.trained.params["W_dec"])


@pytest.mark.parametrize("library", LIBRARIES)
def test_l0_is_what_was_asked_for(peers, library):
    for architecture in ("topk", "batch-topk", "matryoshka"):
        codes = np.asarray(train(peers, library, architecture, steps=128).trained.encode(jnp.array(STREAM)))
        assert 0.7 * K < np.count_nonzero(codes) / len(codes) < 1.4 * K


def test_dictionary_learning_is_as_by_its_train_sae(peers, monkeypatch):
    """The same weights as from `trainSAE`, the norm of activations being given to both."""
    training = pytest.importorskip("dictionary_learning.training", exc_type=ImportError)
    from benchmarks import quality_dictionary_learning as driven

    torch = pytest.importorskip("torch")
    ours = train(peers, "dictionary_learning", "batch-topk")
    trial, caught = Trial("dictionary_learning", "batch-topk", 1e-2, K, STEPS, 0), {}

    def caught_trainer():
        caught["trainer"], _ = driven.trainer(trial, WIDTH, N, WithinAQuarter(STEPS))
        return caught["trainer"]

    scale = float(np.sqrt(np.mean(np.sum(STREAM**2, axis=1))))
    monkeypatch.setattr(training, "get_norm_factor", lambda data, steps: scale)
    data = [torch.tensor(batch_of(step)) for step in range(STEPS)]
    training.trainSAE(data, [{"trainer": caught_trainer}], STEPS, normalize_activations=True, device="cpu")
    theirs = caught["trainer"].ae
    assert float(theirs.threshold) == pytest.approx(scale * float(ours.trained.params["threshold"]), rel=1e-6)
    np.testing.assert_allclose(theirs.encoder.weight.detach().numpy().T, ours.trained.params["W_enc"], rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gated", "matryoshka"])
def test_saelens_is_as_by_its_fit(peers, architecture):
    """The same weights as from `SAETrainer.fit`, which folds the scale in at the end."""
    torch = pytest.importorskip("torch")
    from benchmarks import quality_saelens as driven

    ours = train(peers, "saelens", architecture)
    knob = float(K) if architecture == "matryoshka" else peers.FIRST_SPARSITY["saelens", architecture]
    trial = Trial("saelens", architecture, 1e-2, knob, STEPS, 0)
    data = iter([torch.tensor(batch_of(step)) for step in range(STEPS)])
    mean_norm = float(np.linalg.norm(STREAM, axis=1).mean())
    theirs = driven.trainer(trial, WIDTH, N, mean_norm, WithinAQuarter(STEPS), data)[0].fit()
    x = batch_of(0)
    x_hat = theirs.decode(theirs.encode(torch.tensor(x))).detach().numpy()
    if architecture == "gated":
        np.testing.assert_allclose(x_hat, ours.trained.reconstruct(x), atol=1e-4 * np.abs(x_hat).max())
    else:
        # Their training class still selects over the batch; its threshold is in raw units.
        scale = float(ours.trained.normaliser.scale)
        assert float(theirs.topk_threshold) == pytest.approx(scale * float(ours.trained.params["threshold"]), rel=1e-5)
    np.testing.assert_allclose(theirs.b_dec.detach().numpy(), scaled_b_dec(ours.trained), rtol=1e-4, atol=1e-4)


def scaled_b_dec(trained):
    return np.asarray(trained.params["b_dec"]) * float(trained.normaliser.scale)


def test_windows_and_schedules_reach_the_trainers(peers):
    """A quarter of the run is 8 steps; the learning rate ends at 0, by way of a half amid the last fifth."""
    from benchmarks import quality_dictionary_learning, quality_saelens

    steps = 32
    for architecture in ARCHITECTURES:
        trial = Trial("dictionary_learning", architecture, 1e-2, K, steps, 0)
        made, _ = quality_dictionary_learning.trainer(trial, WIDTH, N, WithinAQuarter(steps))
        rate = made.scheduler.lr_lambdas[0]
        # decay_start is int(0.8 * 32) = 25.
        assert [rate(step) for step in (0, 4, 8, 24, 29, steps)] == [0, 0.5, 1, 1, 3 / 7, 0]
        if architecture in ("topk", "batch-topk", "matryoshka"):
            assert (made.dead_feature_threshold, made.threshold_start_step) == (8 * BATCH, 8)
            assert made.threshold_beta == 1 - 1 / 8
        else:
            assert (made.sparsity_warmup_fn(4), made.sparsity_warmup_fn(8)) == (0.5, 1)

    for architecture in ARCHITECTURES:
        trial = Trial("saelens", architecture, 1e-2, K, steps, 0)
        made, _ = quality_saelens.trainer(trial, WIDTH, N, 1.0, WithinAQuarter(steps))
        assert made.cfg.dead_feature_window == 8
        assert made.cfg.total_training_steps == steps
        made.optimizer.step()
        rates = []
        for _ in range(steps):
            rates.append(made.lr_scheduler.get_last_lr()[0] / 1e-2)
            made.lr_scheduler.step()
        np.testing.assert_allclose([rates[0], rates[25], rates[29]], [1, 1, 0.5], rtol=1e-6)
        assert made.lr_scheduler.get_last_lr() == [pytest.approx(0, abs=1e-9)]
        warm_up = {name: scheduler.warm_up_steps for name, scheduler in made.coefficient_schedulers.items()}
        due = {"standard": {"l1": 1}, "gated": {"l1": 1}, "jump-relu": {"l0": steps}}
        assert warm_up == due.get(architecture, {})


def test_what_a_run_has_room_for_is_left_alone():
    within = WithinAQuarter(4000)
    assert within.in_steps("warm-up", 1000) == 1000
    assert within.in_tokens("window", 1_000_000) == 1_000_000
    assert within.newest_weight("average", 0.001) == 0.001
    assert within.scaled == {}
    assert within.in_tokens("window", 10_000_000) == 1_024_000
    assert within.in_steps("warm-up", 2000) == 1000
    assert within.newest_weight("average", 0.0005) == 0.001
    assert within.scaled == {
        "window": "10000000 -> 1024000 tokens",
        "warm-up": "2000 -> 1000 steps",
        "average": "0.0005 -> 0.001 (an average over 2000 -> 1000 steps)",
    }


def test_a_wrong_conversion_is_refused(peers):
    """One feature's bias, a rescaled decoder, and a threshold that moves many codes."""
    out = train(peers, "dictionary_learning", "batch-topk")
    x = batch_of(0)
    codes, x_hat = np.asarray(out.trained.encode(x)), np.asarray(out.trained.reconstruct(x))
    peers.check(out.trained, x, 2 * codes, x_hat, unit=2.0)
    loudest = int(np.argmax(codes.sum(axis=0)))
    for name, change in (
        ("b_enc", lambda value: value.at[loudest].add(0.01)),
        ("W_dec", lambda value: 1.001 * value),
        ("threshold", lambda value: 1.2 * value),
    ):
        broken = type(out.trained)(
            out.trained.dictionary,
            {**out.trained.params, name: change(out.trained.params[name])},
            out.trained.normaliser,
        )
        with pytest.raises(RuntimeError, match="not the library's dictionary"):
            peers.check(broken, x, codes, x_hat, unit=1.0)


@pytest.mark.parametrize(
    "wrong", [{"library": "sklearn"}, {"architecture": "pca"}, {"steps": 3}, {"library": "sparse_jax"}]
)
def test_errors_say_what_to_do(peers, wrong):
    given = {"library": "saelens", "architecture": "topk", "steps": 32} | wrong
    with pytest.raises(InputError, match=r"choose|at least"):
        peers.train(
            Trial(learning_rate=1e-3, sparsity=4, seed=0, **given), batch_of,
            width=WIDTH, n_features=N, mean=STREAM.mean(axis=0), mean_norm=1.0, mean_square=1.0,
        )  # fmt: skip
