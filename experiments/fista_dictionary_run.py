"""What `experiments.fista_dictionary` does with its flags: `train_sae`'s run, with another start and another step."""

import dataclasses
from functools import partial

import jax.numpy as jnp
from jax.sharding import Mesh

from experiments import run_folder, train_sae_run
from experiments.data import check_positive
from experiments.fista_dictionary import Flags
from experiments.replacement import read_provenance
from experiments.train_sae_run import by_adam
from sparse_jax.activations import Normaliser, Statistics, fit_normaliser
from sparse_jax.coding.learn import Learner, online, quadratic
from sparse_jax.dictionaries import Fista, Normalised, load
from sparse_jax.errors import InputError
from sparse_jax.numerics import unit_rows
from sparse_jax.training import Pace, TrainState, adam, init_state, settings_for
from sparse_jax.training.basis import LearnerAsOptimiser, frozen, make_basis_step
from sparse_jax.training.step import Step

# What the dictionary of --from-run must have been trained on, for its atoms to mean anything here.
SAME = ("model", "revision", "site")


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    check_positive(flags, "rate")
    if flags.resample_at:
        raise InputError(
            "--resample-at: atoms that were silent for --dead-window tokens start again by themselves here"
        )
    if flags.decoder_bias_start != "zero":
        raise InputError(
            "--decoder-bias-start: the decoder bias stays where it starts here, at 0 or that of --from-run"
        )
    if flags.learner != "adam" and (flags.accumulate, flags.feature_chunks, flags.offload) != (1, 1, False):
        raise InputError("--accumulate, --feature-chunks and --offload are for --learner adam here: leave them out")
    if flags.from_run is None and flags.learner == "frozen":
        raise InputError("--learner frozen needs the atoms of a run: give --from-run")
    trained = None
    if flags.from_run is not None:
        run_folder.check_apart(flags.out, flags.from_run)
        trained = starting_point(flags)
        n_features = trained.dictionary.n_features
        if flags.dictionary.n_features not in (0, n_features):
            raise InputError(
                f"--dictionary.n-features {flags.dictionary.n_features}: {flags.from_run} has {n_features}"
            )
        flags = dataclasses.replace(flags, dictionary=dataclasses.replace(flags.dictionary, n_features=n_features))
    return train_sae_run.run(flags, partial(start, trained=trained))


def starting_point(flags: Flags) -> Normalised:
    """The dictionary of --from-run.

    Raises:
        InputError: there is none, it was trained on something else, or its decoder is not one of directions.
    """
    provenance = read_provenance(flags.from_run)
    for name in SAME:
        if provenance.get(name) != getattr(flags, name):
            raise InputError(
                f"the dictionary in {flags.from_run} is of {name} {provenance.get(name)!r}, this run of "
                f"{getattr(flags, name)!r}: give --{name} {provenance.get(name)}"
            )
    trained = load(flags.from_run)
    if "W_dec" not in trained.params:
        raise InputError(f"the {trained.dictionary.kind} dictionary in {flags.from_run} has no decoder W_dec")
    return trained


def start(
    flags: Flags,
    dictionary: Fista,
    statistics: Statistics,
    pace: Pace,
    window: int,
    mesh: Mesh | None,
    trained: Normalised | None,
) -> tuple[TrainState, Step]:
    """Random atoms or a run's, and the step of the learner."""
    if flags.learner == "adam":
        state, step = by_adam(flags, dictionary, statistics, pace, window, mesh)
    else:
        learner = learner_of(flags)
        restart = flags.learner != "frozen"
        normaliser = fit_normaliser(flags.normalise, statistics.mean, statistics.variance)
        # The rate of no optimiser: settings have one all the same.
        settings = settings_for(dictionary, adam(flags.learning_rate), flags.target_l0)
        state = init_state(dictionary, LearnerAsOptimiser(learner), normaliser, flags.seed, settings)
        step = make_basis_step(dictionary, learner, flags.schedule, pace.total, window, restart_dead=restart, mesh=mesh)
    return (state if trained is None else with_atoms(state, trained)), step


def learner_of(flags: Flags) -> Learner:
    """The learner that the flags name."""
    return {"quadratic": lambda: quadratic(flags.rate), "online": online, "frozen": frozen}[flags.learner]()


def with_atoms(state: TrainState, trained: Normalised) -> TrainState:
    """The state with a trained dictionary's atoms at norm 1, its decoder bias and its normaliser."""
    params = state.params | {"W_dec": unit_rows(jnp.array(trained.params["W_dec"]))}
    if "b_dec" in state.params:
        params["b_dec"] = jnp.array(trained.params.get("b_dec", jnp.zeros_like(state.params["b_dec"])))
    normaliser = Normaliser(jnp.array(trained.normaliser.centre), jnp.array(trained.normaliser.scale))
    return dataclasses.replace(state, params=params, normaliser=normaliser)
