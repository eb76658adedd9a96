"""The file of replies: what is there is found again, what was cut is not, and nothing is asked for twice."""

import json
import os
import subprocess
import sys
import threading

import pytest

from sparse_jax.errors import InputError
from sparse_jax.features.explain import Cache
from sparse_jax.features.explain.cache import key_of


def put(cache, key, text="x"):
    return cache.get_or_ask(key, "explain", lambda: {"text": text})


def never():
    raise AssertionError("asked for what is there")


def test_replies_are_found_again(tmp_path):
    path = tmp_path / "folder" / "replies.jsonl"
    with Cache(path) as cache:
        put(cache, "a", "one\n\u2028two")
        put(cache, "b")
        assert cache.get_or_ask("a", "explain", never) == {"text": "one\n\u2028two"}
    with Cache(path) as cache:
        assert len(cache) == 2
        assert cache.get_or_ask("a", "explain", never) == {"text": "one\n\u2028two"}
        assert cache.get("c") is None
        assert "b" in cache
        put(cache, "c")
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_a_reply_is_on_the_disk_before_it_is_used(tmp_path, monkeypatch):
    path, synced = tmp_path / "replies.jsonl", []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(path.read_bytes()), original(fd)))
    with Cache(path) as cache:
        put(cache, "a")
        assert path.read_bytes().endswith(b"\n")
        assert synced == [path.read_bytes()]


@pytest.mark.parametrize("left", [1, 10, -1])
def test_a_cut_line_is_dropped(tmp_path, left):
    path = tmp_path / "replies.jsonl"
    with Cache(path) as cache:
        put(cache, "a")
        put(cache, "b")
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + left] if left > 0 else whole[:left])
    with Cache(path, read_only=True) as cache:
        assert "a" in cache
        assert "b" not in cache
    with Cache(path) as cache:
        assert "b" not in cache
        put(cache, "c")
    with Cache(path) as cache:
        assert "a" in cache
        assert "c" in cache
    assert path.read_bytes().startswith(whole[:first] + b'{"key": "c"')


def test_a_damaged_line_costs_only_itself(tmp_path):
    path = tmp_path / "replies.jsonl"
    with Cache(path) as cache:
        for key in "abc":
            put(cache, key)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"key": "b", \n' + lines[2])
    with Cache(path) as cache:
        assert [key in cache for key in "abc"] == [True, False, True]


def test_another_kind_of_file_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nand more")
    with pytest.raises(InputError, match="holds no replies"):
        Cache(path)
    assert path.read_text() == "my notes\nand more"


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "replies.jsonl"
    with Cache(path) as cache:
        put(cache, "a")
        before = path.read_bytes()
        original = os.fsync

        def full(fd):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            put(cache, "b")
        assert path.read_bytes() == before
        monkeypatch.setattr(os, "fsync", original)
        put(cache, "c")
    with Cache(path) as cache:
        assert [key in cache for key in "abc"] == [True, False, True]


def test_threads_ask_once_and_write_whole_lines(tmp_path):
    path, asked, started = tmp_path / "replies.jsonl", [], threading.Barrier(8)

    def ask(key):
        asked.append(key)
        return {"text": key * 5000}

    def work(number):
        started.wait()
        for i in range(40):
            key = str((i + number) % 40)
            assert cache.get_or_ask(key, "explain", lambda key=key: ask(key)) == {"text": key * 5000}

    with Cache(path) as cache:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(asked) == sorted(map(str, range(40)))
    assert sorted(json.loads(line)["key"] for line in path.read_text().splitlines()) == sorted(asked)


def test_a_failure_is_not_kept(tmp_path):
    with Cache(tmp_path / "replies.jsonl") as cache:
        with pytest.raises(InputError):
            cache.get_or_ask("a", "explain", lambda: (_ for _ in ()).throw(InputError("no")))
        assert "a" not in cache
        put(cache, "a")


def test_two_processes_do_not_share_a_file(tmp_path):
    path = tmp_path / "replies.jsonl"
    code = f"from sparse_jax.features.explain.cache import Cache; from pathlib import Path; Cache(Path({str(path)!r}))"
    with Cache(path):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "in use by another run" in found.stderr
        with pytest.raises(InputError, match="in use"):
            Cache(path)
        Cache(path, read_only=True).close()
    Cache(path).close()


def test_keys_tell_requests_apart():
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    assert key_of("u", body) == key_of("u", dict(reversed(body.items())))
    others = [("v", body), ("u", body | {"model": "n"}), ("u", body | {"max_tokens": 6}), ("u", body | {"seed": 0})]
    assert len({key_of(*each) for each in [("u", body), *others]}) == 5
    assert key_of("u", body) != key_of("u", body | {"messages": [{"role": "user", "content": "y"}]})
