"""What `experiments.explain` does with its flags, from top to bottom."""

import json
import time
from pathlib import Path

from experiments import run_folder
from experiments.data import check_positive
from experiments.explain import Flags
from experiments.explain_cases import Chosen, choose, reasons, words
from experiments.explain_report import write_report
from experiments.reading import Subject, check_features, given_of, open_subject
from sparse_jax.errors import InputError
from sparse_jax.features.explain import (
    Cache,
    Case,
    Client,
    Endpoint,
    Estimate,
    Prices,
    cut,
    study,
    summarise,
)

# Flags that say how a run is carried out: they may differ on resume.
HOW = (
    *("concurrency", "requests_per_minute", "timeout", "tries"),
    *("price_in", "price_out", "max_cost", "estimate", "key_env"),
)
REPLIES, RECORDS = "replies.jsonl", "explanations.jsonl"


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    started = time.perf_counter()
    endpoint, prices = check(flags)
    if not flags.estimate:
        check_folder(flags)
    given = given_of(flags, "model", "revision", "site", "text", "eval_text")
    subject = open_subject(flags.dictionary, given, eval_tokens=flags.eval_tokens)
    check_features(subject.coder, flags.features)
    fragments = cut(subject.data.evaluation, subject.numbers, flags.fragment)
    chosen = choose(flags, subject, fragments)
    print(words(subject, fragments, chosen), flush=True)
    if not chosen.cases:
        raise InputError("no feature is active in enough fragments: give more --eval-tokens, or other features")
    cases = chosen.cases
    planned = estimate(flags, endpoint, prices, cases) if endpoint else None
    if flags.estimate:
        return 0
    run_folder.begin(flags, {"dictionary": subject.coder.dictionary.kind, **subject.data.identity()}, also=(RECORDS,))
    if endpoint:
        explanations, found, asked = ask(flags, endpoint, prices, cases, planned)
    else:
        explanations, found, asked = without_endpoint(subject, chosen)
    final = {
        **asked,
        "fragments": len(fragments),
        "fragment_tokens": flags.fragment,
        "features": {basis: sum(case.basis == basis for case in cases) for basis in flags.basis},
        "active_enough": chosen.enough,
        "skipped": {basis: reasons(chosen.skipped[basis]) for basis in flags.basis},
        "disjoint_by": {by: sum(case.disjoint_by == by for case in cases) for by in ("document", "row")},
        "bases": summarise(cases, found),
        "seconds": time.perf_counter() - started,
    }
    write_records(flags.out / RECORDS, cases, explanations, found, chosen.skipped, asked["explained_by"])
    run_folder.write_json(flags.out / "metrics.json", final)
    write_report(flags, subject, cases, explanations, found, final)
    print_figures(final)
    print(f"explanations: {flags.out / RECORDS}; report: {flags.out / 'report.html'}")
    return 0


def check_folder(flags: Flags) -> None:
    """Raises InputError if the run folder cannot be used, or holds a run that had other flags."""
    run_folder.check_apart(flags.out, flags.dictionary)
    if earlier := run_folder.prepare(flags.out, overwrite=flags.overwrite, resume=flags.resume):
        before, now = (
            {name: value for name, value in each.items() if name not in HOW}
            for each in (earlier["flags"], run_folder.jsonable(flags))
        )
        run_folder.check_same(before, now, flags.out)


def check(flags: Flags) -> tuple[Endpoint | None, Prices]:
    """(whom to ask, prices), from the flags alone.

    Raises:
        InputError: a flag that cannot be used.
    """
    check_positive(flags, "count", "fragment", "eval_tokens")
    if flags.seed < 0 or min(flags.price_in, flags.price_out, flags.max_cost or 0) < 0:
        raise InputError("--seed, --price-in, --price-out and --max-cost cannot be negative")
    for name in ("score", "basis", "features", "baselines"):
        if len(set(getattr(flags, name))) < len(getattr(flags, name)):
            raise InputError(f"--{name} has the same twice")
    if not flags.score or not flags.basis:
        raise InputError("give at least one --score and one --basis")
    if flags.base_url is None:
        if flags.judge or flags.estimate:
            raise InputError("--judge and --estimate need an endpoint: give --base-url")
        return None, Prices()
    try:
        extra = json.loads(flags.extra)
    except ValueError as error:
        raise InputError(f"--extra is no JSON: {error}") from error
    if not isinstance(extra, dict):
        raise InputError("--extra: give a JSON object, such as '{\"temperature\": null}'")
    if flags.judge is None:
        raise InputError("--base-url needs --judge: the name of a model there")
    endpoint = Endpoint(
        flags.base_url,
        flags.judge,
        key_env=flags.key_env,
        logprobs=flags.logprobs,
        timeout=flags.timeout,
        tries=flags.tries,
        requests_per_minute=flags.requests_per_minute,
        concurrency=flags.concurrency,
        extra=extra,
    )
    endpoint.key()
    return endpoint, Prices(flags.price_in, flags.price_out, flags.max_cost)


def estimate(flags: Flags, endpoint: Endpoint, prices: Prices, cases: list[Case]) -> Estimate:
    """Print what is still to be asked.

    Raises:
        InputError: it may cost more than --max-cost.
    """
    with Cache(flags.out / REPLIES, read_only=True) as cache:
        found = study.plan(cases, flags.score, flags.baselines, (flags.seed,), endpoint, cache.get)
    print(prices.words(found), flush=True)
    prices.check(found)
    return found


def without_endpoint(subject: Subject, chosen: Chosen) -> tuple[list[str], list[dict[str, dict]], dict]:
    """What `ask` returns, by simple rules and means of tokens."""
    from experiments import explain_rules as rules

    strings = subject.data.tokenizer.token_strings(range(subject.data.lm.config.vocab_size))
    explained = rules.explain_by_rules(chosen.readings, subject.numbers, chosen.cases, strings)
    found = [
        {rules.RULE: {rules.SCORE: figures}} | study.without_judge(case)
        for case, (_, figures) in zip(chosen.cases, explained)
    ]
    return [words for words, _ in explained], found, {"explained_by": rules.EXPLAINED_BY, "judge": None}


def ask(
    flags: Flags, endpoint: Endpoint, prices: Prices, cases: list[Case], planned: Estimate
) -> tuple[list[str], list[dict[str, dict]], dict]:
    """(explanations, what was scored -> figures of each case, what was asked)."""
    from tqdm import tqdm

    with (
        Cache(flags.out / REPLIES) as cache,
        tqdm(total=planned.questions, desc="asking", unit="reply", mininterval=0.5) as bar,
    ):
        client = Client(endpoint, cache, prices)
        explanations, found = study.run(client, cases, flags.score, flags.baselines, (flags.seed,), bar.update)
    asked = {
        "explained_by": f"language model {flags.judge}",
        "judge": flags.judge,
        "base_url": flags.base_url,
        "estimated": vars(planned),
        "paid": client.paid | {"cost": client.spent},
    }
    return explanations, found, asked


def write_records(
    path: Path,
    cases: list[Case],
    explanations: list[str],
    found: list[dict[str, dict]],
    skipped: dict[str, dict[int, str]],
    explained_by: str,
) -> None:
    """One line for each feature: its explanation, all its scores, where its fragments stand; or why it was skipped."""
    lines = []
    for case, explanation, scores in zip(cases, explanations, found):
        parts = {name: getattr(case, name) for name in ("explaining", "top", "random", "silent")}
        lines.append(
            {
                "basis": case.basis,
                "feature": case.feature,
                "explanation": explanation,
                "explained_by": explained_by,
                "scores": scores,
                "maximum": case.maximum,
                "active_fragments": case.active_fragments,
                "disjoint_by": case.disjoint_by,
                "fragments": {
                    name: [{"row": e.row, "start": e.start, "document": e.document} for e in part]
                    for name, part in parts.items()
                },
            }
        )
    for basis, left_out in skipped.items():
        lines += [{"basis": basis, "feature": feature, "skipped": reason} for feature, reason in left_out.items()]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf8")
    temporary.replace(path)


def print_figures(final: dict) -> None:
    """Means with their standard errors."""
    print(f"\n{'basis':>12} {'scored':>12} {'score':>12} {'figure':>9} {'mean':>8} {'error':>8} {'n':>4}")
    for basis, of_basis in final["bases"].items():
        for subject, scores in of_basis.items():
            for score, figures in scores.items():
                for name, figure in figures.items():
                    if isinstance(figure, dict) and figure.get("n"):
                        error = "" if figure["error"] is None else f"{figure['error']:.3f}"
                        print(
                            f"{basis:>12} {subject:>12} {score:>12} {name:>9} {figure['mean']:8.3f} {error:>8} "
                            f"{figure['n']:4d}"
                        )
