"""SAELens 6.54's own trainer on a stream of activations, for `benchmarks.quality`.

Used as its documentation uses it (docs/training_saes.md): activations scaled to a mean norm of sqrt(d)
(`expected_average_only_in`), a constant learning rate that falls to 0 over the last fifth, the l1 coefficient rising
over the first twentieth; JumpReLU with Anthropic's tanh penalty, which the page recommends with these settings and a
coefficient that rises over the whole run (of the other penalty, "step", it says that it wants 2 billion tokens). Where
the page is silent, SAELens' defaults. It has none for the nested sizes of Matryoshka: those of the paper.

`SAETrainer.step` is the part of `SAETrainer.fit` that SAELens offers to other loops; the rest is logs, files and an
estimate of the mean norm.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.saes import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.quality_trial import BATCH, Trial, WithinAQuarter
from sparse_jax.dictionaries import Matryoshka, Normalised
from sparse_jax.formats import load_saelens

CLASSES = {
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batch-topk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "jump-relu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
}
BATCH_TOPK = ("batch-topk", "matryoshka")


def options(trial: Trial, n_features: int, within: WithinAQuarter) -> dict:
    """What their class of the architecture is told beside its sizes."""
    if trial.architecture in ("standard", "gated"):
        return {"l1_coefficient": trial.sparsity, "l1_warm_up_steps": trial.steps // 20}
    if trial.architecture == "jump-relu":
        return {
            "l0_coefficient": trial.sparsity,
            "l0_warm_up_steps": trial.steps,
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_tanh_scale": 4.0,
            "jumprelu_bandwidth": 2.0,
            "jumprelu_init_threshold": 0.1,
            "pre_act_loss_coefficient": 3e-6,
        }
    told = {"k": round(trial.sparsity) if trial.architecture == "topk" else trial.sparsity}
    if trial.architecture in BATCH_TOPK:
        default = BatchTopKTrainingSAEConfig.topk_threshold_lr
        told["topk_threshold_lr"] = within.newest_weight("topk_threshold_lr", default)
    if trial.architecture == "matryoshka":
        told["matryoshka_widths"] = [round(share * n_features) for share in Matryoshka.prefixes]
    return told


def trainer(trial: Trial, width: int, n_features: int, mean_norm: float, within: WithinAQuarter, data_provider=None):
    """Their trainer, and what it was told."""
    told = options(trial, n_features, within)
    make, config = CLASSES[trial.architecture]
    torch.manual_seed(trial.seed)
    sae = make(
        config(
            d_in=width, d_sae=n_features, device="cpu", normalize_activations="expected_average_only_in", **told
        )
    )  # fmt: skip
    run = {
        "lr": trial.learning_rate,
        # What their runner makes of its default; a constant rate does not use it.
        "lr_end": trial.learning_rate / 10,
        "lr_decay_steps": trial.steps // 5,
        "dead_feature_window": within.in_steps("dead_feature_window", SAETrainerConfig.dead_feature_window),
    }
    cfg = SAETrainerConfig(
        total_training_samples=trial.steps * BATCH, train_batch_size_samples=BATCH, device="cpu", **run
    )
    made = SAETrainer(cfg, sae, data_provider)
    # As `ActivationScaler.estimate_scaling_factor`.
    made.activation_scaler.scaling_factor = width**0.5 / mean_norm
    return made, {"trainer": make.__name__, **told, **run}


def fit(
    trial: Trial,
    batch_of: Callable[[int], np.ndarray],
    width: int,
    n_features: int,
    mean_norm: float,
    within: WithinAQuarter,
) -> tuple[SAETrainer, float, dict]:
    """Their trainer at the end of the run, seconds of training, what the trainer was told."""
    made, told = trainer(trial, width, n_features, mean_norm, within)
    started = time.perf_counter()
    for step in range(trial.steps):
        made.step(torch.tensor(batch_of(step)))
        made.n_training_steps += 1
    return made, time.perf_counter() - started, told


def converted(made: SAETrainer) -> Normalised:
    """Ours, of what they write as a checkpoint: weights as trained, and the scaler beside them."""
    with tempfile.TemporaryDirectory() as folder:
        made.sae.save_model(folder)
        made.activation_scaler.save(str(Path(folder, ACTIVATION_SCALER_CFG_FILENAME)))
        return load_saelens(Path(folder))[0]


@torch.no_grad()
def inference(made: SAETrainer, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reconstructions of raw activations by the class they load for inference, the scale folded in."""
    made.sae.fold_activation_norm_scaling_factor(made.activation_scaler.scaling_factor)
    with tempfile.TemporaryDirectory() as folder:
        made.sae.save_inference_model(folder)
        sae = SAE.load_from_disk(folder)
    codes = sae.encode(torch.tensor(x))
    return codes.numpy(), sae.decode(codes).numpy()
