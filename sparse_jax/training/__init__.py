"""Floor 3: the step, schedules, the state, checkpoints, the loop, the floors of an evaluation, metric sinks."""

from sparse_jax.training.checkpoints import Checkpoints
from sparse_jax.training.floors import fit_floors, reconstructor
from sparse_jax.training.loop import Pace, run
from sparse_jax.training.schedules import Schedule
from sparse_jax.training.sinks import JsonLines, read_lines
from sparse_jax.training.state import TrainState, init_state, total_rows
from sparse_jax.training.step import Optimisation, adam, make_step

__all__ = [
    "Checkpoints",
    "JsonLines",
    "Optimisation",
    "Pace",
    "Schedule",
    "TrainState",
    "adam",
    "fit_floors",
    "init_state",
    "make_step",
    "read_lines",
    "reconstructor",
    "run",
    "total_rows",
]
