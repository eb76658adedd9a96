"""What trivial methods get at a site: PCA rotation, neurons, random dictionary, mean of the current token.

    python -m benchmarks.floors --text ../shared/text/novels.txt.gz --eval-text austen --k 16 32

No dictionary is trained. The floors are fitted on `--tokens` of the text and measured on `--eval-tokens` held-out ones,
the way every experiment does it; so the figures can be compared with those of other implementations.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from experiments import command
from experiments.measuring import TOKENS_FOR_GAIN, eval_batches, eval_rows
from sparse_jax.activations import Blocks, collect_statistics
from sparse_jax.lm import check_site, load, load_tokenizer, resolve
from sparse_jax.lm.holdout import split
from sparse_jax.lm.packing import pack
from sparse_jax.metrics import Setting, evaluate
from sparse_jax.numerics.allocator import keep_freed_memory
from sparse_jax.training import fit_floors


@dataclass(frozen=True)
class Flags:
    """What trivial methods get at a site."""

    model: str = "novel-neox"
    """Embedded name, folder or hub id."""
    site: str = "resid_post.3"
    """Where activations are replaced."""
    text: str = "embedded"
    """What the floors are fitted on."""
    eval_text: str | None = None
    """What they are measured on; by default held-out documents of --text."""
    tokens: int = 2_000_000
    """Tokens to fit on."""
    eval_tokens: int = 102_400
    """Tokens to measure on."""
    context: int = 256
    """Tokens in a row."""
    k: tuple[int, ...] = (16, 32)
    """Coefficients that PCA, neurons and the random dictionary keep."""
    n_features: int = 2048
    """Size of the random dictionary."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


@dataclass(frozen=True)
class _Evaluated:
    """What `eval_rows` and `eval_batches` need of an experiment's data."""

    evaluation: object


def main(flags: Flags) -> None:
    """Fit, measure, print a table."""
    keep_freed_memory()
    tokenizer, lm = load_tokenizer(resolve(flags.model)), load(flags.model)
    site = check_site(lm.config, flags.site)
    train, held = split(flags.text, flags.eval_text, tokenizer=tokenizer, context=flags.context)
    blocks = Blocks(lm, pack(train, tokenizer, flags.context, limit=flags.tokens), site, seed=0)
    data = _Evaluated(pack(held, tokenizer, flags.context))
    statistics = collect_statistics(blocks, max(1, flags.tokens // blocks.tokens_per_block))
    first = blocks[0]
    x = jnp.array(np.asarray(first.x)[np.asarray(first.weight) > 0][:TOKENS_FOR_GAIN])
    numbers = eval_rows(data, flags.eval_tokens)
    print(f"fitted on {statistics.tokens:,} tokens, measured on {len(numbers) * flags.context:,}")
    print(f"{'floor':>24} {'L0':>7} {'FVU':>8} {'CE increase':>12}")
    for k in flags.k:
        floors = fit_floors(statistics, x, k, flags.n_features, seed=0)
        result = evaluate(
            lm,
            Setting(site),
            eval_batches(data, numbers),
            {"dictionary": floors.pop("pca"), **floors},
            mean=statistics.mean,
            outlier_norm=np.inf,
        )
        for name, figures in {"pca": result.figures, **result.floors}.items():
            label = name if name == "token_mean" else f"{name}, top {k}"
            print(f"{label:>24} {figures['l0']:7.1f} {figures['fvu']:8.4f} {figures['ce_increase']:12.4f}")
    ce = result.figures
    print(f"clean CE {ce['ce_clean']:.4f}, zero-ablated {ce['ce_zero']:.3f}, mean-ablated {ce['ce_mean']:.3f} nats")


if __name__ == "__main__":
    command.main(Flags, main)
