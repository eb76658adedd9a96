"""Operations, bytes through memory and bytes between devices of a training step: what a plan's times are made of.

Operations in products. A product over all rows and features of a device is 2 r d m operations, with r = batch / data
and m = n / features. L1, TopK, BatchTopK and JumpReLU have 5 of them (encode, decode, the error's gradient in the
codes, one for each matrix; dense_gradient.py), and AuxK, while features are dead, 5 more; what other kinds have is in
`PRODUCTS`. In chunks of features there is one more (codes are made twice). The sparse form of TopK has one, and 4
passes over the k rows of W_dec that each row of x needs.

    language model      2 x parameters of the layers up to the site, and 4 x context x heads x head_dim a layer, for
                        each token; divided over data, and over features as far as heads and neurons are

Bytes through memory, each array written once and read once:

    matrices            products read them 3 times 2 matrices over 2, in the compute dtype, for every micro-batch
    gradients, Adam     8 P: written; read with parameters and moments, which are written
    codes               2 x arrays x a of `plan_bytes.STEPS`
    selection           16 rounds of counts read all entries again where a mesh selects by counts (sharded_topk.py)

Bytes between devices. p devices along an axis; b the bytes of the answer on each of them. Each sends, on a ring:

    all-reduce          2 (p - 1) / p x b
    all-gather          (p - 1) / p x b
    all-to-all          (p - 1) / p x b
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_jax.numerics.axes import DATA, FEATURES
from sparse_jax.numerics.sharded_topk import CANDIDATE_SHARE, DIGIT
from sparse_jax.training.plan_bytes import (
    STEPS,
    UNKNOWN,
    block_parameters,
    chunk_tokens,
    divided_model,
    gradient_bytes,
    rows_at_once,
)

if TYPE_CHECKING:
    from sparse_jax.training.plan import Work

# Kind -> products of a step, and those that AuxK adds while features are dead.
PRODUCTS = {
    "l1": (5, 0),
    "jump-relu": (5, 0),
    "gated": (8, 0),
    "lp": (6, 0),
    "topk": (5, 5),
    "batch-topk": (5, 5),
    "matryoshka": (5, 5),
}
# Slots of the exchange of a block are as many as the fullest pair of devices needs: an eighth more than the mean.
SLOTS = 9 / 8


@dataclass(frozen=True)
class Collective:
    """What devices send each other in a step.

    Attributes:
        what: is sent.
        kind: all-reduce, all-gather or all-to-all.
        axis: of the mesh, over which.
        devices: along it.
        answer: bytes of the answer on each device, in a step.
    """

    what: str
    kind: str
    axis: str
    devices: int
    answer: float

    @property
    def sent(self) -> float:
        """Bytes that each device sends."""
        return (2 if self.kind == "all-reduce" else 1) * (self.devices - 1) / self.devices * self.answer


def step_flops(work: "Work", cpu: bool = False) -> tuple[float, float] | None:
    """Operations of a device in the products of a step: usually, and while AuxK works; None: iterations decide."""
    dictionary, rows = work.dictionary, work.rows
    if dictionary.kind not in PRODUCTS:
        return None
    product = 2 * rows * dictionary.d_in * dictionary.n_features / work.mesh.features
    usual, aux = PRODUCTS[dictionary.kind]
    if work.sparse(cpu):
        gathered = 8 * rows * dictionary.k_bound * dictionary.d_in
        return work.members_here * (product + gathered), work.members_here * (product * (1 + aux) + gathered)
    usual += work.feature_chunks > 1
    return work.members_here * usual * product, work.members_here * (usual + aux) * product


def step_traffic(work: "Work", cpu: bool = False) -> float:
    """Bytes through a device's memory in the step."""
    dictionary, gradients = work.dictionary, gradient_bytes(work)
    width = 2 if dictionary.compute_dtype == "bfloat16" else 4
    array = 4 * work.rows * dictionary.n_features / work.mesh.features
    arrays = max(count for count, _ in STEPS.get(dictionary.kind, UNKNOWN))
    times = work.rows // rows_at_once(work, cpu)
    made = times * 1.5 * gradients * width / 4 + 8 * gradients
    if work.accumulate > 1:
        made += 3 * work.accumulate * gradients
    if work.sparse(cpu):
        # Rows of W_dec gathered twice; rows of two gradients read, added to, written.
        made += 2 * array + 8 * 4 * work.rows * dictionary.k_bound * dictionary.d_in
    else:
        made += 2 * arrays * array + _rounds(work) * array
    return work.members_here * made


def selected_entries(work: "Work") -> float:
    """Entries of a device that go through an exact top-k in a step."""
    if work.dictionary.kind not in ("topk", "batch-topk", "matryoshka") or _rounds(work):
        return 0.0
    return work.members_here * work.rows * work.dictionary.n_features / work.mesh.features


def _rounds(work: "Work") -> int:
    """Rounds of counts of a selection; 0: candidates, or there is none."""
    dictionary, mesh = work.dictionary, work.mesh
    if dictionary.kind in ("batch-topk", "matryoshka"):
        return 32 // DIGIT if mesh.data * mesh.features > 1 else 0
    if dictionary.kind == "topk" and mesh.features > 1:
        few = dictionary.k_bound * mesh.features <= CANDIDATE_SHARE * dictionary.n_features
        return 0 if few else 32 // DIGIT
    return 0


def model_flops(work: "Work") -> float:
    """Operations of a device in the language model's forward pass over the tokens of a step."""
    if not work.harvests:
        return 0.0
    config = work.config
    _, here = block_parameters(work)
    heads, _ = divided_model(work)
    attention = 4 * work.context * heads * config.head_dim * (work.site_layer + 1)
    return work.rows * (2.0 * here + attention)


def model_traffic(work: "Work") -> float:
    """Bytes through memory for it: the layers' parameters, once for each chunk of rows, and attention's patterns."""
    if not work.harvests:
        return 0.0
    _, here = block_parameters(work)
    heads, _ = divided_model(work)
    return work.rows / chunk_tokens(work) * 4 * here + work.rows * 4 * work.context * heads * (work.site_layer + 1)


def collectives(work: "Work") -> tuple[Collective, ...]:
    """What is sent in a step, without single numbers and sums of a few rows."""
    dictionary, mesh, members = work.dictionary, work.mesh, work.members_here
    rows, d, n = work.rows, dictionary.d_out, dictionary.n_features
    found: list[tuple[str, str, str, float]] = []
    if mesh.data > 1:
        found.append(("gradients", "all-reduce", DATA, members * work.accumulate * gradient_bytes(work)))
        found.append(("firing counts, sums of codes", "all-reduce", DATA, members * 8 * n / mesh.features))
    if mesh.features > 1:
        prefixes = len(dictionary.sizes) if dictionary.kind == "matryoshka" else 1
        found.append(("partial reconstructions", "all-reduce", FEATURES, members * prefixes * 4 * rows * d))
        if dictionary.kind == "fista":
            found.append(("the dictionary, whole", "all-gather", FEATURES, members * 4 * n * d))
            found.append(("codes", "all-to-all", FEATURES, members * 4 * rows * n / mesh.features))
        if dictionary.kind == "topk" and not _rounds(work):
            found.append(
                ("candidates", "all-gather", FEATURES, members * 4 * rows * dictionary.k_bound * mesh.features)
            )
    if rounds := _rounds(work):
        counts = 4 * (2**DIGIT - 1) * rounds * (rows if dictionary.kind == "topk" else 1)
        axis = FEATURES if mesh.features > 1 else DATA
        found.append(("counts of the selection", "all-reduce", axis, members * counts))
    if mesh.data > 1 and work.harvests:
        found.append(("a block's shuffle", "all-to-all", DATA, SLOTS * 4 * rows * dictionary.d_in))
    if mesh.features > 1 and work.harvests:
        heads, neurons = divided_model(work)
        summed = (heads < work.config.n_heads) + (neurons < work.config.d_mlp)
        width = 2 if dictionary.compute_dtype == "bfloat16" else 4
        if summed:
            sent = summed * (work.site_layer + 1) * width * rows * work.config.d_model
            found.append(("the language model's partial sums", "all-reduce", FEATURES, sent))
    return tuple(Collective(what, kind, axis, getattr(mesh, axis), answer) for what, kind, axis, answer in found)
