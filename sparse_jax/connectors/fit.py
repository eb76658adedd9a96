"""Training a connector by gradients over shuffled batches of a pair, several members in one pass.

    fitted = fit(Linear(), pair, FitOptions(tokens=2_000_000), [Member({"alpha": a}) for a in (1e-3, 1e-2)])
    fitted.trained[0].predict(codes)

Everything happens in scaled units (x / input_norm, y / target_scale; see connector.py), so that one learning rate fits
all weights; parameters come back in the targets' own units. The l1 norm of the weights is the proximal step's
(proximal.py). Members see the same batches and run one compiled step, one after another: on a CPU a stacked state must
be copied in and out of a mapped step (see training/ensemble.py).

Memory: parameters x 3 for each member (weights and Adam's averages), one gradient, and an order of the tokens (8 bytes
each); codes stay where they are, memory maps on disk.
"""

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from sparse_jax.connectors.connector import Connector, Trained
from sparse_jax.connectors.fit_checkpoint import read_checkpoint, write_checkpoint
from sparse_jax.connectors.fit_run import FitOptions, FitRun, Member
from sparse_jax.connectors.paired_codes import Pair
from sparse_jax.connectors.scaling import Scales
from sparse_jax.errors import InputError
from sparse_jax.numerics.whole import to_host, to_local
from sparse_jax.training import processes

__all__ = ["FitOptions", "Fitted", "Member", "fit"]


@dataclass(frozen=True, eq=False)
class Fitted:
    """What training gives.

    Attributes:
        trained: one for each member, in the targets' own units.
        scales: units in which errors and weights were counted.
        history: rows {"step", "tokens", "member", terms..., "nonzero" (share of weights)}.
        steps: steps taken; fewer than planned where the run was stopped.
    """

    trained: tuple[Trained, ...]
    scales: Scales
    history: list[dict]
    steps: int


def fit(
    connector: Connector,
    pair: Pair,
    options: FitOptions = FitOptions(),  # noqa: B008  frozen
    members: Sequence[Member] = (Member(),),
    *,
    scales: Scales | None = None,
    start: Sequence[Trained] | None = None,
    keep_support: bool = False,
    checkpoint: Path | None = None,
    log: Callable[[dict], None] = lambda row: None,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    mesh: Mesh | None = None,
) -> Fitted:
    """Train a connector on a pair.

    Args:
        connector: the static choices; sized here, for the pair.
        pair: training tokens.
        members: in what several connectors differ that are trained in one pass.
        scales: units; None: by the options' rules, from the pair.
        start: where each member starts; None: at its seed's weights, and the bias at the targets' mean.
        keep_support: weights that are 0 at the start stay so, see refit.py; there is no l1 norm of weights then.
        checkpoint: a file; written now and then, and continued from where it exists, to the same bits.
        log: gets a row for each member now and then.
        progress: show a bar.
        should_stop: asked before each step.
        mesh: devices that share the work (`training.mesh.make_mesh`); see fit_mesh.py. Where they are of several
            processes each calls this with the same arguments, has all of the pair, and gets the same back.

    Raises:
        InputError: no members, too few tokens for a step, coefficients that the connector has not, a checkpoint of
            another run, codes that are not finite, training that diverges.
    """
    if start is not None and len(start) != len(members):
        raise InputError(f"{len(start)} starts of {len(members)} members: give one for each")
    run = FitRun.of(connector, pair, options, members, scales, keep_support, mesh)
    scales, own, steps = run.batches.scales, run.own, run.steps
    states, done = [run.start(i, start[i] if start else None) for i in range(len(members))], 0
    identity = run.identity()
    if checkpoint is not None and Path(checkpoint).exists():
        states, done = read_checkpoint(Path(checkpoint), states, identity)
        states = [run.placed(state) for state in states]
    history: list[dict] = []
    begun = done

    def save(done):
        if checkpoint is not None:
            whole = to_host(states)
            if processes.is_first():
                write_checkpoint(Path(checkpoint), whole, done, identity)

    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=steps * options.batch, initial=done * options.batch, unit="tok", disable=not progress)
        )
        ahead = stack.enter_context(ThreadPoolExecutor(1))
        coming = ahead.submit(run.batches.__getitem__, done) if done < steps else None
        while done < steps and not should_stop():
            batch = coming.result()
            coming = ahead.submit(run.batches.__getitem__, done + 1) if done + 1 < steps else None
            states, terms = run.step(states, batch, done)
            done += 1
            bar.update(options.batch)
            if done % options.log_every == 0 or done in (begun + 1, steps):
                rows = run.rows(states, terms, done)
                history += rows
                for row in rows:
                    log(row)
            if done % options.checkpoint_every == 0 and done < steps:
                save(done)
    if done > begun:
        save(done)
    states = states if mesh is None else to_local(states)
    ends = (jnp.array(scales.input_norm), jnp.array(scales.target_scale))
    trained = [Trained(each, each.in_own_units(state.params, *ends)) for each, state in zip(own, states)]
    return Fitted(tuple(trained), scales, history, done)
