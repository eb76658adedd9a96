"""What do features stand for, in words, and how well do the words predict where they are active?

    python -m experiments.explain runs/demo --base-url http://127.0.0.1:8000/v1 --judge MODEL --count 50 --estimate
    python -m experiments.explain runs/demo --base-url https://api.openai.com/v1 --judge MODEL --features 1 2 3
    python -m experiments.explain runs/demo

A language model behind any OpenAI-compatible endpoint sees five of a feature's twenty strongest fragments of 64 tokens
and says what the feature stands for. Its explanation is scored on other text: by the correlation of activations that a
judge simulates from it with the real ones (five other top fragments, five random active ones, both), by detection (in
which texts is it active?) and by fuzzing (are the marked tokens right?), both as balanced accuracy, where 0.5 is
chance. Features that are active in fewer than twenty fragments are skipped and counted.

Beside it stand the same scores for the explanation of another feature (shuffled), for a list of top tokens, for
neurons and for random directions; and simulations without any model: token means, and a constant. An explanation is
worth what it gains over these.

A simulated activation is the expected value over log-probabilities where the endpoint gives them, else the integer that
was written; the figures say which. Without --base-url no language model is asked: explanations are then rules about
one token or the one before it, found on half of the rows and scored on the other, and they are called so.

With two bases beside the dictionary, 50 features make about 50 x 3 explanations and 50 x 3 x 3 x 14 scoring calls. The
estimate stands before the first call, --estimate ends there. Each reply is on the disk (replies.jsonl) before it is
used: a run that was killed goes on with --resume and pays for nothing twice. --overwrite keeps the replies too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import command


@dataclass(frozen=True)
class Flags:
    """What do features stand for, in words, and how well do the words predict where they are active?"""

    dictionary: Annotated[Path, tyro.conf.Positional]
    """Run folder, a dictionary's folder, or a folder in SAELens' format."""
    base_url: str | None = None
    """Address of an OpenAI-compatible endpoint (what /chat/completions is appended to). None: no language model."""
    judge: str | None = None
    """Name of the model there that explains and judges."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; unset: none is sent. The key itself is never written anywhere."""
    features: tuple[int, ...] = ()
    """Features of the dictionary; of the other bases as many are drawn. By default all are drawn."""
    count: int = 50
    """Features of each basis, drawn uniformly from those that are active in enough fragments."""
    score: tuple[Literal["simulation", "detection", "fuzzing"], ...] = ("simulation", "detection", "fuzzing")
    """How explanations are scored."""
    basis: tuple[Literal["dictionary", "neurons", "random"], ...] = ("dictionary", "neurons", "random")
    """Whose features: the dictionary's; neurons, or random directions, of which each token keeps as many as the
    dictionary's L0."""
    baselines: tuple[Literal["shuffled", "top-tokens"], ...] = ("shuffled", "top-tokens")
    """Other explanations that the judge scores in the same way."""
    fragment: int = 64
    """Tokens in a fragment."""
    seed: int = 0
    """Decides which features, fragments and texts are drawn."""
    logprobs: bool = True
    """Ask for log-probabilities of simulated activations; not every endpoint gives them."""
    extra: str = "{}"
    """JSON object merged into every request; null takes a field out, e.g. for models that refuse some:
    '{"temperature": null, "max_tokens": null, "max_completion_tokens": 4000}'."""
    concurrency: int = 4
    """Requests under way at once."""
    requests_per_minute: float = 0.0
    """Requests in a minute, at most; 0: no limit."""
    timeout: float = 120.0
    """Seconds to wait for the endpoint to say something."""
    tries: int = 6
    """How often a request is sent that meets a busy or broken endpoint, waiting longer each time."""
    price_in: float = 0.0
    """Price of a million prompt tokens."""
    price_out: float = 0.0
    """Price of a million completion tokens."""
    max_cost: float | None = None
    """Refuse to begin what may cost more, and stop when so much is spent."""
    estimate: bool = False
    """Print what would be asked and its cost, and end; nothing is written."""
    model: str | None = None
    """Language model that is read, where the dictionary does not say which or it has another name here."""
    revision: str | None = None
    """Its revision."""
    site: str | None = None
    """Site, where the dictionary does not say which."""
    text: str | None = None
    """Text; by default that of the dictionary's training."""
    eval_text: str | None = None
    """What fragments are cut from; by default as in training: held-out documents."""
    eval_tokens: int = 212_992
    """Held-out tokens to cut fragments from, at most."""
    out: Path = Path("runs/explain")
    """Run folder."""
    resume: bool = False
    """Go on with the run in --out."""
    overwrite: bool = False
    """Remove the run in --out first; its replies stay."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.explain_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
