"""What `experiments.amortisation_gap` does with its flags, from top to bottom."""

import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run_folder
from experiments.amortisation_gap import Flags
from experiments.data import Data, blocks_at, check_positive
from experiments.measuring import eval_batches, eval_rows
from experiments.reading import check_width, given_of, open_data, read_dictionary
from sparse_jax.activations import collect_statistics
from sparse_jax.coding import lasso, objective
from sparse_jax.coding.least_squares_on_support import least_squares_on_support
from sparse_jax.coding.tuning import penalty_for_l0
from sparse_jax.dictionaries import Normalised
from sparse_jax.dictionaries.baselines import LinearTopK
from sparse_jax.errors import InputError
from sparse_jax.metrics import Reconstructor, Setting, evaluate_each
from sparse_jax.metrics.sparsity import l0, sparsity_sums
from sparse_jax.numerics import safe_norm
from sparse_jax.numerics.sparse_codes import SparseCodes, dense

ROWS = ("encoder", "encoder's support", "solver", "solver's support")
FIGURES = ("fvu", "l0", "ce_increase", "kl", "shrinkage")


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    started = time.perf_counter()
    check_positive(flags, "eval_tokens", "tune_tokens", "tolerance")
    run_folder.check_apart(flags.out, flags.dictionary)
    run_folder.prepare(flags.out, overwrite=flags.overwrite)
    trained, provenance = read_dictionary(flags.dictionary)
    check_linear(trained, flags.dictionary)
    given = given_of(flags, "model", "revision", "text", "eval_text")
    data = open_data(flags.dictionary, provenance, given, eval_tokens=flags.eval_tokens, tokens=flags.tune_tokens)
    check_width(trained, data, flags.dictionary)
    run_folder.begin(flags, {"dictionary": trained.dictionary.kind, **data.identity()})
    final = measure(flags, data, trained) | {"seconds": time.perf_counter() - started}
    run_folder.write_json(flags.out / "metrics.json", final)
    print_table(final)
    print(f"figures: {flags.out / 'metrics.json'}")
    return 0


def check_linear(trained: Normalised, path: Path) -> None:
    """Raises InputError unless the decoder is a sum of atoms, b_dec added."""
    if "W_dec" not in trained.params or isinstance(trained.dictionary, LinearTopK):
        raise InputError(
            f"the {trained.dictionary.kind} dictionary in {path} is no sum of atoms with codes of one sign; give an "
            "autoencoder or a FISTA dictionary"
        )


def measure(flags: Flags, data: Data, trained: Normalised) -> dict:
    """All figures."""
    blocks = blocks_at(data, flags.seed)
    statistics = collect_statistics(blocks, max(1, flags.tune_tokens // blocks.tokens_per_block))
    x, weight = tuning_rows(flags, blocks)
    encoder_l0, most = active(trained, x, weight)
    W, bias, signed = atoms(trained)
    target = trained.normaliser.apply(x[weight > 0]) - bias
    penalty, tuned_l0 = penalty_for_l0(target, W, encoder_l0, signed=signed, tolerance=flags.tolerance)
    print(
        f"{trained.dictionary.kind} dictionary of {len(W)} features at {data.site}; on {len(target):,} tokens of the "
        f"training text the encoder's L0 is {encoder_l0:.2f}, the solver's {tuned_l0:.2f} at lambda {penalty:.4f}",
        flush=True,
    )
    slots = min(len(W), int(1.5 * most) + 8)
    numbers = eval_rows(data, flags.eval_tokens)
    from tqdm import tqdm

    total = -(-len(numbers) // 8)
    batches = tqdm(eval_batches(data, numbers), total=total, desc="measuring", unit="batch", mininterval=0.5)
    measured = evaluate_each(
        data.lm,
        Setting(data.site),
        batches,
        reconstructors(trained, jnp.float32(penalty), signed, slots, flags.tolerance),
        mean=statistics.mean,
        outlier_norm=np.inf,
    )
    codes = {"encoder": jax.jit(Normalised.encode)(trained, x)[weight > 0]}
    codes["solver"] = jax.jit(partial(lasso, tolerance=flags.tolerance, signed=signed))(
        target, W, jnp.float32(penalty)
    ).codes
    values = {name: float(jnp.mean(objective(target, W, penalty, each))) for name, each in codes.items()}
    return {
        "dictionary": trained.dictionary.kind,
        "n_features": len(W),
        "model": data.flags.model,
        "site": str(data.site),
        "lambda": penalty,
        "encoder_l0_on_tuning_tokens": encoder_l0,
        "solver_l0_on_tuning_tokens": tuned_l0,
        "tokens_evaluated": int(measured.figures["encoder"]["tokens_evaluated"]),
        "rows": {name: {key: measured.figures[name][key] for key in FIGURES} for name in ROWS},
        "objective": values,
        "objective_gap": values["encoder"] / values["solver"] - 1,
    }


def tuning_rows(flags: Flags, blocks) -> tuple[jax.Array, np.ndarray]:
    """(raw activations `[rows, d]`, weight) of the first training blocks, enough for --tune-tokens."""
    xs, weights, number = [], [], 0
    while sum(int((w > 0).sum()) for w in weights) < flags.tune_tokens and number < 64:
        block = blocks[number]
        xs.append(np.asarray(block.x))
        weights.append(np.asarray(block.weight))
        number += 1
    x, weight = np.concatenate(xs), np.concatenate(weights)
    keep = np.cumsum(weight > 0) <= flags.tune_tokens
    return jnp.array(x[keep]), weight[keep]


def active(trained: Normalised, x: jax.Array, weight: np.ndarray) -> tuple[float, int]:
    """(L0 of the encoder, the most active features that a token has)."""
    codes = jax.jit(Normalised.encode)(trained, x)
    sums = sparsity_sums(codes, jnp.array(weight, jnp.float32), jnp.ones(codes.shape[1]))
    return l0(sums), int(jnp.max(jnp.sum(codes != 0, axis=1)))


def atoms(trained: Normalised) -> tuple[jax.Array, jax.Array, bool]:
    """(atoms `[n_features, d]`, what is added to their sum `[d]`, whether codes have both signs), normalised units."""
    W = trained.params["W_dec"]
    return W, trained.params.get("b_dec", jnp.zeros(W.shape[1])), bool(getattr(trained.dictionary, "signed", False))


def reconstructors(
    trained: Normalised, penalty: jax.Array, signed: bool, slots: int, tolerance: float
) -> dict[str, Reconstructor]:
    """The four rows by name."""
    encode = {
        "encoder": lambda params, x: params["trained"].encode(x),
        "solver": lambda params, x: solved(params, x, signed, tolerance),
    }
    params = {"trained": trained, "penalty": penalty}
    made = {}
    for name, codes_of in encode.items():
        made[name] = Reconstructor(partial(_encode, codes_of), _decode, params)
        refit = partial(refitted, codes_of, slots, signed)
        made[f"{name}'s support"] = Reconstructor(partial(_encode, refit), _decode, params)
    return made


def _encode(codes_of, params, x, tokens):
    return codes_of(params, x)


def _decode(params, codes, x, tokens):
    return params["trained"].decode(codes, x), safe_norm(params["trained"].directions())


def solved(params: dict, x: jax.Array, signed: bool, tolerance: float) -> jax.Array:
    """The lasso's codes of raw x."""
    W, bias, _ = atoms(params["trained"])
    target = params["trained"].normaliser.apply(x) - bias
    return lasso(target, W, params["penalty"], tolerance, signed=signed).codes


def refitted(codes_of, slots: int, signed: bool, params: dict, x: jax.Array) -> jax.Array:
    """The codes' features with the values that leave the least; of more than `slots` features the largest are kept."""
    W, bias, _ = atoms(params["trained"])
    codes = codes_of(params, x)
    size, indices = jax.lax.top_k(jnp.abs(codes), slots)
    target = params["trained"].normaliser.apply(x) - bias
    values = least_squares_on_support(target, W, indices, size > 0, non_negative=not signed)
    return dense(SparseCodes(values, indices), len(W))


def print_table(final: dict) -> None:
    """The four rows, and the objective."""
    print(f"\n{'codes':>20} {'FVU':>9} {'L0':>8} {'CE increase':>12} {'KL':>9} {'shrinkage':>10}")
    for name, row in final["rows"].items():
        print(
            f"{name:>20} {row['fvu']:9.4f} {row['l0']:8.2f} {row['ce_increase']:+12.4f} {row['kl']:9.4f} "
            f"{row['shrinkage']:10.3f}"
        )
    print(
        f"objective at lambda {final['lambda']:.4f}: encoder {final['objective']['encoder']:.4f}, minimum "
        f"{final['objective']['solver']:.4f}: {100 * final['objective_gap']:.1f} % above"
    )
