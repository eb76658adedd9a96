"""SAELens 6.54 and dictionary_learning 0.1, run live: the same weights give the same codes, reconstructions and losses.

Where a peer's loss is another one, the test names the place in its source and gives the formula between the two.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Batch, Context, Normalised
from sparse_jax.dictionaries.aux_k import aux_k_loss
from sparse_jax.dictionaries.batch_topk import BatchTopK
from sparse_jax.dictionaries.gated import Gated
from sparse_jax.dictionaries.jump_relu import JumpReLU
from sparse_jax.dictionaries.matching_pursuit import MatchingPursuit
from sparse_jax.dictionaries.matryoshka import Matryoshka
from sparse_jax.dictionaries.topk import TopK
from sparse_jax.formats import load_saelens, saelens, save_saelens

pytestmark = pytest.mark.torch

ROWS, D, N, K = 48, 12, 40, 3
SITE = {"model": "pythia-70m", "site": "resid_post.3", "context": 128, "bos": "none", "skip_positions": 1}


def imported(name):
    """A peer's module; what it warns of while it is imported is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


@pytest.fixture(scope="module")
def torch():
    return imported("torch")


@pytest.fixture(scope="module")
def saes(torch):
    return imported("sae_lens.saes")


@pytest.fixture(scope="module")
def trainers(torch):
    imported("dictionary_learning")
    return {name: imported(f"dictionary_learning.trainers.{name}") for name in TRAINERS}


TRAINERS = ("standard", "gdm", "jumprelu", "top_k", "batch_top_k", "matryoshka_batch_top_k")

KINDS = {
    "l1": L1(n_features=N, norm_weighted=True, decoder_norm=0.3),
    "l1 without centring": L1(n_features=N, centring=False),
    "tied l1": L1(n_features=N, tied=True),
    "gated": Gated(n_features=N),
    "gated without centring": Gated(n_features=N, centring=False),
    "jump-relu": JumpReLU(n_features=N),
    "centred jump-relu": JumpReLU(n_features=N, centring=True),
    "topk": TopK(n_features=N, k=K),
    "batch-topk": BatchTopK(n_features=N, k=K),
    "matryoshka": Matryoshka(n_features=N, k=K, prefixes=(0.25, 0.5, 1.0)),
}
NORMALISER = Normaliser(jnp.arange(D, dtype=jnp.float32), jnp.float32(2.5))
SCALE_ONLY = Normaliser(jnp.zeros(D), jnp.float32(2.5))


def made(dictionary):
    """A dictionary with every parameter away from where it starts, on its constraint; and its parameters."""
    dictionary, generator = dictionary.sized(D), np.random.default_rng(0)
    params = {
        name: value + jnp.array(0.2 * generator.normal(size=value.shape), jnp.float32)
        for name, value in dictionary.init(jax.random.key(0)).items()
    }
    if "threshold" in params:
        params["threshold"] = jnp.float32(0.9)
    if "log_threshold" in params:
        params["log_threshold"] = jnp.array(np.log(generator.uniform(0.5, 1.5, size=N)), jnp.float32)
    return dictionary, dictionary.project(params)


def normalised_batch():
    return jnp.array(np.random.default_rng(1).normal(size=(ROWS, D)), jnp.float32)


def numpy(tensor):
    return tensor.detach().cpu().numpy()


def assert_close(theirs, ours):
    """To 1e-5 of the largest entry."""
    theirs, ours = (numpy(a) if hasattr(a, "detach") else np.asarray(a) for a in (theirs, ours))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5 * max(np.abs(ours).max(), 1e-3))


def ours(dictionary, params, x, coefficients=None, dead=None, grads=False):
    """Our losses on a batch, and gradients if asked for."""
    dead = np.zeros(N, bool) if dead is None else dead
    given = {**dictionary.coefficients, **(coefficients or {})}
    context = Context(
        {name: jnp.float32(value) for name, value in given.items()},
        jnp.where(dead, 2000, 0),
        jax.random.key(0),
        jnp.int32(0),
        jnp.int32(1000),
    )
    batch = Batch(x, x, jnp.ones(len(x)))
    if grads:
        return dictionary.value_and_grad(params, batch, context)[1:]
    return dictionary.loss(params, batch, context)


def silent_features(dictionary, params, x):
    """Features that are active on no row of the batch by the training rule: they may be called dead."""
    dead = np.asarray(ours(dictionary, params, x).fired) == 0
    assert 2 <= dead.sum() < N
    return dead


# SAELens: files and inference.


@pytest.mark.parametrize("normaliser", [NORMALISER, SCALE_ONLY], ids=["centre and scale", "scale"])
@pytest.mark.parametrize("kind", KINDS)
def test_saelens_reads_what_we_write_and_we_what_it_writes(tmp_path, torch, saes, kind, normaliser):
    trained = Normalised(*made(KINDS[kind]), normaliser)
    x = normaliser.undo(normalised_batch())
    codes, x_hat = trained.encode(x), trained.reconstruct(x)
    assert ROWS < np.count_nonzero(codes) < codes.size
    save_saelens(tmp_path / "ours", trained, SITE, "fold")
    theirs = saes.SAE.load_from_disk(tmp_path / "ours")
    assert (theirs.cfg.metadata.hook_name, theirs.cfg.metadata.prepend_bos) == ("blocks.3.hook_resid_post", False)
    assert_close(theirs.encode(torch.tensor(np.array(x))), codes)
    assert_close(theirs(torch.tensor(np.array(x))), x_hat)
    theirs.save_model(tmp_path / "theirs")
    again, provenance = load_saelens(tmp_path / "theirs")
    assert provenance == SITE
    assert_close(again.encode(x), codes)
    assert_close(again.reconstruct(x), x_hat)


@pytest.mark.parametrize("normaliser", [NORMALISER, SCALE_ONLY], ids=["centre and scale", "scale"])
@pytest.mark.parametrize("kind", [*KINDS, "matching-pursuit"])
def test_a_normaliser_that_is_kept_is_their_activation_scaler(tmp_path, torch, saes, kind, normaliser):
    scaler = imported("sae_lens.training.activation_scaler").ActivationScaler()
    dictionary = KINDS.get(kind, MatchingPursuit(n_features=N, k=K))
    trained = Normalised(*made(dictionary), normaliser)
    x = normaliser.undo(normalised_batch())
    save_saelens(tmp_path, trained, SITE, "keep")
    theirs = saes.SAE.load_from_disk(tmp_path)
    scaler.load(tmp_path / saelens.SCALER)
    codes = theirs.encode(scaler.scale(torch.tensor(np.array(x))))
    assert_close(codes, trained.encode(x))
    assert_close(scaler.unscale(theirs.decode(codes)), trained.reconstruct(x))


CHECKPOINTS = {
    "standard": {},
    "gated": {},
    "jumprelu": {"jumprelu_init_threshold": 0.4},
    "topk": {"k": K},
    "batchtopk": {"k": 2.5},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [10, 20, N]},
}


@pytest.mark.parametrize("centring", [True, False])
@pytest.mark.parametrize("architecture", CHECKPOINTS)
def test_we_read_their_checkpoints_and_their_final_files(tmp_path, torch, saes, architecture, centring):
    """The default of their TopK family, to rescale by decoder norms, with norms that are not 1."""
    theirs = training(saes, torch, architecture, apply_b_dec_to_input=centring, **CHECKPOINTS[architecture])
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        if "batchtopk" in architecture:
            theirs.topk_threshold += 0.2
    theirs.save_model(tmp_path / "checkpoint")
    theirs.save_inference_model(tmp_path / "final")
    final, x = saes.SAE.load_from_disk(tmp_path / "final"), normalised_batch()
    codes = final.encode(torch.tensor(np.array(x)))
    assert 0 < int((codes != 0).sum()) < codes.numel()
    for folder in ("checkpoint", "final"):
        trained, _ = load_saelens(tmp_path / folder)
        assert_close(codes, trained.encode(x))
        assert_close(final.decode(codes), trained.reconstruct(x))


# SAELens: losses.


def training(saes, torch, architecture, params=None, **options):
    """One of their training classes, with our parameters."""
    name = {
        "standard": "Standard",
        "gated": "Gated",
        "jumprelu": "JumpReLU",
        "topk": "TopK",
        "batchtopk": "BatchTopK",
        "matryoshka_batchtopk": "MatryoshkaBatchTopK",
    }[architecture]
    config = getattr(saes, f"{name}TrainingSAEConfig")(d_in=D, d_sae=N, **options)
    sae = getattr(saes, f"{name}TrainingSAE")(config)
    for key, value in (params or {}).items():
        value = torch.tensor(np.array(value))
        if key == "log_threshold":
            sae.threshold.data = value.exp()
        elif key != "threshold":
            getattr(sae, key).data = value
    return sae


def train_step(saes, torch, sae, x, coefficients=None, dead=None):
    """Their losses on a batch, as numbers, and the whole output."""
    step_input = imported("sae_lens.saes.sae").TrainStepInput(
        sae_in=torch.tensor(np.array(x)),
        coefficients=coefficients or {},
        dead_neuron_mask=None if dead is None else torch.tensor(dead),
        n_training_steps=0,
        is_logging_step=False,
    )
    output = sae.training_forward_pass(step_input)
    return {name: float(value.detach()) for name, value in output.losses.items()}, output


@pytest.mark.parametrize("centring", [True, False])
def test_saelens_standard(torch, saes, centring):
    dictionary, params = made(L1(n_features=N, norm_weighted=True, decoder_norm=0.3, centring=centring))
    x = normalised_batch()
    sae = training(saes, torch, "standard", params, apply_b_dec_to_input=centring)
    theirs, output = train_step(saes, torch, sae, x, {"l1": 1.7})
    losses, grads = ours(dictionary, params, x, {"l1": 1.7}, grads=True)
    assert_close(theirs["mse_loss"], losses.terms["reconstruction"])
    assert_close(theirs["l1_loss"], losses.terms["l1"])
    output.loss.backward()
    for name, grad in grads.items():
        assert_close(getattr(sae, name).grad, grad)


@pytest.mark.parametrize("centring", [True, False])
def test_saelens_gated(torch, saes, centring):
    """The losses are ours; gradients of the decoder are not.

    The paper's auxiliary reconstruction is by a copy of the decoder that learns nothing from it, and its penalty does
    not know the decoder. `GatedTrainingSAE.calculate_aux_loss` (sae_lens/saes/gated_sae.py) detaches neither W_dec nor
    b_dec and weighs by the norms of W_dec: its decoder also learns to reconstruct from gates, against the magnitudes.
    """
    dictionary, params = made(Gated(n_features=N, centring=centring))
    x = normalised_batch()
    sae = training(saes, torch, "gated", params, apply_b_dec_to_input=centring)
    theirs, output = train_step(saes, torch, sae, x, {"l1": 1.7})
    losses, grads = ours(dictionary, params, x, {"l1": 1.7}, grads=True)
    assert_close(theirs["mse_loss"], losses.terms["reconstruction"])
    assert_close(theirs["l1_loss"], losses.terms["l1"])
    assert_close(theirs["auxiliary_reconstruction_loss"], losses.terms["auxiliary"])
    output.loss.backward()
    opened = jax.nn.relu(dictionary.gates_and_codes(params, x)[0])

    def not_detached(W_dec, b_dec):
        weighted = jnp.mean(jnp.sum(opened * jnp.linalg.norm(W_dec, axis=1), axis=1))
        return 1.7 * weighted + jnp.mean(jnp.sum((opened @ W_dec + b_dec - x) ** 2, axis=1))

    extra = dict(zip(("W_dec", "b_dec"), jax.grad(not_detached, argnums=(0, 1))(params["W_dec"], params["b_dec"])))
    for name, grad in grads.items():
        assert_close(getattr(sae, name).grad, grad + extra.get(name, 0))
        assert name not in extra or np.abs(extra[name]).max() > 0.1 * np.abs(grad).max()


def jump_relu(penalty, **options):
    """With thresholds above half the kernel's width, where the ReLU before our jump makes no difference."""
    return made(JumpReLU(n_features=N, penalty=penalty, target_l0=8.0, bandwidth=0.6 / np.sqrt(D), **options))


@pytest.mark.parametrize("penalty", ["step", "tanh"])
def test_saelens_jump_relu(torch, saes, penalty):
    dictionary, params = jump_relu(penalty)
    x = normalised_batch()
    sae = training(
        saes, torch, "jumprelu", params, apply_b_dec_to_input=False, jumprelu_sparsity_loss_mode=penalty,
        jumprelu_bandwidth=dictionary.kernel_width, pre_act_loss_coefficient=0.01 if penalty == "tanh" else None,
    )  # fmt: skip
    # Their pre_act_loss is of dead features only, Anthropic's and ours of all: say that all are dead.
    theirs, output = train_step(saes, torch, sae, x, {"l0": 1.7}, np.ones(N, bool))
    coefficients = {"l0": 1.7} | ({"pre_act": 0.01} if penalty == "tanh" else {})
    losses, grads = ours(dictionary, params, x, coefficients, grads=True)
    assert_close(theirs["mse_loss"], losses.terms["reconstruction"])
    assert_close(theirs["l0_loss"], losses.terms["l0"])
    if penalty == "tanh":
        assert_close(theirs["pre_act_loss"], losses.terms["pre_act"])
    output.loss.backward()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert_close(getattr(sae, name).grad, grads[name])
    # They train the threshold itself, we its logarithm.
    assert_close(sae.threshold.grad * sae.threshold, grads["log_threshold"])


def test_saelens_quadratic_penalty_adds_the_variance_of_l0(torch, saes):
    """Theirs is the mean over rows of 2 / target (L0 - target)^2, ours (mean L0 / target - 1)^2:

    theirs = 2 target (ours + variance of L0 over rows / target^2)
    """
    dictionary, params = jump_relu("quadratic")
    x = normalised_batch()
    sae = training(
        saes, torch, "jumprelu", params, apply_b_dec_to_input=False, jumprelu_sparsity_loss_mode="quadratic",
        jumprelu_bandwidth=dictionary.kernel_width, target_l0=8.0,
    )  # fmt: skip
    theirs, _ = train_step(saes, torch, sae, x, {"l0": 1.7})
    losses = ours(dictionary, params, x, {"l0": 1.7})
    variance = np.var(np.count_nonzero(dictionary.encode(params, x), axis=1))
    assert_close(theirs["l0_loss"], 2 * 8 * (losses.terms["l0"] + 1.7 * variance / 8**2))


def error_variance(x, y_hat):
    error = np.asarray(x - y_hat, np.float64)
    return np.mean(np.sum((error - error.mean(axis=0)) ** 2, axis=1))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("n_dead", [2, 100])
def test_saelens_topk_family(torch, saes, architecture, n_dead):
    """AuxK: ours = coefficient d theirs / (min(1, dead / (d / 2)) variance of the error).

    `calculate_topk_aux_loss` (sae_lens/saes/topk_sae.py) does not divide by the variance of the error ("without
    variance normalization", its comment says), so that revival fades as the reconstruction improves, and scales it
    down while few are dead, which the paper does not do.
    """
    kind, options = {
        "topk": ("topk", {"k": K}),
        "batchtopk": ("batch-topk", {"k": float(K)}),
        "matryoshka_batchtopk": ("matryoshka", {"k": float(K), "matryoshka_widths": [10, 20, N]}),
    }[architecture]
    dictionary, params = made(KINDS[kind])
    x = normalised_batch()
    dead = silent_features(dictionary, params, x)
    dead &= np.cumsum(dead) <= n_dead
    sae = training(saes, torch, architecture, params, aux_loss_coefficient=0.7, **options)
    theirs, output = train_step(saes, torch, sae, x, dead=dead)
    losses = ours(dictionary, params, x, {"aux_k": 0.7}, dead)
    np.testing.assert_array_equal(numpy(output.feature_acts > 0).sum(axis=0), losses.fired)
    assert_close(theirs["mse_loss"], losses.terms["reconstruction"])
    scale = min(1, dead.sum() / (D // 2))
    assert (scale < 1) == (n_dead == 2)
    converted = D * theirs["auxiliary_reconstruction_loss"] / (scale * error_variance(x, losses.y_hat))
    assert losses.terms["aux_k"] > 0
    assert_close(converted, losses.terms["aux_k"])
    if architecture == "matryoshka_batchtopk":
        assert_close(theirs["inner_mse_loss_10"] + theirs["inner_mse_loss_20"], losses.terms["prefixes"])
    if architecture != "topk":
        # Their mean of thresholds begins at 0 (sae_lens/saes/batchtopk_sae.py): after t steps that 0 still weighs
        # (1 - lr)^t, 37 % after 100 steps of the default lr, so that early inference lets too many features through.
        fresh = {**params, "threshold": jnp.float32(-1)}
        assert_close(sae.topk_threshold, 0.01 * ours(dictionary, fresh, x).frozen["threshold"])


# dictionary_learning: inference and losses. It keeps torch's [out, in] weights, and names of its own.


def trainer(torch, module, name, params, weights, **options):
    """One of their trainers with our parameters: `weights` says under which of their names."""
    made = getattr(module, name)(
        steps=10_000, activation_dim=D, dict_size=N, layer=0, lm_name="none", device="cpu", **options
    )
    for key, theirs in weights.items():
        target = made.ae
        for part in theirs.split("."):
            target = getattr(target, part)
        value = np.exp(params[key]) if key == "log_threshold" else np.asarray(params[key])
        target.data = torch.tensor(np.array(value.T if theirs.endswith(".weight") else value))
    return made


LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}


def assert_same_inference(torch, ae, dictionary, params, x):
    codes = ae.encode(torch.tensor(np.array(x)))
    assert ROWS < int((codes != 0).sum()) < codes.numel()
    assert_close(codes, dictionary.encode(params, x))
    assert_close(ae.decode(codes), dictionary.decode(params, dictionary.encode(params, x)))


def test_dictionary_learning_standard(torch, trainers):
    x = normalised_batch()
    for name, options in (
        ("StandardTrainer", {}),
        ("StandardTrainerAprilUpdate", {"norm_weighted": True, "decoder_norm": 0.3}),
    ):
        dictionary, params = made(L1(n_features=N, **options))
        theirs = trainer(
            torch, trainers["standard"], name, params, {**LINEAR, "b_enc": "encoder.bias", "b_dec": "bias"},
            l1_penalty=1.7, sparsity_warmup_steps=None,
        )  # fmt: skip
        assert_same_inference(torch, theirs.ae, dictionary, params, x)
        log = theirs.loss(torch.tensor(np.array(x)), step=0, logging=True).losses
        losses = ours(dictionary, params, x, {"l1": 1.7})
        assert_close(log["mse_loss"], losses.terms["reconstruction"])
        assert_close(1.7 * log["sparsity_loss"], losses.terms["l1"])
        assert_close(log["loss"], sum(losses.terms.values()))


def test_dictionary_learning_gated(torch, trainers):
    """All three terms and every gradient: they detach the decoder, as the paper does."""
    dictionary, params = made(Gated(n_features=N))
    x = normalised_batch()
    names = {**LINEAR, "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"}
    theirs = trainer(
        torch, trainers["gdm"], "GatedSAETrainer", params, names, l1_penalty=1.7, sparsity_warmup_steps=None
    )
    assert_same_inference(torch, theirs.ae, dictionary, params, x)
    log = theirs.loss(torch.tensor(np.array(x)), step=0, logging=True).losses
    losses, grads = ours(dictionary, params, x, {"l1": 1.7}, grads=True)
    assert_close(log["mse_loss"], losses.terms["reconstruction"])
    assert_close(1.7 * log["sparsity_loss"], losses.terms["l1"])
    assert_close(log["aux_loss"], losses.terms["auxiliary"])
    theirs.loss(torch.tensor(np.array(x)), step=0).backward()
    for name, place in names.items():
        target = theirs.ae
        for part in place.split("."):
            target = getattr(target, part)
        assert_close(target.grad, grads[name].T if place.endswith(".weight") else grads[name])


def test_dictionary_learning_jump_relu(torch, trainers):
    """The loss is our quadratic one; half of the penalty's pseudo-gradient is missing.

    `JumpReluTrainer.loss` (dictionary_learning/trainers/jumprelu.py) gives StepFunction the codes where the paper has
    the pre-activations. Codes below their threshold are 0 and so outside the kernel: only pre-activations between the
    threshold and half a bandwidth above it are counted, and the estimate of how L0 changes with the threshold is about
    half of what it should be.
    """
    dictionary, params = jump_relu("quadratic")
    x = normalised_batch()
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | {"log_threshold": "threshold"}
    theirs = trainer(
        torch, trainers["jumprelu"], "JumpReluTrainer", params, names, sparsity_penalty=1.7, target_l0=8.0,
        bandwidth=dictionary.kernel_width, sparsity_warmup_steps=None,
    )  # fmt: skip
    assert_same_inference(torch, theirs.ae, dictionary, params, x)
    log = theirs.loss(torch.tensor(np.array(x)), step=0, logging=True).losses
    losses, grads = ours(dictionary, params, x, {"l0": 1.7}, grads=True)
    assert_close(log["l2_loss"], losses.terms["reconstruction"])
    assert_close(log["loss"], sum(losses.terms.values()))
    theirs.loss(torch.tensor(np.array(x)), step=0).backward()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert_close(getattr(theirs.ae, name).grad, grads[name])
    # What the lower half of the kernel would have added.
    z, threshold = np.asarray(dictionary.pre_activations(params, x)), np.exp(params["log_threshold"])
    lower = np.mean((z <= threshold) & (z > threshold - dictionary.kernel_width / 2), axis=0)
    l0 = np.count_nonzero(dictionary.encode(params, x), axis=1).mean()
    slope = 1.7 * 2 * (l0 / 8 - 1) / 8
    missing = -slope * lower / dictionary.kernel_width
    assert np.abs(missing).max() > 0
    assert_close(theirs.ae.threshold.grad, grads["log_threshold"] / threshold - missing)


TOPK = {**LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec"}
FLAT = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


@pytest.mark.parametrize("kind", ["topk", "batch-topk", "matryoshka"])
def test_dictionary_learning_topk_family(torch, trainers, kind):
    """AuxK with their ReLU: ours on ReLU(z) = coefficient d theirs.

    `get_auxiliary_loss` takes activations after the ReLU (post_relu_acts_BF, dictionary_learning/trainers/top_k.py and
    the others): a dead feature that is negative on every row has no gradient, and AuxK cannot revive it.

    The reconstruction of MatryoshkaBatchTopKTrainer (matryoshka_batch_top_k.py, `loss`) is divided twice by the number
    of prefixes: once by its weights, whose default is 1 / G, and once more by `l2_losses.mean()`. Against that AuxK
    weighs G^2 times what it does beside the paper's sum:  theirs = (sum over prefixes) / G^2.
    """
    dictionary, params = made(KINDS[kind])
    x = normalised_batch()
    dead = silent_features(dictionary, params, x)
    module, name, weights, options = {
        "topk": ("top_k", "TopKTrainer", TOPK, {}),
        "batch-topk": ("batch_top_k", "BatchTopKTrainer", TOPK, {}),
        "matryoshka": (
            "matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer", FLAT, {"group_fractions": [0.25, 0.25, 0.5]}
        ),
    }[kind]  # fmt: skip
    theirs = trainer(torch, trainers[module], name, params, weights, k=K, **options)
    if kind != "topk":
        theirs.ae.threshold = torch.tensor(float(params["threshold"]))
    assert_same_inference(torch, theirs.ae, dictionary, params, x)
    theirs.num_tokens_since_fired[torch.tensor(dead)] = theirs.dead_feature_threshold
    theirs.ae.threshold = torch.tensor(-1.0)
    log = theirs.loss(torch.tensor(np.array(x)), step=theirs.threshold_start_step + 1, logging=True).losses
    losses = ours(dictionary, params, x, {"aux_k": 0.7}, dead)
    if kind == "matryoshka":
        assert_close(3**2 * log["l2_loss"], losses.terms["reconstruction"] + losses.terms["prefixes"])
    else:
        assert_close(log["l2_loss"], losses.terms["reconstruction"])
    assert theirs.dead_features == dead.sum()
    context = Context({"aux_k": jnp.float32(0.7)}, jnp.where(dead, 2000, 0), None, None, jnp.int32(1000))
    values = dictionary.preactivations(params, x)

    def aux(values):
        return aux_k_loss(values, x - losses.y_hat, params["W_dec"], jnp.ones(ROWS), context, D // 2)

    assert_close(aux(values), losses.terms["aux_k"])
    assert log["auxk_loss"] > 0
    assert_close(0.7 * D * log["auxk_loss"], aux(jax.nn.relu(values)))
    if kind != "topk":
        fresh = {**params, "threshold": jnp.float32(-1)}
        assert_close(theirs.ae.threshold, ours(dictionary, fresh, x).frozen["threshold"])
