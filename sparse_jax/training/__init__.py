"""Floor 3: the step, schedules, the state, checkpoints, the loop, the floors of an evaluation, metric sinks."""

from sparse_jax.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Checkpoints": "checkpoints",
        "Controller": "sparsity_control",
        "Group": "ensemble",
        "JsonLines": "sinks",
        "Member": "ensemble",
        "Optimisation": "step",
        "Pace": "loop",
        "Resampling": "resampling",
        "Schedule": "schedules",
        "Settings": "state",
        "TrainState": "state",
        "adam": "step",
        "check_target": "sparsity_control",
        "fit_floors": "floors",
        "group": "ensemble",
        "init_ensemble": "ensemble",
        "init_state": "state",
        "make_ensemble_step": "ensemble",
        "make_resample": "resampling",
        "make_step": "step",
        "member_state": "ensemble",
        "read_lines": "sinks",
        "reconstructor": "floors",
        "run": "loop",
        "run_ensemble": "loop",
        "settings_for": "state",
        "total_rows": "state",
        "with_member": "ensemble",
    },
)
