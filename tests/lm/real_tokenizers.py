"""The real tokenizers in ../shared as folders of the hub, and texts that are hard for a tokenizer."""

import json
import shutil
from pathlib import Path

FAMILY = {"gpt2": "gpt2", "neox": "gpt_neox"}
END_OF_TEXT = {"gpt2": 50256, "neox": 0}


def real_tokenizer(shared: Path, folder: Path, name: str) -> Path:
    """A folder as the hub has it, of a tokenizer in ../shared."""
    folder = folder / name
    shutil.copytree(shared / "tokenizers" / name, folder)
    folder.chmod(0o755)
    end = END_OF_TEXT[name]
    config = {"model_type": FAMILY[name], "eos_token_id": end, "bos_token_id": end}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


HARD = (
    "",
    " ",
    "Hello\n\nWorld\n\n\nfoo  \nbar   baz\t don't stop é e\u0301 — 日本 \U0001f600\r\n   end  ",
    # Scripts: Greek, Cyrillic, Devanagari, Thai, Korean, Chinese, Japanese, Georgian, Ethiopic, Tamil.
    "Ἐν ἀρχῇ ἦν ὁ λόγος. Все счастливые семьи похожи друг на друга.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน 모든 인간은 태어날 때부터 자유로우며",
    "人人生而自由,在尊严和权利上一律平等。すべての人間は、生まれながらにして自由であり、",
    "ყველა ადამიანი იბადება თავისუფალი የሰው ልጅ ሁሉ மனிதப் பிறிவியினர்",
    # Right to left, with marks of direction and vowel signs.
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "כָּל בְּנֵי הָאָדָם נוֹלְדוּ בְּנֵי חוֹרִין \u202babc\u202c \u200fdef\u200e",
    # Emoji: joined by ZWJ, skin tones, flags, keycaps.
    "👩‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈 🇫🇷🇯🇵 1️⃣ ❤️‍🔥 ☕︎",
    # Combining marks, composed, decomposed, and stacked.
    "café cafe\u0301 \u00c5 A\u030a \u212b ﬁ Ǆ Z\u0351\u0344a\u0348\u0329l\u0363\u0365go\u0336",
    "\u1e9b\u0323 \uac00 \u1100\u1161 \u0958 \u2126",
    # White space of all kinds.
    "a" + " " * 5 + "b" + " " * 30 + "c" + "\t" * 3 + "d \t \te" + " " * 3,
    "\u00a0no\u00a0break\u2003em\u200azero\u200bwidth\u3000wide\u2028line\u2029paragraph\u0085next\ufeffmark",
    "one\r\ntwo\rthree\n\r\n\x0bvertical\x0cfeed\n\n\n",
    # Control characters.
    "\x00nul\x01\x02\x07bell\x08\x1b[0mescape\x7fdelete\x80\x9f",
    # Numbers.
    "0 1 12 123 1234 12345 1,234,567.89 3.14159e-10 0x1F 1/2 ½ ² ٣٤٥ 二〇 1st 2nd 10% $5 №7 −3",
    "2**64=18446744073709551616",
    # Contractions, and quotation marks that look like theirs.
    "I'm you're she's we'll they've he'd can't 'S 'LL ’s O’Neill rock 'n' roll",
    # Very long words, and runs of one sign.
    "Donaudampfschifffahrtsgesellschaftskapitän" * 8,
    "x" * 700 + "!" * 300 + "é" * 200 + "日" * 100,
    # Code.
    "def f(x: int = 0) -> str:\n    return f\"{x!r:>10}\"  # comment\n\n\nif __name__ == '__main__':\n\tf()\n",
    '{"key": [1, 2.0, null, true], "nested": {"a\\u00e9": "\\n"}}  <div class="a">&amp;</div>',
    "//--== ~~~ ``` $$\\int_0^1$$ ->=><=>!==:=::",
    # The ends of planes and noncharacters.
    "\ud7ff\ue000\ufffd\ufffe\uffff\U00010000\U0010ffff \U0001d518\U0001d52b\U0001d526",
    "▁ Ġ Ċ <0xE2> ## [UNK] <unk> <s> </s>",
)
