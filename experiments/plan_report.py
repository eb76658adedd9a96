"""`--plan`: what a run would need of each device, and how fast it can be at most, for the terminal.

Nothing is loaded but the model's config.json, nothing is allocated, and the devices of the mesh need not be there: only
with `--plan-chip this-cpu` this machine's speed is measured, for some seconds.
"""

from collections.abc import Sequence
from typing import Any

from sparse_jax.dictionaries import Dictionary
from sparse_jax.lm.family import family_of
from sparse_jax.lm.load import read_config_json, resolve
from sparse_jax.lm.model import check_site, site_width
from sparse_jax.numerics.precision import fast_dtype
from sparse_jax.training.chips import THIS_CPU, Chip, chip_of
from sparse_jax.training.mesh import MeshShape
from sparse_jax.training.plan import USABLE, Plan, Work, advice, plan


def print_plan(flags: Any, members: Sequence[tuple[str, Dictionary]]) -> None:
    """Print the plan of a run, one for each site and width of dictionaries.

    Args:
        flags: the experiment's.
        members: (site, dictionary as the flags give it, without its width) of each that is trained.

    Raises:
        InputError: no such chip, model or site; a mesh that does not divide what it must.
    """
    chip, plans = chip_of(flags.plan_chip), []
    for work, count in works(flags, members, chip).items():
        plans.append(made := plan(work, chip))
        print(text_of(made, flags.tokens))
        if len(members) > count:
            print(f"({count} of {len(members)} dictionaries)\n")
    if len(plans) > 1:
        kept = sum(made.of("parameters") + made.of("learner state") for made in plans if not made.work.offload)
        print(f"all groups are in memory together: {_size(kept)} of parameters and moments on a device")


def works(flags: Any, members: Sequence[tuple[str, Dictionary]], chip: Chip) -> dict[Work, int]:
    """The works of groups of like dictionaries -> how many are in each."""
    raw = read_config_json(resolve(flags.model, flags.revision))
    config = family_of(raw.get("model_type")).read_config(raw)
    dtype = flags.compute_dtype
    if dtype == "auto":
        dtype = fast_dtype() if chip.name == THIS_CPU else "bfloat16"
    groups: dict[tuple, list[Dictionary]] = {}
    for name, dictionary in members:
        site = check_site(config, name)
        sized = dictionary.sized(site_width(config, site), compute_dtype=dtype)
        groups.setdefault((site, type(sized), sized.n_features), []).append(sized)
    found = {}
    for (site, *_), alike in groups.items():
        work = Work(
            dictionary=max(alike, key=lambda each: getattr(each, "k", 0)),
            mesh=MeshShape.parse(flags.mesh or ""),
            batch=flags.batch,
            block_rows=flags.block_rows,
            context=flags.context,
            config=config,
            stored=flags.store is not None,
            site_layer=site.layer,
            accumulate=flags.accumulate,
            feature_chunks=flags.feature_chunks,
            offload=flags.offload,
            members=len(alike),
            tokens=flags.tokens,
        )
        found[work] = len(alike)
    return found


def text_of(made: Plan, tokens: int) -> str:
    """A plan as a table for the terminal."""
    work, chip = made.work, made.chip
    dictionary = work.dictionary
    lines = [
        f"plan of {dictionary.kind}, d {dictionary.d_in}, {dictionary.n_features:,} features, "
        f"{dictionary.compute_dtype} products, batch {work.batch:,}, on {work.mesh.size} x {chip.name} as {work.mesh}",
        "",
        "memory of a device",
        *(f"  {part.name:<34} {_size(part.bytes):>12}" for part in made.memory),
        f"  {'in all':<34} {_size(made.bytes):>12}   of {_size(chip.memory)}: {_verdict(made)}",
    ]
    if made.host:
        lines.append(f"  {'(moments, in its host)':<34} {_size(made.host):>12}")
    if made.store:
        lines.append(f"  {'(a store of all tokens, on disk)':<34} {_size(made.store):>12}   in bfloat16")
    lines += ["", "sent by a device in a step"]
    for each in made.sent:
        over = f"{each.kind} over {each.axis}={each.devices}"
        lines.append(f"  {each.what:<34} {_size(each.sent):>12}   {over}, {_time(each.sent / chip.link)}")
    lines += [] if made.sent else ["  nothing"]
    lines += ["", *_speed(made, tokens)]
    if not made.fits:
        found = advice(made)
        lines += [
            "",
            "it would fit with" if found else "nothing that was tried makes it fit: another chip, more changes",
        ]
        lines += [f"  {says:<64} {_size(other.bytes):>10}, {_rate(other)}" for says, other in found]
    return "\n".join(lines)


def _speed(made: Plan, tokens: int) -> list[str]:
    if made.seconds is None:
        return [f"its speed is not predicted: iterations of {made.work.dictionary.kind} end where its rows are done"]
    usual, aux = made.flops
    measured = made.chip.name == THIS_CPU
    lines = [
        f"a step takes at least {_time(made.seconds)}: {_time(made.step_seconds)} the dictionary's, "
        f"{_time(made.model_seconds)} the language model's, {_time(made.sent_seconds)} sending",
        f"  {usual:.3g} operations of a device"
        + (f", {aux:.3g} while AuxK revives dead features" if aux > usual else ""),
        f"at most {_rate(made)}; {tokens:,} tokens in {_time(tokens / made.tokens_per_second)}",
    ]
    lines.append(
        "  rates are what this CPU reached just now" if measured else "  at published peaks: a bound, not a forecast"
    )
    return lines


def _verdict(made: Plan) -> str:
    return "fits" if made.fits else f"does not fit (a plan may fill {USABLE:.0%})"


def _rate(made: Plan) -> str:
    return "" if made.tokens_per_second is None else f"{made.tokens_per_second:,.0f} tokens/s"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} B"


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1e3 * seconds:,.3g} ms"
