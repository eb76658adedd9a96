"""A tiny tokenizer in the style of each family's real one: its files as the hub has them, with very few tokens."""

import json
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# Qwen's and Llama 3's rule for where words are cut, shortened.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _save(folder: Path, made: tokenizers.Tokenizer, model_type: str, config: dict, **model_config) -> Path:
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **model_config}))
    return folder


def _byte_level(special: list[str], cut: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    """The 256 bytes, one merge ("ab"), then the special tokens."""
    vocabulary = {token: i for i, token in enumerate([*BYTES, "ab"])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    made.pre_tokenizer, made.decoder = cut, decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    return made


def gpt2(folder: Path) -> Path:
    """End-of-text is declared as BOS, EOS and unknown alike."""
    end = "<|endoftext|>"
    made = _byte_level([end], pre_tokenizers.ByteLevel(add_prefix_space=False))
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": end, "eos_token": end, "unk_token": end}
    return _save(folder, made, "gpt2", config, bos_token_id=257, eos_token_id=257)


def gpt_neox(folder: Path) -> Path:
    """As Pythia's: NFC, and runs of spaces added that are not special."""
    end = "<|endoftext|>"
    made = _byte_level([end, "<|padding|>"], pre_tokenizers.ByteLevel(add_prefix_space=False))
    made.add_tokens([tokenizers.AddedToken("  ", special=False, normalized=True)])
    made.normalizer, made.post_processor = normalizers.NFC(), processors.ByteLevel(trim_offsets=True)
    config = {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": end, "eos_token": end, "unk_token": end}
    return _save(folder, made, "gpt_neox", config, bos_token_id=257, eos_token_id=257)


def llama2(folder: Path, model_type: str = "llama", bos: bool = True) -> Path:
    """SentencePiece's BPE: a space before the text, bytes for unknown signs, BOS by a template."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "▁a", "▁ab"]
    vocabulary = {token: i for i, token in enumerate(pieces)}
    merges = [("▁", "a"), ("▁a", "b")]
    made = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "unk_token": "<unk>"}
    declared = {"bos_token": "<s>", "add_bos_token": True} if bos else {"bos_token": None, "add_bos_token": False}
    return _save(folder, made, model_type, {**config, **declared}, eos_token_id=2)


def mistral(folder: Path) -> Path:
    return llama2(folder, "mistral")


def llama3(folder: Path, eos: str = "<|end_of_text|>", bos: bool = True) -> Path:
    """Byte-level, BOS by a template; chat models declare the end of a turn as their EOS."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made = _byte_level(special, cut)
    if bos:
        template = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 257)]
        )
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": eos}
    return _save(folder, made, "llama", config, bos_token_id=257)


def qwen(folder: Path, model_type: str = "qwen2", eos: str = "<|endoftext|>") -> Path:
    """Byte-level with NFC and no BOS, though config.json names one; chat models declare the end of a turn as EOS."""
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], cut)
    made.normalizer, made.post_processor = normalizers.NFC(), processors.ByteLevel(trim_offsets=False)
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": eos, "pad_token": "<|endoftext|>"}
    return _save(folder, made, model_type, {**config, "add_bos_token": False}, bos_token_id=257, eos_token_id=257)
