"""The flags that every experiment which trains dictionaries has in common."""

from dataclasses import dataclass, field

import tyro

from experiments.text_flags import StoredTextFlags
from sparse_jax.activations.normalise import Rule
from sparse_jax.dictionaries import (
    L1,
    BatchTopK,
    Fista,
    Gated,
    JumpReLU,
    Lista,
    Lp,
    MatchingPursuit,
    Matryoshka,
    MultiTopK,
    TopK,
)
from sparse_jax.training.decoder_bias import BiasStart
from sparse_jax.training.schedules import Schedule

Trainable = tyro.extras.subcommand_type_from_defaults(
    {
        cls.kind: cls()
        for cls in (L1, Lp, Gated, JumpReLU, TopK, BatchTopK, Matryoshka, MultiTopK, MatchingPursuit, Fista, Lista)
    }
)


@dataclass(frozen=True)
class TrainingFlags(StoredTextFlags):
    """Model, text (or a store), data, training and run folder; experiments add what they vary, and where they write."""

    dictionary: Trainable  # type: ignore[valid-type]
    """Architecture; `... KIND --help` shows its flags, formulas are in its module's docstring."""
    tokens: int = 2_200_000
    """Tokens to train on; more than the text holds means several epochs (said)."""
    eval_tokens: int = 212_992
    """Held-out tokens to evaluate on, at most; a feature is called dead on these."""
    drop_outliers: bool = False
    """Mask tokens whose activation norm exceeds 10 times the median (they are counted either way)."""
    batch: int = 1024
    """Tokens in a training step."""
    schedule: Schedule = field(default_factory=Schedule)
    """Warm-ups and decay, as shares of the run."""
    resample_at: tuple[float, ...] = ()
    """Shares of the run at which features that were silent for the dead window start again (Bricken et al. 2023:
    0.125 0.25 0.375 0.5)."""
    normalise: Rule = "centre-scale"
    """What is done to activations before the dictionary: scale means E||x||^2 = d."""
    decoder_bias_start: BiasStart = "zero"
    """Where the decoder bias is before the first step, in normalised units: the mean or the geometric median (Bricken
    et al. 2023) of the first training tokens, 16,384 at most. Behind centre-scale the mean is 0 already, but for what
    the sample leaves; the median need not be."""
    statistics_tokens: int = 524_288
    """Training tokens from which the normaliser and the floors are fitted, at most."""
    dead_window: int = 500_000
    """A feature silent for more training tokens counts as dead in the curves; at most a quarter of the run."""
    block_rows: int = 256
    """Rows of text that are harvested and shuffled together."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    keep_best: str | None = None
    """A logged metric: the checkpoint where it is lowest (fvu) or highest (explained_variance:highest) stays too."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint; the flags must be the same."""
    overwrite: bool = False
    """Remove the run in --out first."""
    reuse_memory: bool = True
    """Keep freed memory in the process (glibc): faster on CPU, but the peak is never given back."""
    debug: bool = False
    """Show tracebacks of errors in the input."""
