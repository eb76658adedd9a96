"""The kinds of search of `experiments.search_features`: what each asks of the flags, and what it ranks.

A kind is a function of flags, subject and the files that were read; it gives a `Ranked`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments.prompt_files import (
    one_token,
    prompts_of,
    read_prompts,
    read_task,
    read_text,
    suffixes_of,
    task_of,
)
from experiments.reading import Subject, check_features
from experiments.search_features import Flags
from sparse_jax.errors import InputError
from sparse_jax.features.collect import collect, delimiter_tokens
from sparse_jax.features.prompt_diff import changed_places, prompt_diff
from sparse_jax.features.search_direction import difference_of_means, similarity, unembedding
from sparse_jax.features.search_prompts import by_prompt, compare
from sparse_jax.features.search_task import search_task
from sparse_jax.features.search_tokens import regex_target, target_sums, token_target
from sparse_jax.features.target_scores import Scores, ranking

# Rows of text on which outlier features are told.
OUTLIER_ROWS = 128


@dataclass(frozen=True)
class Ranked:
    """What a search found.

    Attributes:
        features: `[ranked]` best first.
        columns: figure -> `[ranked]`, in the order of `features`.
        summary: figures of the search as a whole.
        places: for the first features, where each changes, in words.
    """

    features: np.ndarray
    columns: dict[str, np.ndarray]
    summary: dict[str, Any] = field(default_factory=dict)
    places: list[list[str]] | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of search.

    Attributes:
        wanted: whether the flags ask for it.
        by: what may decide the order, the default first.
        read: flags -> what stands in the files, before anything is loaded.
        search: (flags, subject, what was read, by, options of reading) -> what was found.
    """

    wanted: Callable[[Flags], bool]
    by: tuple[str, ...]
    read: Callable[[Flags], Any]
    search: Callable[..., Ranked]


def _both(flags: Flags, one: str, other: str) -> None:
    for given, missing in ((one, other), (other, one)):
        if getattr(flags, given) is not None and getattr(flags, missing) is None:
            raise InputError(f"--{given.replace('_', '-')} needs --{missing.replace('_', '-')}")


def read_target(flags: Flags) -> None:
    """A regular expression is tried before the model is loaded."""
    if flags.regex is not None:
        regex_target(flags.regex, [])


def search_target(flags: Flags, subject: Subject, content: None, by: str, options: dict) -> Ranked:
    """Features that fire on tokens or on matches."""
    data = subject.data
    if flags.tokens:
        target = token_target(one_token(data, string, "--tokens") for string in flags.tokens)
    else:
        strings = data.tokenizer.token_strings(range(data.lm.config.vocab_size))
        target = regex_target(flags.regex, strings, ends=flags.ends)
    sums = target_sums(data.lm, subject.coder, data.site, data.evaluation, subject.numbers, target, **options)
    if not sums.target[0]:
        raise InputError(f"the target stands at none of the {int(sums.places):,} tokens: give more --eval-tokens")
    scores = sums.scores()
    order, summary = ranking(getattr(scores, by)[:, 0]), {}
    if not flags.keep_outliers:
        left_out = outliers(subject, options)
        order, summary = order[~left_out[order]], {"outlier_features_left_out": int(left_out.sum())}
    columns = {name: getattr(scores, name)[order, 0] for name in Scores._fields}
    columns["fires"] = sums.fired[order]
    return Ranked(order, columns, {"tokens": int(sums.places), "target_tokens": int(sums.target[0]), **summary})


def outliers(subject: Subject, options: dict) -> np.ndarray:
    """`[n_features]` bool: those of first tokens and first delimiters on the first rows, see `Collected.outlier`."""
    data = subject.data
    strings = data.tokenizer.token_strings(range(data.lm.config.vocab_size))
    return collect(
        data.lm, data.site, data.evaluation, subject.numbers[:OUTLIER_ROWS], subject.coder, top=1, sample=1,
        coactive_tokens=1, bins=1, delimiters=delimiter_tokens(strings), **options,
    ).outlier  # fmt: skip


def search_the_task(flags: Flags, subject: Subject, lines: list, by: str, options: dict) -> Ranked:
    """Features that carry the right answer."""
    data = subject.data
    task = task_of(data, lines)
    found = search_task(
        data.lm,
        subject.coder,
        data.site,
        task,
        by=by,
        verify=flags.verify or None,
        last_only=flags.last_only,
        **options,
    )
    names, estimates = ("logit_difference", "cross_entropy"), found.attribution
    columns = {}
    for name in found.changes._fields:
        columns[name] = getattr(found.changes, name)
        columns[f"{name}_error"] = getattr(found.errors, name)
        if name in names:
            columns[f"{name}_estimated"] = getattr(estimates, name)[found.features]
    columns["active_in"] = estimates.active[found.features]
    summary = {
        "prompts": len(task.prompts),
        "active_features": int((estimates.active > 0).sum()),
        "ablated_features": len(found.features),
        "clean_logit_difference": estimates.clean_logit_difference,
        "clean_cross_entropy": estimates.clean_cross_entropy,
    }
    return Ranked(found.features, columns, summary)


def read_sets(flags: Flags) -> tuple[list[str], list[str]]:
    """Both sets of prompts."""
    _both(flags, "prompts_a", "prompts_b")
    if flags.prompts_a is None:
        raise InputError("--like-difference needs --prompts-a and --prompts-b")
    return read_prompts(flags.prompts_a, "--prompts-a"), read_prompts(flags.prompts_b, "--prompts-b")


def search_sets(flags: Flags, subject: Subject, sets: tuple, by: str, options: dict) -> Ranked:
    """Features that differ between two sets of prompts."""
    data = subject.data
    numbers = [by_prompt(data.lm, subject.coder, data.site, prompts_of(data, texts), **options) for texts in sets]
    found = compare(*(getattr(each, by) for each in numbers), permutations=flags.permutations, seed=flags.seed)
    order = found.order
    columns = {name: getattr(found, name)[order] for name in found._fields}
    return Ranked(order, columns, {"prompts_a": len(sets[0]), "prompts_b": len(sets[1])})


def read_suffixes(flags: Flags) -> tuple[str, list[str]]:
    """The pre-prompt, the suffixes."""
    _both(flags, "pre_prompt", "suffixes")
    return read_text(flags.pre_prompt, "--pre-prompt"), read_prompts(flags.suffixes, "--suffixes")


def search_pre_prompt(flags: Flags, subject: Subject, content: tuple, by: str, options: dict) -> Ranked:
    """Features that change on suffixes when the pre-prompt stands before them."""
    data = subject.data
    suffixes = suffixes_of(data, *content)
    reading = (data.lm, subject.coder, data.site, suffixes)
    found = prompt_diff(*reading, **options)
    order = found.order
    names = ("change", "error", "alone", "behind", "fired_alone", "fired_behind")
    columns = {name: getattr(found, name)[order] for name in names}
    start, shown = suffixes.starts[0], []
    for places in changed_places(*reading, order[: flags.count], **options):
        tokens = data.tokenizer.token_strings([suffixes.alone.tokens[q.suffix, start + q.token] for q in places])
        shown.append(
            [f"{q.suffix + 1}:{q.token + 1} {t!r} {q.alone:.2f} to {q.behind:.2f}" for q, t in zip(places, tokens)]
        )
    return Ranked(order, columns, {"suffixes": len(content[1]), "compared_tokens": found.places}, shown)


def read_direction(flags: Flags) -> tuple | None:
    """The prompts of a difference of means."""
    return read_sets(flags) if flags.like_difference else None


def search_direction(flags: Flags, subject: Subject, sets: tuple | None, by: str, options: dict) -> Ranked:
    """Features along a direction."""
    data, without = subject.data, None
    if flags.like_feature is not None:
        check_features(subject.coder, (flags.like_feature,))
        direction, without = np.asarray(subject.coder.directions())[flags.like_feature], flags.like_feature
    elif flags.like_token is not None:
        direction = unembedding(data.lm, one_token(data, flags.like_token, "--like-token"))
    else:
        direction = difference_of_means(data.lm, data.site, *(prompts_of(data, texts) for texts in sets), **options)
    found = similarity(subject.coder, direction)
    columns = {name: value for name, value in found._asdict().items() if value is not None}
    if by not in columns:
        raise InputError(f"--by {by}: a {subject.coder.dictionary.kind} dictionary has no encoder directions")
    order = ranking(columns[by])
    order = order[order != without]
    return Ranked(order, {name: value[order] for name, value in columns.items()})


KINDS = {
    "target": Kind(lambda f: bool(f.tokens) or f.regex is not None,
                   ("f1", "precision", "recall", "correlation", "firing_correlation"), read_target, search_target),
    "task": Kind(lambda f: f.task is not None, ("logit_difference", "cross_entropy", "kl"),
                 lambda f: read_task(f.task), search_the_task),
    "prompts": Kind(lambda f: (f.prompts_a or f.prompts_b) is not None and not f.like_difference,
                    ("activation", "firing"), read_sets, search_sets),
    "pre-prompt": Kind(lambda f: (f.pre_prompt or f.suffixes) is not None, ("change",), read_suffixes,
                       search_pre_prompt),
    "direction": Kind(lambda f: f.like_feature is not None or f.like_token is not None or f.like_difference,
                      ("decoder", "encoder"), read_direction, search_direction),
}  # fmt: skip

WAYS = (
    "--tokens, --regex, --task, --prompts-a with --prompts-b, --pre-prompt with --suffixes, --like-feature, "
    "--like-token or --like-difference"
)


def kind_of(flags: Flags) -> tuple[str, str]:
    """(which kind of search the flags ask for, by what it ranks).

    Raises:
        InputError: none or several, or an order that it does not have.
    """
    asked = [name for name, kind in KINDS.items() if kind.wanted(flags)]
    likes = sum((flags.like_feature is not None, flags.like_token is not None, flags.like_difference))
    if len(asked) != 1 or likes > 1 or (flags.tokens and flags.regex is not None):
        raise InputError(f"give one search: {WAYS}")
    kind = KINDS[asked[0]]
    if flags.by is not None and flags.by not in kind.by:
        raise InputError(f"--by {flags.by}: this search ranks by {', '.join(kind.by)}")
    return asked[0], flags.by or kind.by[0]
