"""What `experiments.feature` does with its flags, from top to bottom."""

import dataclasses

import numpy as np

from experiments import run_folder
from experiments.data import check_positive
from experiments.feature import Flags
from experiments.feature_panels import SCORES, Measured, measure, panels
from experiments.feature_texts import changes_in_texts, open_earlier, with_contexts
from experiments.features_run import PAGES, check, opened, resolved
from experiments.reading import Subject, check_features, max_norm_of
from sparse_jax.errors import InputError
from sparse_jax.features.collected_panels import choose_places
from sparse_jax.features.index_page import write_pages
from sparse_jax.features.page import Context
from sparse_jax.features.panels import FeaturePanel

# Tokens of each printed text, up to the place and behind it.
BEFORE, AFTER = 14, 6
# Needed tokens that are printed of a text: those without which at least this share of the activation is lost.
NEEDED, NEEDED_SHARE = 3, 0.15


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    check(flags)
    check_positive(flags, "texts", "causes", "cause_texts", "tokens_shown")
    if not flags.features or len(set(flags.features)) < len(flags.features):
        raise InputError("give the number of a feature, or several that differ: ... runs/demo 123")
    subject = opened(flags)
    check_features(subject.coder, flags.features)
    earlier = None if flags.earlier is None else open_earlier(flags, subject)
    run_folder.begin(flags, resolved(subject), also=(PAGES,))
    max_norm = max_norm_of(flags.max_norm, subject)
    features = np.array(flags.features, np.int64)
    measured = measure(
        subject, features, max_norm=max_norm, effect_tokens=flags.effect_tokens, rule_tokens=flags.rule_tokens,
        seed=flags.seed, top=flags.texts, memory_gb=flags.memory_gb,
    )  # fmt: skip
    top, changes = max(flags.texts, 6), {}
    for number in flags.features:
        rows = choose_places(measured.collected, features[features == number], top=top).rows
        if len(rows):
            changes |= changes_in_texts(subject, measured, number, rows, max_norm)
    plain = panels(
        subject, measured, tokens=flags.tokens_shown, top=top, before=BEFORE, after=AFTER,
        changes_at=lambda feature, row: changes.get((feature, row)),
    )  # fmt: skip
    made = [with_contexts(flags, subject, measured, panel, earlier, flags.texts) for panel in plain]
    page = write_pages(
        flags.out / PAGES,
        f"{subject.coder.dictionary.kind} dictionary of {subject.data.site}",
        made,
        subtitle=f"{subject.data.flags.model}, features {', '.join(map(str, flags.features))}",
        score_hints=SCORES,
    )
    run_folder.write_json(flags.out / "metrics.json", {"features": [dataclasses.asdict(panel) for panel in made]})
    for panel in made:
        print_panel(flags, subject, measured, panel)
    print(f"\npage: {page}")
    return 0


def print_panel(flags: Flags, subject: Subject, measured: Measured, panel: FeaturePanel) -> None:
    """All of it, in some ten lines and the texts."""
    print(f"\nfeature {panel.index} of the {subject.coder.dictionary.kind} dictionary of {subject.data.site}")
    if not measured.collected.fired[panel.index]:
        print(f"  never fires on {measured.collected.tokens:,} tokens")
        return
    print(
        f"  fires on {100 * panel.density:.3f} % of {measured.collected.tokens:,} tokens, at most {panel.maximum:.2f}, "
        f"mean {panel.mean:.2f}{'; an outlier feature: of first tokens' * panel.outlier}"
    )
    said("on", panel.top_tokens)
    if panel.explanation:
        scores = ", ".join(f"{name} {value:.2f}" for name, value in panel.scores if value is not None)
        print(f"  {panel.explanation} ({scores})")
    said("its direction raises", panel.raised)
    said("and lowers", panel.lowered)
    if panel.effect is not None:
        print(f"  ablating it changes the cross-entropy by {panel.effect:+.6f} nats a token")
        said("without it less likely", panel.ablation_lowered)
        said("and more likely", panel.ablation_raised)
    if panel.coactive:
        print(f"  fires with {', '.join(f'{other.feature} ({other.count})' for other in panel.coactive)}")
    for cause in panel.causes:
        beside = "" if cause.cosine is None else f", cosine {cause.cosine:+.2f}"
        print(f"  caused by {cause.where} feature {cause.feature}: {cause.drop:+.2f} of its activation{beside}")
    for passage, need in zip([each for each in panel.contexts if each.context.label == "top"], panel.needs):
        print(f"  {line_of(passage.context)}   {needed(need)}")


def said(words: str, tokens: tuple[tuple[str, float], ...]) -> None:
    """Tokens with their figures, if there are any."""
    if tokens:
        print(f"  {words} {', '.join(f'{token!r} {value:.2f}' for token, value in tokens)}")


def line_of(context: Context) -> str:
    """A text on one line, the token at which the feature fires marked."""
    tokens, peak = context.tokens, context.peak
    text = "".join([*tokens[:peak], f"[[{tokens[peak]}]]", *tokens[peak + 1 :]])
    return f"{context.activations[peak]:6.2f}  " + "".join(sign if sign.isprintable() else "↵" for sign in text)


def needed(context: Context) -> str:
    """The earlier tokens without which most is lost."""
    activation, losses = context.activations[context.peak], np.array(context.activations[: context.peak])
    order = np.argsort(-losses, kind="stable")[:NEEDED]
    found = [f"{context.tokens[i]!r} {losses[i]:+.1f}" for i in order if losses[i] >= NEEDED_SHARE * activation]
    return f"needs {', '.join(found)}" if found else "needs no single earlier token"
