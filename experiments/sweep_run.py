"""What `experiments.sweep` does with its flags, from top to bottom."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax

from experiments import command, run_folder
from experiments.data import Data, load_data, resolve_bos, summary
from experiments.measuring import measure_members
from experiments.sweep import Flags
from experiments.sweep_members import Choice, check_k, choices, knob
from experiments.sweep_report import print_table, write_report
from experiments.train_sae_run import FLOOR_FIGURES, make_pace, provenance
from sparse_jax.activations import Block, Statistics, fit_normaliser
from sparse_jax.dictionaries import Normalised, save, to_json
from sparse_jax.metrics import fronts
from sparse_jax.numerics.allocator import keep_freed_memory
from sparse_jax.numerics.precision import fast_dtype
from sparse_jax.training import (
    Checkpoints,
    Group,
    JsonLines,
    Member,
    Pace,
    Resampling,
    adam,
    group,
    init_ensemble,
    make_ensemble_step,
    make_resample,
    member_state,
    read_lines,
    settings_for,
    total_rows,
    with_member,
)

# What a member's line in metrics.jsonl holds when it is measured before the end.
ALONG_FIGURES = ("l0", "fvu", "ce_increase", "dead_fraction", "tokens_evaluated")


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    started = time.perf_counter()
    if flags.reuse_memory:
        keep_freed_memory()
    if flags.compute_dtype == "auto":  # config.json says what it came to: a resumed run must not choose anew
        flags = dataclasses.replace(flags, compute_dtype=fast_dtype())
    wanted = choices(flags)
    Resampling(flags.resample_at)  # what cannot be is told before anything is loaded or removed
    earlier = run_folder.prepare(flags.out, resume=flags.resume, overwrite=flags.overwrite)
    flags = resolve_bos(flags)
    if earlier is not None:
        run_folder.check_same(earlier["flags"], run_folder.jsonable(flags), flags.out)
    sites = dict(zip(flags.sites, load_data(flags, *flags.sites)))
    members = {member.name: (member, choice) for member, choice in sized(flags, wanted, sites)}
    if flags.overwrite:
        run_folder.clear(flags.out)
    groups = group([member for member, _ in members.values()])
    pace = make_pace(flags)
    if not flags.resume:
        write_config(flags, list(sites.values()), groups, pace)
    by_site = {str(data.site): data for data in sites.values()}
    print(summary(list(by_site.values())))
    print(cost(flags, groups), flush=True)
    stream = measure_activations(flags, by_site)
    training_started = time.perf_counter()
    states, tokens_here = train(flags, by_site, groups, members, stream, pace)
    train_seconds = time.perf_counter() - training_started
    done = steps_taken(states)
    if done < pace.total:
        print(f"saved at step {done} of {pace.total}; continue with --resume")
        return command.EXIT_INTERRUPTED
    tokens_trained = save_members(flags, by_site, groups, states, stream)
    final = final_figures(flags, by_site, groups, states, members, stream, tokens_trained)
    final |= {
        "tokens_per_second": tokens_here / train_seconds if train_seconds else None,
        "seconds": time.perf_counter() - started,
    }
    along = [line for line in read_lines(flags.out / "metrics.jsonl") if "share" in line]
    write_report(flags.out, final, along)
    run_folder.write_json(flags.out / "metrics.json", final)
    print_table(final)
    speed = f", {final['tokens_per_second']:,.0f} tokens/s" if tokens_here else ""
    print(f"\n{len(members)} dictionaries{speed}; {final['seconds']:.0f} s in all")
    print(f"report: {flags.out / 'report.html'}   figures: {flags.out / 'metrics.json'}")
    return 0


def sized(flags: Flags, wanted: Sequence[Choice], sites: dict[str, Data]) -> list[tuple[Member, Choice]]:
    """The members for the widths of their sites; their names are the paths of their folders under dictionaries/."""
    made = []
    for choice in wanted:
        data = sites[choice.site]
        dictionary = choice.dictionary.sized(data.width, compute_dtype=flags.compute_dtype)
        check_k(dictionary.n_features, [choice.sparsity], dictionary)
        settings = settings_for(dictionary, adam(choice.learning_rate), choice.target_l0)
        name = f"{data.site}/{choice.name}"
        made.append((Member(str(data.site), dictionary, settings, choice.seed, name), choice))
    return made


def write_config(flags: Flags, sites: list[Data], groups: Sequence[Group], pace: Pace) -> None:
    """`config.json`: every flag, what they resolved to, every member, versions and device."""
    members = {
        member.name: {"dictionary": to_json(member.dictionary), "seed": member.seed}
        for each in groups
        for member in each.members
    }
    resolved = {"steps": pace.total, "sites": [data.identity() for data in sites], "members": members}
    flags.out.mkdir(parents=True, exist_ok=True)
    content = {"flags": run_folder.jsonable(flags), "resolved": resolved, "environment": run_folder.environment()}
    run_folder.write_json(flags.out / "config.json", content)


def cost(flags: Flags, groups: Sequence[Group]) -> str:
    """What is about to be trained, in one line."""
    count = sum(len(each.members) for each in groups)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(each.dictionary.init, jax.random.key(0))))
        for each in groups
    ]
    numbers = sum(size * len(each.members) for size, each in zip(sizes, groups))
    # A parameter and Adam's two moments, float32 each.
    return (
        f"{_counted(count, 'dictionary', 'dictionaries')} in {_counted(len(groups), 'group', 'groups')}, one pass over "
        f"{flags.tokens:,} tokens ({count * flags.tokens:,} dictionary-tokens); {12 * numbers / 1e9:.2f} GB of "
        "parameters and moments"
    )


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def trained_members(groups: Sequence[Group], states: Sequence, site: str) -> dict[str, Normalised]:
    """The dictionaries of a site as they are measured and saved, by their members' names."""
    return {
        member.name: trained(each, state, i)
        for each, state in zip(groups, states)
        if each.site == site
        for i, member in enumerate(each.members)
    }
