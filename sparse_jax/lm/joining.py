"""How each family's models saw texts put together: what stands between documents, and whether rows begin with BOS.

A model that is read on rows put together in another way than those it was trained on gives other activations, above
all at the first positions: attention sinks sit on the begin-of-text token (BOS) where the model has always seen one.
"""

from typing import Literal, NamedTuple

from sparse_jax.errors import InputError


class Joining(NamedTuple):
    """One family's rule.

    Attributes:
        separators: the end-of-text token that stands between documents, as text: the first of these that the tokenizer
            has as a special token. Chat models declare the end of a turn as their eos_token; that is not it.
        bos: `row`: every row of text begins with the begin-of-text token; `none`: rows are cut from the stream alone.
        tokenizer_adds: what the family's own tokenizer puts before a text by itself. Never a token after it.
        why: the reason, and the source.
    """

    separators: tuple[str, ...]
    bos: Literal["none", "row"]
    tokenizer_adds: Literal["nothing", "begin-of-text"]
    why: str


_SINKS = "always run with BOS at position 0, where its attention sinks sit (Xiao et al. 2023, StreamingLLM)"

# By the `model_type` of config.json.
RULES: dict[str, Joining] = {
    # between documents, rows, its tokenizer adds, why
    "gpt_neox": Joining(
        ("<|endoftext|>",), "none", "nothing",
        "rows were cut anywhere from the joined stream (Biderman et al. 2023, Pythia; GPT-NeoX's --append-eod)"),
    "gpt2": Joining(
        ("<|endoftext|>",), "none", "nothing",
        "as GPT-NeoX; its only special token is declared as BOS too, but ends texts (Radford et al. 2019)"),
    "llama": Joining(
        ("<|end_of_text|>", "</s>"), "row", "begin-of-text",
        f"{_SINKS}; Llama 3 and Llama 2 spell their tokens differently"),
    "mistral": Joining(
        ("</s>",), "row", "begin-of-text",
        f"{_SINKS}; mistral-common's encode(bos=True)"),
    "qwen2": Joining(
        ("<|endoftext|>",), "none", "nothing",
        "has no BOS: bos_token is null in its tokenizer_config.json (Qwen's documentation, key concepts)"),
    "qwen3": Joining(
        ("<|endoftext|>",), "none", "nothing",
        "as Qwen2"),
}  # fmt: skip


def joining_of(model_type: str | None) -> Joining:
    """The rule of a family.

    Raises:
        InputError: there is none for this `model_type`.
    """
    if model_type not in RULES:
        raise InputError(
            f"how texts are put together for model_type {model_type!r} is not known (known: {', '.join(RULES)}); "
            "give --bos none or --bos row, as the model was trained"
        )
    return RULES[model_type]


def row_bos(model_type: str | None, *, bos_id: int | None, adds_bos: bool) -> Literal["none", "row"]:
    """What `pack` is to be given as `bos` for a model, by its family's rule.

    Args:
        model_type: of its config.json.
        bos_id: its tokenizer's begin-of-text id.
        adds_bos: whether its tokenizer puts that before a text by itself.

    Raises:
        InputError: no rule for the family; the rule wants a begin-of-text token and the tokenizer has none, or has one
            but never uses it (a model of this architecture trained with another family's tokenizer).
    """
    rule = joining_of(model_type).bos
    if rule == "row" and bos_id is None:
        raise InputError(
            f"rows of a {model_type} model begin with its begin-of-text token, but its tokenizer has none: name it as "
            "bos_token in the folder's tokenizer_config.json, or give --bos none if the model was trained without"
        )
    if rule == "row" and not adds_bos:
        raise InputError(
            f"rows of a {model_type} model begin with its begin-of-text token, but this model's own tokenizer does not "
            "put it before a text: give --bos row or --bos none, as the model was trained"
        )
    return rule
