"""Floor 3: the step, schedules, the state, checkpoints, the loop, the floors of an evaluation, metric sinks."""

from sparse_jax.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Checkpoints": "checkpoints",
        "Controller": "sparsity_control",
        "JsonLines": "sinks",
        "Optimisation": "step",
        "Pace": "loop",
        "Resampling": "resampling",
        "Schedule": "schedules",
        "Settings": "state",
        "TrainState": "state",
        "adam": "step",
        "check_target": "sparsity_control",
        "fit_floors": "floors",
        "init_state": "state",
        "make_resample": "resampling",
        "make_step": "step",
        "read_lines": "sinks",
        "reconstructor": "floors",
        "run": "loop",
        "settings_for": "state",
        "total_rows": "state",
    },
)
