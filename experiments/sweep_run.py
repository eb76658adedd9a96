"""What `experiments.sweep` does with its flags, from top to bottom."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence

import jax

from experiments import run_folder, scale
from experiments.data import Data, load_data, resolve_bos, summary
from experiments.plan_report import print_plan
from experiments.stored import with_store
from experiments.sweep import Flags
from experiments.sweep_finish import finish, trained_members
from experiments.sweep_members import Choice, check_k, choices
from experiments.sweep_report import print_table, usable, write_report
from experiments.sweep_training import measure_activations, train
from experiments.train_sae_run import centring, make_pace
from experiments.training_run import warn_of_missed_l0
from sparse_jax.activations import ActivationStore
from sparse_jax.dictionaries import to_json
from sparse_jax.errors import InputError
from sparse_jax.numerics.allocator import keep_freed_memory
from sparse_jax.numerics.precision import fast_dtype
from sparse_jax.numerics.whole import to_host
from sparse_jax.training import (
    Group,
    Member,
    Pace,
    Resampling,
    adam,
    check_bias_start,
    group,
    member_state,
    processes,
    read_lines,
    settings_for,
    total_rows,
)
from sparse_jax.training.state import steps_taken


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    with contextlib.ExitStack() as held:
        return _run(flags, held)


def _run(flags: Flags, held: contextlib.ExitStack) -> int:
    started = time.perf_counter()
    if flags.plan:
        flags, _ = with_store(flags)
        print_plan(flags, [(choice.site, choice.dictionary) for choice in choices(flags)])
        return 0
    flags, store, wanted = checked(flags)
    mesh = scale.mesh_of(flags)
    sites = dict(zip(flags.sites, load_data(flags, *flags.sites, store=store, mesh=mesh)))
    members = sized(flags, wanted, sites)
    groups, chosen = group([member for member, _ in members]), {member.name: choice for member, choice in members}
    scale.check_sizes(mesh, flags.batch, [(each.dictionary.n_features, len(each.members)) for each in groups])
    for data in sites.values():
        scale.check_same_data(flags, data)
    scale.check_memory(flags, mesh, [each.dictionary for each in groups])
    held.enter_context(run_folder.hold(flags.out))
    pace = make_pace(flags)
    processes.first_alone(lambda: begin(flags, list(sites.values()), groups, pace))
    by_site = {str(data.site): data for data in sites.values()}
    print(summary(list(by_site.values())))
    print(cost(flags, groups), flush=True)
    statistics, blocks = measure_activations(flags, by_site)
    print(centring(flags, statistics), flush=True)
    training_started = time.perf_counter()
    states, tokens_here = train(flags, by_site, groups, chosen, blocks, statistics, pace, mesh)
    train_seconds = time.perf_counter() - training_started
    if (done := steps_taken(states)) < pace.total:
        print(f"saved at step {done} of {pace.total}; continue with --resume")
        return scale.exit_code_when_stopped()
    for each, own in zip(groups, states):
        for i, member in enumerate(each.members):
            warn_of_missed_l0(to_host(member_state(own, i)), member.name)
    # On one device again, in one process: what follows is small beside training.
    seen = {
        member.name: total_rows(to_host(member_state(own, i).rows_seen))
        for each, own in zip(groups, states)
        for i, member in enumerate(each.members)
    }
    saved = {site: trained_members(groups, states, site, mesh) for site in by_site}
    block, by_site = scale.whole_block(blocks[0], blocks.spread), scale.sites_on_one_device(by_site)
    speed = tokens_here / train_seconds if tokens_here else None

    def report() -> None:
        final = finish(flags, by_site, chosen, saved, seen, block, statistics)
        tell(flags, final | {"tokens_per_second": speed, "seconds": time.perf_counter() - started})

    processes.first_alone(report)
    return 0


def checked(flags: Flags) -> tuple[Flags, ActivationStore | None, list[Choice]]:
    """The flags with what they resolve to, the store that they name and the members asked for; the folder may be used.

    Raises:
        InputError: what is asked for cannot be, told before anything is loaded or removed.
    """
    if flags.reuse_memory:
        keep_freed_memory()
    if flags.compute_dtype == "auto":  # config.json says what it came to: a resumed run must not choose anew
        flags = dataclasses.replace(flags, compute_dtype=fast_dtype())
    flags, store = with_store(flags)
    wanted = choices(flags)
    if flags.offload:
        raise InputError("--offload is for train_sae: moments of a sweep stay on the devices; leave it out")
    Resampling(flags.resample_at)
    check_bias_start(flags.dictionary, flags.decoder_bias_start)
    earlier = run_folder.prepare(flags.out, resume=flags.resume, overwrite=flags.overwrite)
    flags = resolve_bos(flags)
    if earlier is not None:
        run_folder.check_same(earlier["flags"], run_folder.jsonable(flags), flags.out)
    return flags, store, wanted


def tell(flags: Flags, final: dict) -> None:
    """Write the report and the figures, and print them."""
    along = usable([line for line in read_lines(flags.out / "metrics.jsonl") if "share" in line])
    write_report(flags.out, final, along)
    run_folder.write_json(flags.out / "metrics.json", final)
    print_table(final)
    speed, count = final["tokens_per_second"], len(final["members"])
    fast = f", {speed:,.0f} tokens/s" if speed else ""
    print(f"\n{count} dictionaries, {final['tokens_trained']:,} tokens{fast}; {final['seconds']:.0f} s in all")
    print(f"report: {flags.out / 'report.html'}   figures: {flags.out / 'metrics.json'}")


def begin(flags: Flags, sites: list[Data], groups: Sequence[Group], pace: Pace) -> None:
    """Make the run folder; a resumed run's is left as it is."""
    if flags.overwrite:
        run_folder.clear(flags.out)
    if not flags.resume:
        write_config(flags, sites, groups, pace)


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
