"""What a training run needs of each device, and how fast it can be at most: known before anything is allocated.

    work = Work(dictionary, MeshShape(data=8, features=8), batch=32768, config=config, site_layer=16)
    plan(work, CHIPS["v5p"]).fits

Bytes on a device: plan_bytes.py. Operations and what is sent: plan_traffic.py. Time of a step, a roofline:

    step      max(operations / rate, bytes through memory / bandwidth) + entries selected / rate of selecting
    model     the same of the language model's forward pass over the tokens of a step
    sent      sum over collectives of the bytes that a device sends / its link
    seconds   step + model + sent               nothing of what is sent is hidden behind work

At a chip's published peaks (chips.py) that is a bound, not a forecast: products reach a part of the peak, and what
passes between devices waits for the slowest. Left out: the start of programs and collectives, reading text, logs and
checkpoints. What is sent is counted at a link's whole rate however small it is.
"""

import contextlib
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sparse_jax.activations.blocks import CHUNK_ROWS
from sparse_jax.dictionaries.protocol import Dictionary
from sparse_jax.errors import InputError
from sparse_jax.training.chips import Chip
from sparse_jax.training.mesh import MeshShape, check_fits
from sparse_jax.training.plan_bytes import (
    block_bytes,
    forward_bytes,
    gradient_bytes,
    model_bytes,
    remembered_bytes,
    state_bytes,
    step_bytes,
)
from sparse_jax.training.plan_traffic import (
    Collective,
    collectives,
    model_flops,
    model_traffic,
    selected_entries,
    step_flops,
    step_traffic,
)

# Share of a device's memory that a plan may fill: the rest is the compiler's, and memory in pieces.
USABLE = 0.9


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        dictionary: sized, with its compute dtype.
        mesh: devices along each axis.
        batch: tokens in a step, of all devices.
        block_rows, context: rows of text in a block of activations, tokens in a row.
        config: of the language model that makes activations; None: there is none.
        stored: activations come from a store; the model is loaded all the same, for the measures at the end.
        site_layer: the layer that the model is run up to, itself included.
        accumulate: micro-batches of a step.
        feature_chunks: chunks of features that are worked on one after the other.
        offload: the optimiser's moments stay in the host's memory between steps.
        members: dictionaries that are trained together.
        optimiser: an Optax transform; None: Adam.
        tokens: of the run, for the size of its store.

    Raises:
        InputError: the mesh, or the micro-batches, do not divide the batch, or the mesh the features or members.
    """

    dictionary: Dictionary
    mesh: MeshShape = MeshShape()  # noqa: RUF009  frozen
    batch: int = 1024
    block_rows: int = 256
    context: int = 256
    config: Any = None
    stored: bool = False
    site_layer: int = 0
    accumulate: int = 1
    feature_chunks: int = 1
    offload: bool = False
    members: int = 1
    optimiser: Any = None
    tokens: int = 0

    def __post_init__(self):
        if not self.dictionary.d_in:
            raise InputError("a dictionary without a size cannot be planned for: use its `sized` with the site's width")
        check_fits(self.mesh, batch=self.batch, n_features=self.dictionary.n_features, members=self.members)
        if self.batch % (self.mesh.data * self.accumulate):
            raise InputError(
                f"accumulate {self.accumulate}: it does not divide the {self.batch // self.mesh.data} tokens of a "
                "batch on each device; give a divisor"
            )
        if self.dictionary.n_features % (self.mesh.features * self.feature_chunks):
            raise InputError(
                f"feature chunks {self.feature_chunks}: they do not divide the "
                f"{self.dictionary.n_features // self.mesh.features} features on each device; give a divisor"
            )

    @property
    def rows(self) -> int:
        """Rows of a step on a device."""
        return self.batch // self.mesh.data

    @property
    def members_here(self) -> int:
        """Members whose states are on one device."""
        return self.members // self.mesh.ensemble

    @property
    def harvests(self) -> bool:
        """Whether the language model runs during training."""
        return self.config is not None and not self.stored

    def sparse(self, cpu: bool) -> bool:
        """Whether the step takes TopK's sparse form: on a CPU, undivided, with few active features."""
        return cpu and self.mesh.data * self.mesh.features == 1 and getattr(self.dictionary, "sparse_gradient", False)


@dataclass(frozen=True)
class Part:
    """A part of a device's memory: its name, its bytes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What comes of it.

    Attributes:
        work, chip: for what, on what.
        memory: what lies on a device at the fullest moment.
        host: bytes in the host's memory for each device.
        store: bytes on disk of the run's activations in bfloat16, were they harvested first; 0: tokens are not known.
        flops: operations of a device in the step's products, as usual and while AuxK works; None: iterations decide.
        sent: what devices send each other.
        step_seconds, model_seconds, sent_seconds: what they take; None where it cannot be told.
    """

    work: Work
    chip: Chip
    memory: tuple[Part, ...]
    host: int
    store: int
    flops: tuple[float, float] | None
    sent: tuple[Collective, ...]
    step_seconds: float | None
    model_seconds: float
    sent_seconds: float

    @property
    def bytes(self) -> int:
        """On a device at the fullest moment."""
        return sum(part.bytes for part in self.memory)

    @property
    def fits(self) -> bool:
        """Whether a device has room for it, with a tenth to spare."""
        return self.bytes <= USABLE * self.chip.memory

    @property
    def seconds(self) -> float | None:
        """Of a step with its activations, at least."""
        return None if self.step_seconds is None else self.step_seconds + self.model_seconds + self.sent_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices, at most."""
        return None if self.seconds is None else self.work.batch / self.seconds

    def of(self, name: str) -> int:
        """Bytes of the part of this name."""
        return next(part.bytes for part in self.memory if part.name == name)


def plan(work: Work, chip: Chip) -> Plan:
    """The plan of a run on devices of one kind."""
    state = state_bytes(work)
    moments = state["opt_state"]
    making = step_bytes(work, chip.cpu)
    if work.offload:  # on the device while the optimiser runs
        making = max(making, gradient_bytes(work) + moments // work.members_here)
    d = work.dictionary.d_in
    memory = (
        Part("parameters", state["params"]),
        Part("learner state", 0 if work.offload else moments),
        Part("other state", state["rest"]),
        Part("while it steps", making),
        Part("batch", 4 * work.rows * (d + 1)),
        Part("block of activations", 2 * block_bytes(work)),
        Part("remembered blocks", remembered_bytes(work)),
        Part("language model", model_bytes(work)),
        Part("its forward pass", forward_bytes(work)),
    )
    flops, sent = step_flops(work, chip.cpu), collectives(work)
    rate = chip.rate(work.dictionary.compute_dtype)
    step_seconds = None
    if flops is not None:
        step_seconds = max(flops[0] / rate, step_traffic(work, chip.cpu) / chip.bandwidth)
        step_seconds += 0 if chip.selects is None else selected_entries(work) / chip.selects
    return Plan(
        work=work,
        chip=chip,
        memory=tuple(part for part in memory if part.bytes),
        host=moments if work.offload else 0,
        store=2 * d * work.tokens,
        flops=flops,
        sent=sent,
        step_seconds=step_seconds,
        model_seconds=max(model_flops(work) / rate, model_traffic(work) / chip.bandwidth),
        sent_seconds=sum(each.sent for each in sent) / chip.link,
    )


def advice(of: Plan) -> list[tuple[str, Plan]]:
    """For a plan that does not fit: changes after which it does, with their plans.

    The least change of each kind of one thing; where none is enough, of two.
    """
    single = [found for changes in _changes(of.work) if (found := _first_that_fits(changes, of.chip))]
    if single:
        return single
    double = []
    for changes in _changes(of.work):
        for says, work in changes:
            more = ((f"{says} and {other}", both) for each in _changes(work, but=says) for other, both in each)
            if found := _first_that_fits(more, of.chip):
                double.append(found)
                break
    return double


def _first_that_fits(changes: Iterable[tuple[str, Work]], chip: Chip) -> tuple[str, Plan] | None:
    for says, work in changes:
        changed = plan(work, chip)
        if changed.fits:
            return says, changed
    return None


# Factors by which things are changed.
_FACTORS = tuple(2**i for i in range(1, 11))


def _changes(work: Work, but: str = "") -> list[list[tuple[str, Work]]]:
    """For each kind of change, ever larger ones: what to say, the work after it; without the kind that `but` is of."""
    mesh, replace = work.mesh, dataclasses.replace
    wider = [replace(mesh, features=mesh.features * f) for f in _FACTORS]
    turned = [replace(m, data=mesh.data // f) for m, f in zip(wider, _FACTORS) if mesh.data % f == 0]
    made = {
        "the same": [(f"the same devices as {m}", {"mesh": m}) for m in turned],
        "more": [(f"more devices: {m.size} as {m}", {"mesh": m}) for m in wider],
        "--accumulate": [
            (f"--accumulate {f * work.accumulate}", {"accumulate": f * work.accumulate}) for f in _FACTORS
        ],
        "--batch": [(f"--batch {work.batch // f}", {"batch": work.batch // f}) for f in _FACTORS],
        "--feature-chunks": [
            (f"--feature-chunks {f * work.feature_chunks}", {"feature_chunks": f * work.feature_chunks})
            for f in _FACTORS
            if work.dictionary.kind == "l1"
        ],
        "--block-rows": [
            (f"--block-rows {work.block_rows // f}", {"block_rows": work.block_rows // f})
            for f in _FACTORS
            if work.block_rows // f % (CHUNK_ROWS * mesh.data) == 0
            and work.block_rows // f * work.context % work.batch == 0
        ],
        "--offload": [] if work.offload else [("--offload", {"offload": True})],
    }
    return [_possible(work, changes) for name, changes in made.items() if not (but and but.startswith(name))]


def _possible(work: Work, changes: list[tuple[str, dict]]) -> list[tuple[str, Work]]:
    found = []
    for says, fields in changes:
        if fields.get("block_rows", CHUNK_ROWS) and fields.get("batch", 1):
            with contextlib.suppress(InputError):
                found.append((says, dataclasses.replace(work, **fields)))
    return found
