"""Find features: by tokens, a regular expression, a task, two sets of prompts, a pre-prompt, or a direction.

    python -m experiments.search_features runs/demo --tokens " king" " queen"
    python -m experiments.search_features runs/demo --regex "“[^”]*”" --by correlation
    python -m experiments.search_features runs/demo --task task.jsonl --verify 100
    python -m experiments.search_features runs/demo --prompts-a formal.txt --prompts-b casual.txt
    python -m experiments.search_features runs/demo --pre-prompt shots.txt --suffixes questions.txt
    python -m experiments.search_features runs/demo --like-feature 12
    python -m experiments.search_features runs/demo --like-token " king"
    python -m experiments.search_features runs/demo --like-difference --prompts-a formal.txt --prompts-b casual.txt

The folder is a run's, one dictionary's, or SAELens'. Each search prints a table of the best features with their
figures and the tokens they fire on most, and writes a run folder: metrics.json (the table) and features.csv (all
features that were ranked). About a minute on a laptop for 200,000 tokens of the embedded model.

What decides the order, by default and with --by:

    tokens, regex   f1, precision, recall, correlation (activation and 0/1 target), firing_correlation
    task            logit_difference, cross_entropy, kl: what ablating the feature does at the last token; a gradient
                    picks the --verify features that are truly ablated, and both figures are printed
    prompts a, b    activation, firing: |Cohen's d| of the mean over a prompt; p_family is of a permutation test over
                    all features at once
    pre-prompt      |change| of the mean activation on the suffixes' tokens when the pre-prompt stands before them
    like ...        decoder, encoder: cosine with the direction

A list of prompts is a text file, one a line, or a .jsonl file with a field "text". Lines of a task are
{"prompt": "The king of France is", "right": " old", "wrong": " young"}; an answer is one token.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments import command
from experiments.reading_flags import ReadingFlags


@dataclass(frozen=True)
class Flags(ReadingFlags):
    """Find features by tokens, a regular expression, a task, two sets of prompts, a pre-prompt, or a direction."""

    tokens: tuple[str, ...] = ()
    """Search for features that fire on these tokens; each must be one token (write the space: " king")."""
    regex: str | None = None
    """Search for features that fire on the tokens that matches of this overlap, in rows of text."""
    ends: bool = False
    """With --regex: only the token in which a match ends."""
    keep_outliers: bool = False
    """With --tokens and --regex: rank outlier features too (those that fire on the first token or the first delimiter
    of a row, whatever it is)."""
    task: Path | None = None
    """Search for features that carry the right answer: a .jsonl file of prompt, right, wrong."""
    last_only: bool = False
    """With --task: ablate at the prompt's last token alone, not at all its tokens."""
    verify: int = 64
    """With --task: features that are truly ablated, those of the largest estimated change; 0: all that fire."""
    prompts_a: Path | None = None
    """Search for features that differ between these prompts ..."""
    prompts_b: Path | None = None
    """... and these."""
    permutations: int = 1000
    """With --prompts-a and -b: random deals of the permutation test."""
    pre_prompt: Path | None = None
    """Search for features that change when this text stands before ..."""
    suffixes: Path | None = None
    """... each of these."""
    like_feature: int | None = None
    """Search for features like this one of the dictionary."""
    like_token: str | None = None
    """Search for features along the direction that raises this token's logit."""
    like_difference: bool = False
    """Search for features along the difference of mean activations of --prompts-a and --prompts-b."""
    by: str | None = None
    """What decides the order; see above."""
    count: int = 20
    """Features in the table."""
    eval_tokens: int = 204_800
    """Held-out tokens to read, at most: what tokens and expressions are searched in, and top tokens come from."""
    seed: int = 0
    """Decides the permutations."""
    out: Path = Path("runs/search_features")
    """Run folder."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.search_features_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
