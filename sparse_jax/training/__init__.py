"""Floor 3: the step, schedules, the state, checkpoints, the loop, the floors of an evaluation, metric sinks."""

from sparse_jax.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Checkpoints": "checkpoints",
        "JsonLines": "sinks",
        "Optimisation": "step",
        "Pace": "loop",
        "Resampling": "resampling",
        "Schedule": "schedules",
        "SparsityTarget": "sparsity_control",
        "TrainState": "state",
        "adam": "step",
        "fit_floors": "floors",
        "init_state": "state",
        "make_resample": "resampling",
        "make_step": "step",
        "read_lines": "sinks",
        "reconstructor": "floors",
        "run": "loop",
        "total_rows": "state",
    },
)
