"""What `experiments.sweep` does with its flags, from top to bottom."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from experiments import run_folder, scale
from experiments.data import Data, load_data, passes, resolve_bos, site_blocks, statistics_tokens, summary
from experiments.measuring import measure_members
from experiments.plan_report import print_plan
from experiments.stored import with_store
from experiments.sweep import Flags
from experiments.sweep_members import Choice, check_k, choices, knob, measured_steps
from experiments.sweep_report import print_table, usable, write_report
from experiments.train_sae_run import FLOOR_FIGURES, centring, make_pace, provenance
from experiments.training_run import (
    Resample,
    bias_start,
    kept_checkpoints,
    resampler,
    training_bar,
    warn_of_missed_l0,
    with_started_bias,
)
from sparse_jax.activations import (
    Normaliser,
    RememberedBlocks,
    SiteBlock,
    Statistics,
    collect_site_statistics,
    fit_normaliser,
)
from sparse_jax.activations.spread import Spread
from sparse_jax.dictionaries import Normalised, save, to_json
from sparse_jax.errors import InputError
from sparse_jax.metrics import fronts
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
    init_ensemble,
    make_ensemble_step,
    member_state,
    processes,
    read_lines,
    run_ensemble,
    settings_for,
    total_rows,
    with_member,
)
from sparse_jax.training.ensemble import trained, way_here
from sparse_jax.training.state import steps_taken

# What a member's line in metrics.jsonl holds when it is measured before the end.
ALONG_FIGURES = ("l0", "fvu", "ce_increase", "dead_fraction", "tokens_evaluated")


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
    if flags.reuse_memory:
        keep_freed_memory()
    if flags.compute_dtype == "auto":  # config.json says what it came to: a resumed run must not choose anew
        flags = dataclasses.replace(flags, compute_dtype=fast_dtype())
    flags, store = with_store(flags)
    wanted = choices(flags)
    if flags.offload:
        raise InputError("--offload is for train_sae: moments of a sweep stay on the devices; leave it out")
    Resampling(flags.resample_at)  # what cannot be is told before anything is loaded or removed
    check_bias_start(flags.dictionary, flags.decoder_bias_start)
    earlier = run_folder.prepare(flags.out, resume=flags.resume, overwrite=flags.overwrite)
    flags = resolve_bos(flags)
    if earlier is not None:
        run_folder.check_same(earlier["flags"], run_folder.jsonable(flags), flags.out)
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
        final |= {"tokens_per_second": speed, "seconds": time.perf_counter() - started}
        along = usable([line for line in read_lines(flags.out / "metrics.jsonl") if "share" in line])
        write_report(flags.out, final, along)
        run_folder.write_json(flags.out / "metrics.json", final)
        print_table(final)
        fast = f", {speed:,.0f} tokens/s" if speed else ""
        print(
            f"\n{len(members)} dictionaries, {final['tokens_trained']:,} tokens{fast}; {final['seconds']:.0f} s in all"
        )
        print(f"report: {flags.out / 'report.html'}   figures: {flags.out / 'metrics.json'}")

    processes.first_alone(report)
    return 0


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


def measure_activations(flags: Flags, by_site: dict[str, Data]) -> tuple[dict[str, Statistics], RememberedBlocks]:
    """Statistics of each site over the first training blocks (kept in the run folder), and the blocks of all sites."""
    data = next(iter(by_site.values()))
    sites, width = list(by_site.values()), sum(each.width for each in by_site.values())
    # Training starts with the blocks that the statistics are made of.
    blocks = RememberedBlocks(site_blocks(sites, flags.seed, {}), width)
    paths = {site: flags.out / "dictionaries" / site / "statistics.npz" for site in by_site}
    if flags.resume and all(path.exists() for path in paths.values()):
        statistics = {site: Statistics.load(path) for site, path in paths.items()}
    else:
        wanted = statistics_tokens(flags, data.train)
        statistics = collect_site_statistics(blocks, max(1, wanted // blocks.tokens_per_block))
        for site, path in paths.items() if processes.is_first() else ():
            path.parent.mkdir(parents=True, exist_ok=True)
            statistics[site].save(path)
    if flags.drop_outliers:
        limits = {site: data.outlier_ratio * each.median_norm for site, each in statistics.items()}
        blocks = RememberedBlocks(site_blocks(sites, flags.seed, limits), width)
    return statistics, blocks


def train(
    flags: Flags,
    by_site: dict[str, Data],
    groups: Sequence[Group],
    chosen: dict[str, Choice],
    blocks: RememberedBlocks,
    statistics: dict[str, Statistics],
    pace: Pace,
    mesh: Mesh | None,
) -> tuple[tuple, int]:
    """The groups' states at the end, or where the run was asked to stop; and the tokens that this call trained on."""
    optimisation = adam(flags.learning_rates[0])  # each member's own is in its settings
    window = min(flags.dead_window, flags.tokens // 4)
    normalisers = {site: fit_normaliser(flags.normalise, each.mean, each.variance) for site, each in statistics.items()}
    way = way_here(mesh=mesh)
    states = tuple(init_ensemble(each, optimisation.transform, normalisers[each.site], way) for each in groups)
    chunks = scale.chunks_of(flags)
    steps = tuple(
        make_ensemble_step(each, optimisation, flags.schedule, pace.total, window, way=way, mesh=mesh, chunks=chunks)
        for each in groups
    )
    lines = scale.lines_of(flags)
    identity = {site: data.identity() for site, data in by_site.items()}
    with kept_checkpoints(flags, flags.out / "checkpoints", identity) as checkpoints:
        if flags.resume and checkpoints.latest() is not None:
            states = checkpoints.restore(scale.placed(states, mesh, members=way == "vmap"))
            print(f"resumed at step {steps_taken(states)} of {pace.total}")
        else:
            states = with_started_biases(flags, groups, states, normalisers, blocks)
            states = scale.placed(states, mesh, members=way == "vmap")
        first = steps_taken(states)
        lines.truncate_after(first)
        resample = resampled(flags, groups, pace, window, lines.write, blocks.spread)
        measure = measurer(flags, by_site, groups, chosen, statistics, pace, lines.write, mesh)

        def after_step(states: tuple, block: SiteBlock, done: int) -> tuple:
            states = resample(states, block, done)
            measure(states, done)
            return states

        with scale.stop_request(first) as stop, training_bar(pace, first) as bar:
            states = run_ensemble(
                states,
                steps,
                groups,
                blocks,
                pace,
                log=lines.write,
                checkpoints=checkpoints,
                after_step=after_step,
                should_stop=stop,
                progress=bar.update,
            )
    return states, (steps_taken(states) - first) * pace.batch


def with_started_biases(
    flags: Flags,
    groups: Sequence[Group],
    states: tuple,
    normalisers: dict[str, Normaliser],
    blocks: RememberedBlocks,
) -> tuple:
    """The states before the first step, every member's decoder bias where `train_sae` starts it, found once a site."""
    if flags.decoder_bias_start == "zero":
        return states
    block = scale.whole_block(blocks[0], blocks.spread)
    centres = {site: bias_start(flags, block.at(site), normaliser) for site, normaliser in normalisers.items()}
    made = []
    for each, own in zip(groups, states):
        for i, member in enumerate(each.members):
            started = with_started_bias(member.dictionary, member_state(own, i), centres[each.site])
            own = with_member(own, i, started)
        made.append(own)
    return tuple(made)


def resampled(
    flags: Flags,
    groups: Sequence[Group],
    pace: Pace,
    window: int,
    log: Callable[[dict], None],
    spread: Spread | None = None,
) -> Callable[[tuple, SiteBlock, int], tuple]:
    """The `resampler` of all members, with a line in the log for each."""

    def change(states: tuple, block: SiteBlock, done: int, resample: Resample) -> tuple:
        made = []
        for each, own in zip(groups, states):
            here = block.at(each.site)
            for i, member in enumerate(each.members):
                state, count = resample(member.dictionary, member_state(own, i), here.x, here.weight)
                log({"step": done, "member": member.name, "resampled": count})
                own = with_member(own, i, state)
            made.append(own)
        return tuple(made)

    # A member's own dictionary encodes with its own k.
    own_dictionaries = {member.dictionary for each in groups for member in each.members}
    return resampler(flags, own_dictionaries, pace, window, change, spread)


def measurer(
    flags: Flags,
    by_site: dict[str, Data],
    groups: Sequence[Group],
    chosen: dict[str, Choice],
    statistics: dict[str, Statistics],
    pace: Pace,
    log: Callable[[dict], None],
    mesh: Mesh | None,
) -> Callable[[tuple, int], None]:
    """What measures every member at the shares of the run that are asked for, but at its end: one line for each."""
    at = measured_steps(flags)
    by_site = scale.sites_on_one_device(by_site) if set(at) - {pace.total} else by_site

    def measure(states: tuple, done: int) -> None:
        if done in at and done != pace.total:
            saved = {site: trained_members(groups, states, site, mesh) for site in by_site}
            processes.first_alone(lambda: measure_here(saved, done))

    def measure_here(saved: dict[str, dict[str, Normalised]], done: int) -> None:
        for site, data in by_site.items():
            members = saved[site]
            measured, _ = measure_members(
                data,
                members,
                statistics[site],
                eval_tokens=flags.measure_tokens,
                seed=flags.seed,
                drop=flags.drop_outliers,
            )
            for name, figures in measured.figures.items():
                entry = member_entry(site, chosen[name], members[name])
                kept = {key: figures[key] for key in ALONG_FIGURES}
                log({"step": done, "member": name, "share": at[done], **entry, **kept})

    return measure


def trained_members(
    groups: Sequence[Group], states: Sequence, site: str, mesh: Mesh | None = None
) -> dict[str, Normalised]:
    """The dictionaries of a site as they are measured and saved, on one device, by their members' names."""
    return {
        member.name: scale.on_one_device(trained(each, own, i), mesh)
        for each, own in zip(groups, states)
        if each.site == site
        for i, member in enumerate(each.members)
    }


def finish(
    flags: Flags,
    by_site: dict[str, Data],
    chosen: dict[str, Choice],
    trained: dict[str, dict[str, Normalised]],
    seen: dict[str, int],
    block: SiteBlock,
    statistics: dict[str, Statistics],
) -> dict:
    """Save and measure every member; returns what goes into `metrics.json`.

    Args:
        flags, by_site, chosen, statistics: of the run.
        trained: site -> its members by name.
        seen: member -> tokens it was trained on.
        block: the first one of training.
    """
    data = next(iter(by_site.values()))
    members, floors, clean, masks = [], [], {}, {}
    for site, here in by_site.items():
        saved = trained[site]
        for name, dictionary in saved.items():
            card = provenance(here, statistics[site], seen[name], chosen[name].seed) | {"order_seed": flags.seed}
            save(flags.out / "dictionaries" / name, dictionary, card)
        measured, site_floors = measure_members(
            here,
            saved,
            statistics[site],
            block.at(site),
            eval_tokens=flags.eval_tokens,
            seed=flags.seed,
            drop=flags.drop_outliers,
        )
        for name, dictionary in saved.items():
            entry = {**member_entry(site, chosen[name], dictionary), "tokens_trained": seen[name]}
            members.append({**entry, **finite(measured.figures[name]), "unmasked": finite(measured.unmasked[name])})
        kept = ("floor", "k", *FLOOR_FIGURES)
        floors += [{"site": site, **{key: floor[key] for key in kept}} for floor in site_floors]
        clean[site] = {key: members[-1][key] for key in ("ce_clean", "ce_zero", "ce_mean")}
        masks[site] = measured.mask
    return {
        "model": flags.model,
        "revision": flags.revision,
        "text": flags.text,
        "held_out": data.evaluation.documents,
        "dictionary": flags.dictionary.kind,
        "knob": "target L0" if flags.target_l0s else knob(flags.dictionary),
        "seeds": flags.seeds,
        "tokens_trained": max(seen.values()),
        "epochs": passes(flags.tokens, data.train),
        "tokens_evaluated": members[0]["tokens_evaluated"],
        "normalise": flags.normalise,
        "mean_over_std": {site: each.mean_over_std for site, each in statistics.items()},
        "clean": clean,
        "masks": masks,
        "members": members,
        "floors": floors,
        "fronts": fronts(usable(members)),
    }


def finite(figures: dict) -> dict:
    """The figures with None for what is not finite: JSON has no such number. A member may have diverged."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def member_entry(site: str, choice: Choice, trained: Normalised) -> dict:
    """What a member is, for its figures in metrics.json and metrics.jsonl."""
    return {
        "name": choice.name,
        "site": site,
        "n_features": trained.dictionary.n_features,
        "learning_rate": choice.learning_rate,
        "sparsity": choice.sparsity,
        "seed": choice.seed,
    }
