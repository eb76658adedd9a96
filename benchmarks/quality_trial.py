"""One training run of `benchmarks.quality`, whichever library does it: what is asked for, and what comes back."""

from dataclasses import dataclass

from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError

BATCH = 1024

LIBRARIES = ("sparse_jax", "saelens", "dictionary_learning")
# Those that all three have; those that only sparse_jax has.
ARCHITECTURES = ("standard", "topk", "batch-topk", "jump-relu", "gated", "matryoshka")
OURS_ALONE = ("lp", "multi-topk", "matching-pursuit")


def architectures_of(library: str) -> tuple[str, ...]:
    """The architectures that a library is tried with."""
    return (*ARCHITECTURES, *OURS_ALONE) if library == "sparse_jax" else ARCHITECTURES


@dataclass(frozen=True)
class Trial:
    """What is asked for.

    Attributes:
        library: one of LIBRARIES.
        architecture: one of `architectures_of(library)`.
        learning_rate: the peak one.
        sparsity: the library's own knob for this architecture: l1 coefficient, l0 coefficient, target L0, k.
        steps: batches of BATCH rows.
        seed: of the initial weights.

    Raises:
        InputError: an unknown library or architecture, or a run too short to have phases.
    """

    library: str
    architecture: str
    learning_rate: float
    sparsity: float
    steps: int
    seed: int

    def __post_init__(self):
        if self.library not in LIBRARIES:
            raise InputError(f"library {self.library!r}: choose one of {', '.join(LIBRARIES)}")
        if self.architecture not in architectures_of(self.library):
            raise InputError(
                f"architecture {self.architecture!r}: choose one of {', '.join(architectures_of(self.library))}"
            )
        if self.steps < 20:
            raise InputError(f"{self.steps} steps: give at least 20, so that warm-ups and windows have room")


@dataclass(frozen=True)
class Trained:
    """What comes back.

    Attributes:
        trained: the dictionary, for raw activations.
        seconds: of the training loop alone, fetching of batches included.
        scaled: every default of the library that was changed because it exceeded a quarter of the run: name -> "default
            -> used".
        log: what the library was told, and what it counted, for the record (JSON).
    """

    trained: Normalised
    seconds: float
    scaled: dict[str, str]
    log: dict


class WithinAQuarter:
    """Defaults that are given in steps or tokens, brought down to a quarter of the run; it notes which were changed."""

    def __init__(self, steps: int):
        self.steps = steps // 4
        self.tokens = self.steps * BATCH
        self.scaled: dict[str, str] = {}

    def in_steps(self, name: str, default: int) -> int:
        """What to use in place of a default number of steps."""
        return self._least(name, default, self.steps, "steps")

    def in_tokens(self, name: str, default: int) -> int:
        """What to use in place of a default number of tokens."""
        return self._least(name, default, self.tokens, "tokens")

    def newest_weight(self, name: str, default: float) -> float:
        """The weight of the newest value in a moving average, which lasts about 1 / weight steps."""
        used = max(default, 1 / self.steps)
        if used != default:
            self.scaled[name] = f"{default:g} -> {used:.3g} (an average over {1 / default:.0f} -> {self.steps} steps)"
        return used

    def _least(self, name: str, default: int, bound: int, unit: str) -> int:
        used = min(default, bound)
        if used != default:
            self.scaled[name] = f"{default} -> {used} {unit}"
        return used
