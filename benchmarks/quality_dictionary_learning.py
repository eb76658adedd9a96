"""dictionary_learning 0.1's own trainers on a stream of activations, for `benchmarks.quality`.

Used as the library's demonstration uses it (`demo_config.py` of adamkarvonen/dictionary_learning_demo, to which its
README sends): activations divided by the root of their mean squared norm (`trainSAE(normalize_activations=True)`), the
learning rate falling to 0 over the last fifth, the nested sizes of Matryoshka; everything else as the trainers have it.
`trainSAE` itself adds to `update` only logs, files and an estimate of that norm. Its trainer of JumpReLU does not use
the seed it is given, so the seed is set here.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer

from benchmarks.quality_trial import Trial, WithinAQuarter
from sparse_jax.dictionaries import L1, BatchTopK, Dictionary, Gated, JumpReLU, Matryoshka, TopK

TRAINERS = {
    "standard": StandardTrainer,
    "topk": TopKTrainer,
    "batch-topk": BatchTopKTrainer,
    "jump-relu": JumpReluTrainer,
    "gated": GatedSAETrainer,
    "matryoshka": MatryoshkaBatchTopKTrainer,
}
KNOBS = {"standard": "l1_penalty", "gated": "l1_penalty", "jump-relu": "target_l0"}
# demo_config.py: DECAY_START_FRACTION, and the sizes of MatryoshkaBatchTopKTrainerConfig.
DECAY_START = 0.8
GROUPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32)

# The trainers' own defaults, which are written into their signatures.
WARM_UP, SPARSITY_WARM_UP, THRESHOLD_START, THRESHOLD_BETA = 1000, 2000, 1000, 0.999

LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
FLAT = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
# Our names of parameters -> theirs. Those of torch.nn.Linear are [out, in].
NAMES = {
    "standard": {**LINEAR, "b_enc": "encoder.bias", "b_dec": "bias"},
    "topk": {**LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec"},
    "batch-topk": {**LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec", "threshold": "threshold"},
    "jump-relu": {**FLAT, "log_threshold": "threshold"},
    "gated": {**LINEAR, "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"},
    "matryoshka": {**FLAT, "threshold": "threshold"},
}


def trainer(trial: Trial, width: int, n_features: int, within: WithinAQuarter):
    """Their trainer, and what it was told."""
    k_sparse = trial.architecture in ("topk", "batch-topk", "matryoshka")
    told = {
        "lr": trial.learning_rate,
        "warmup_steps": within.in_steps("warmup_steps", WARM_UP),
        "decay_start": int(DECAY_START * trial.steps),
        KNOBS.get(trial.architecture, "k"): round(trial.sparsity) if k_sparse else trial.sparsity,
    }
    if k_sparse:
        told["threshold_start_step"] = within.in_steps("threshold_start_step", THRESHOLD_START)
        told["threshold_beta"] = 1 - within.newest_weight("1 - threshold_beta", round(1 - THRESHOLD_BETA, 6))
    else:
        told["sparsity_warmup_steps"] = within.in_steps("sparsity_warmup_steps", SPARSITY_WARM_UP)
    if trial.architecture == "matryoshka":
        told["group_fractions"] = list(GROUPS)
    torch.manual_seed(trial.seed)
    made = TRAINERS[trial.architecture](
        steps=trial.steps,
        activation_dim=width,
        dict_size=n_features,
        layer=0,
        lm_name="none",
        device="cpu",
        seed=trial.seed,
        **told,
    )
    if k_sparse:
        told["dead_feature_threshold"] = within.in_tokens("dead_feature_threshold", made.dead_feature_threshold)
        made.dead_feature_threshold = told["dead_feature_threshold"]
    return made, {"trainer": type(made).__name__, **told}


def fit(
    trial: Trial, batch_of: Callable[[int], np.ndarray], width: int, n_features: int, scale: float, within
) -> tuple[torch.nn.Module, float, dict]:
    """Their dictionary for activations divided by `scale`, seconds of training, what the trainer was told."""
    made, told = trainer(trial, width, n_features, within)
    started = time.perf_counter()
    for step in range(trial.steps):
        made.update(step, torch.tensor(batch_of(step)) / scale)
    return made.ae, time.perf_counter() - started, told


def converted(trial: Trial, ae: torch.nn.Module) -> tuple[Dictionary, dict[str, np.ndarray]]:
    """Our class with the same inference rule, and its parameters, in the units of training."""
    params = {}
    for ours, theirs in NAMES[trial.architecture].items():
        value = ae
        for part in theirs.split("."):
            value = getattr(value, part)
        # A threshold is a plain number where no feature was active.
        value = torch.as_tensor(value).detach().numpy().astype(np.float32)
        params[ours] = value.T if theirs.endswith(".weight") else value
    width, n = params["W_enc"].shape
    k = {"k": round(trial.sparsity)}
    if trial.architecture == "jump-relu":
        # They apply ReLU too, so that a threshold below 0 is one of 0.
        with np.errstate(divide="ignore"):
            params["log_threshold"] = np.log(np.maximum(params["log_threshold"], 0))
    dictionary = {
        "standard": lambda: L1(n_features=n),
        "topk": lambda: TopK(n_features=n, **k),
        "batch-topk": lambda: BatchTopK(n_features=n, **k),
        "jump-relu": lambda: JumpReLU(n_features=n, centring=False),
        "gated": lambda: Gated(n_features=n),
        "matryoshka": lambda: Matryoshka(n_features=n, prefixes=tuple(np.cumsum(ae.group_sizes.tolist()) / n), **k),
    }[trial.architecture]()
    return dictionary.sized(width), params


@torch.no_grad()
def inference(ae: torch.nn.Module, x: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reconstructions of raw activations by their own class, the scale folded in as `trainSAE` folds it."""
    ae.scale_biases(scale)
    codes = ae.encode(torch.tensor(x))
    return codes.numpy(), ae.decode(codes).numpy()
