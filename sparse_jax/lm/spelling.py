"""How tokenizers spell their tokens: the bytes of text that a token of a vocabulary stands for."""

import re


def _byte_of_sign() -> dict[str, int]:
    """The byte that each sign of a byte-level token stands for: printable bytes stand for themselves.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (GPT-2), `bytes_to_unicode` of its code.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_SIGN = _byte_of_sign()
# What SentencePiece writes for a space.
_SPACE_SIGN = "\u2581"


def bytes_of_byte_level(token: str) -> bytes:
    """Of a byte-level token (GPT-2's kind): one byte a sign. A token of other signs is its own UTF-8."""
    if not all(sign in _BYTE_OF_SIGN for sign in token):
        return token.encode()
    return bytes(_BYTE_OF_SIGN[sign] for sign in token)


def bytes_of_piece(token: str) -> bytes:
    """Of a SentencePiece token: its sign for a space is a space, `<0xE2>` a single byte, all else its own UTF-8."""
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE_SIGN, " ").encode()
