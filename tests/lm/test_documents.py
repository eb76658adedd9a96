"""Where text comes from: the embedded texts, text files, JSON lines and hub datasets, and what is refused."""

import gzip
import hashlib
import json

import datasets
import pytest

from sparse_jax.errors import InputError
from sparse_jax.lm import embedded
from sparse_jax.lm.documents import Document, documents, fingerprint


def write(path, content):
    """Text to a file, gzipped if the name says so."""
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def error_of(source, **options):
    """The one-line message with which a source is refused."""
    with pytest.raises(InputError) as caught:
        list(documents(source, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hub(monkeypatch, examples):
    """Stand in for the hub: `load_dataset` gives these examples; the record says what was asked and read."""
    record = {"read": 0}

    def stream():
        for example in examples:
            record["read"] += 1
            yield example

    def load_dataset(*args, **kwargs):
        record["asked"] = (args, kwargs)
        return stream()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return record


# Embedded texts


def test_austen_is_six_novels_named_by_their_first_lines():
    novels = list(documents("austen"))
    assert len(novels) == 6
    assert [novel.name for novel in novels] == [f"austen/{d}" for d in (
        "Emma", "Mansfield Park", "Northanger Abbey", "Persuasion", "Pride and Prejudice", "Sense and Sensibility",
    )]  # fmt: skip
    for novel in novels:
        assert novel.name.removeprefix("austen/").casefold() == novel.text.split("\n")[0].casefold()
        assert novel.text == novel.text.strip()


def test_state_of_the_union_is_numbered_and_embedded_is_both():
    addresses = list(documents("state-of-the-union"))
    assert len(addresses) == 249
    assert (addresses[0].name, addresses[-1].name) == ("state-of-the-union/1", "state-of-the-union/249")
    assert "We are 15 years into this new century" in addresses[240].text
    assert list(documents("embedded")) == [*documents("austen"), *addresses]


def test_embedded_names_are_unique_and_held_out_documents_exist():
    assert len(embedded.DOCUMENT_NAMES) == 6 + 249
    assert embedded.HELD_OUT <= embedded.DOCUMENT_NAMES
    assert len(embedded.HELD_OUT) == 2 + 9
    assert (embedded.MODELS["novel-neox"] / "model.safetensors").is_file()


# Files


@pytest.mark.parametrize("name", ["tale.txt", "tale.txt.gz", "TALE.TXT"])
def test_text_file_is_cut_at_the_separator_stripped_and_numbered(tmp_path, name):
    path = write(tmp_path / name, "\n one\n\ntwo <|endoftext|>  \n<|endoftext|>three<|endoftext|>four\n<|endoftext|>\n")
    assert list(documents(path)) == [
        Document(f"{name}#1", "one\n\ntwo"),
        Document(f"{name}#3", "three"),
        Document(f"{name}#4", "four"),
    ]
    assert list(documents(str(path))) == list(documents(path))


def test_text_file_loses_its_byte_order_mark_and_carriage_returns(tmp_path):
    path = write(tmp_path / "dos.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert list(documents(path)) == [Document("dos.txt#1", "one\ntwo")]


def test_text_file_is_read_only_as_far_as_it_is_asked_for(tmp_path):
    path = write(tmp_path / "long.txt", b"one\n<|endoftext|>\ntwo\n<|endoftext|>\n\xff\n")
    reader = documents(path)
    assert next(reader).text == "one"
    assert next(reader).text == "two"
    with pytest.raises(InputError, match="line 5"):
        next(reader)


@pytest.mark.parametrize("name", ["tale.jsonl", "tale.jsonl.gz"])
def test_json_lines_are_named_by_their_line(tmp_path, name):
    lines = [{"text": " one\u2028é "}, {"text": ""}, {"text": None}, {"text": "four", "more": 1}]
    path = write(tmp_path / name, "\n".join([json.dumps(line, ensure_ascii=False) for line in lines] + ["", ""]))
    assert list(documents(path)) == [Document(f"{name}#1", "one\u2028é"), Document(f"{name}#4", "four")]


def test_json_lines_with_a_named_field(tmp_path):
    path = write(tmp_path / "code.jsonl", '{"text": "no", "content": "yes"}\n')
    assert [document.text for document in documents(path, text_field="content")] == ["yes"]


def test_fingerprint_is_the_sha256_of_the_bytes(tmp_path):
    path = write(tmp_path / "a.txt", "abc")
    assert fingerprint(path) == fingerprint(str(path)) == hashlib.sha256(b"abc").hexdigest()
    both = [embedded.TEXTS[name].path.read_bytes() for name in ("austen", "state-of-the-union")]
    assert fingerprint("austen") == hashlib.sha256(both[0]).hexdigest()
    assert fingerprint("embedded") == hashlib.sha256(both[0] + both[1]).hexdigest()
    assert fingerprint("hub:owner/name:config") == "hub:owner/name:config"
    for wrong in ("no-such-name", str(tmp_path), str(tmp_path / "none.txt"), "hub:name"):
        with pytest.raises(InputError):
            fingerprint(wrong)


# What is refused


def test_unknown_name_gets_the_nearest_one_and_all_forms():
    message = error_of("austin")
    assert "did you mean 'austen'?" in message
    for allowed in ("austen", "state-of-the-union", "embedded", ".txt.gz", ".jsonl", "hub:owner/name"):
        assert allowed in message
    assert "did you mean 'state-of-the-union'?" in error_of("State_of_the_Onion")
    assert "did you mean" not in error_of("xyzzy")


@pytest.mark.parametrize("source", ["none", "none.txt", "a.pdf", "hub:name", "."])
def test_bad_sources_are_refused_before_anything_is_read(source):
    with pytest.raises(InputError):
        documents(source)


def test_missing_file_directory_and_wrong_ending_are_refused(tmp_path):
    assert "does not exist" in error_of(tmp_path / "none.txt")
    assert "is a directory" in error_of(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    assert "is a directory" in error_of(tmp_path / "folder.txt")
    assert "'.pdf'" in error_of(write(tmp_path / "a.pdf", "text"))
    assert "has the ending ''" in error_of(write(tmp_path / "noending", "text"))


def test_truncated_and_damaged_gzip_are_refused(tmp_path):
    whole = gzip.compress("".join(f"line {i}\n" for i in range(50_000)).encode())
    cut, damaged, plain = (tmp_path / f"{name}.txt.gz" for name in ("cut", "damaged", "plain"))
    cut.write_bytes(whole[: len(whole) // 2])
    assert "cut short or damaged" in error_of(cut)
    damaged.write_bytes(whole[:1000] + bytes(200) + whole[1200:])
    assert "cut short or damaged" in error_of(damaged)
    plain.write_bytes(b"not gzip at all\n")
    assert "cut short or damaged" in error_of(plain)


@pytest.mark.parametrize("name", ["latin.txt", "latin.txt.gz", "latin.jsonl"])
def test_text_that_is_not_utf8_is_refused_by_line_and_place(tmp_path, name):
    message = error_of(write(tmp_path / name, b'{"text": "one"}\n{"text": "caf\xe9"}\n'))
    assert "line 2" in message
    assert "0xe9 at place 14" in message


@pytest.mark.parametrize("name", ["blank.txt", "blank.txt.gz", "blank.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_text_without_a_document_is_refused(tmp_path, name, content):
    assert "is empty" in error_of(write(tmp_path / name, content))


def test_text_of_blank_documents_is_refused(tmp_path):
    assert "is empty" in error_of(write(tmp_path / "blank.txt", " <|endoftext|>\n<|endoftext|>"))
    assert "is empty" in error_of(write(tmp_path / "blank.jsonl", '{"text": ""}\n'))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "cut', "not JSON"),
        ("plain words", "not JSON"),
        ('["text"]', "is a JSON list"),
        ('{"content": "x", "id": 3}', "no field 'text'; it has 'content', 'id'"),
        ("{}", "no field 'text'; it has none"),
        ('{"text": 7}', "is of type int"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_bad_json_line_is_named_by_its_number(tmp_path, line, reason):
    message = error_of(write(tmp_path / "bad.jsonl", f'{{"text": "good"}}\n\n{line}\n'))
    assert reason in message
    assert "line 3" in message


@pytest.mark.parametrize("source", ["austen", "embedded", "tale.txt"])
def test_split_of_a_text_without_splits_is_refused(source):
    assert "only hub datasets have splits" in error_of(source, split="test")


# The hub


def test_hub_dataset_is_streamed_with_its_configuration_and_split(monkeypatch):
    record = hub(monkeypatch, [{"text": " one "}, {"text": ""}, {"text": None}, {"text": "four"}])
    found = list(documents("hub:owner/name:config", split="validation"))
    assert found == [Document("owner/name#1", "one"), Document("owner/name#4", "four")]
    assert record["asked"] == (("owner/name", "config"), {"split": "validation", "streaming": True})


def test_hub_dataset_without_configuration_and_with_another_field(monkeypatch):
    record = hub(monkeypatch, [{"content": "one"}])
    assert [document.text for document in documents("hub:owner/name", text_field="content")] == ["one"]
    assert record["asked"][0] == ("owner/name", None)
    assert "no field 'text'" in error_of("hub:owner/name")


def test_hub_dataset_is_read_no_further_than_asked(monkeypatch):
    record = hub(monkeypatch, ({"text": f"document {i}"} for i in range(1000)))
    reader = documents("hub:owner/name")
    assert record["read"] == 0
    assert [next(reader).name for _ in range(3)] == ["owner/name#1", "owner/name#2", "owner/name#3"]
    assert record["read"] == 3


def test_hub_examples_come_from_a_real_streamed_dataset(monkeypatch):
    data = datasets.IterableDataset.from_generator(lambda: ({"text": f"document {i}"} for i in range(3)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
    assert [document.text for document in documents("hub:owner/name")] == ["document 0", "document 1", "document 2"]


@pytest.mark.parametrize("source", ["hub:", "hub:name", "hub:owner/name/more", "hub:owner/na me", "hub:/name"])
def test_hub_source_that_names_no_dataset_is_refused(source):
    assert "hub:owner/name" in error_of(source)


@pytest.mark.parametrize(
    "failure",
    [ConnectionError("Couldn't reach 'owner/name' on the Hub.\nmore"), ValueError("Bad split: x"), KeyError()],
)
def test_unreachable_hub_is_refused_at_once(monkeypatch, failure):
    def load_dataset(*args, **kwargs):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"'hub:owner/name' cannot be read") as caught:
        documents("hub:owner/name")
    assert "\n" not in str(caught.value)


def test_hub_that_breaks_off_is_reported(monkeypatch):
    def stream():
        yield {"text": "one"}
        raise OSError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream())
    assert "connection reset" in error_of("hub:owner/name")


def test_hub_without_a_document_is_refused(monkeypatch):
    hub(monkeypatch, [{"text": ""}])
    assert "is empty" in error_of("hub:owner/name")
