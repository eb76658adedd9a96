"""The flags that say over how many devices and processes a training run goes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScaleFlags:
    """Mesh, processes and memory. They do not change what is computed (but for the order of sums, and for what
    --accumulate says): a run may be resumed with others."""

    mesh: str | None = None
    """Devices along each axis: data (batches), features (dictionaries, and the language model's weights), ensemble
    (members of a sweep), as data=8,features=4. By default one device; with --distributed all along data."""
    distributed: bool = False
    """Several processes: start the same command once for each. On a TPU pod or under Slurm JAX finds out about the
    others; elsewhere give --coordinator, --processes and --process-id. All must see the same --out."""
    coordinator: str | None = None
    """host:port of process 0, at which the others reach it; it listens at that address alone."""
    processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    timeout: float = 100.0
    """Seconds in which all processes must have come, and in which the others end when one dies."""
    plan: bool = False
    """Print what the run would need of each device, and its predicted speed, and end. Nothing is loaded, and the
    devices of --mesh need not be there."""
    plan_chip: str = "v5e"
    """What --plan is for: v4, v5e, v5p, v6e, a100, h100, or this-cpu, whose speed is measured."""
    accumulate: int = 1
    """Cut each batch into so many micro-batches, whose gradients are added up: less memory at a time, the same step.
    batch-topk and matryoshka select in each micro-batch by itself."""
    feature_chunks: int = 1
    """Work on the features in so many chunks (l1): no array of tokens by features exists, for a sixth product."""
    offload: bool = False
    """Keep Adam's moments in the host's memory between steps (TPU, GPU; with --mesh; not in a sweep)."""


# They may differ on resume.
NAMES = tuple(ScaleFlags.__dataclass_fields__)
# Of these no two processes have the same.
OWN = ("process_id",)
