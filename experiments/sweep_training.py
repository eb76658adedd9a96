"""The training of `experiments.sweep`: every member on the same blocks."""

from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from experiments import scale
from experiments.data import Data, site_blocks, statistics_tokens
from experiments.measuring import measure_members
from experiments.sweep import Flags
from experiments.sweep_finish import member_entry, trained_members
from experiments.sweep_members import Choice, measured_steps
from experiments.training_run import (
    Resample,
    bias_start,
    kept_checkpoints,
    resampler,
    training_bar,
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
from sparse_jax.dictionaries import Normalised
from sparse_jax.training import (
    Group,
    Pace,
    adam,
    init_ensemble,
    make_ensemble_step,
    member_state,
    processes,
    run_ensemble,
    with_member,
)
from sparse_jax.training.ensemble import way_here
from sparse_jax.training.state import steps_taken

# What a member's line in metrics.jsonl holds when it is measured before the end.
ALONG_FIGURES = ("l0", "fvu", "ce_increase", "dead_fraction", "tokens_evaluated")


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
