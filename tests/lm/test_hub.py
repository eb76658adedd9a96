"""Models from the hub: the right bytes of one commit whatever the network does, and every fault in one line."""

import hashlib
import importlib.util
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

_spec = importlib.util.spec_from_file_location("fake_hub", Path(__file__).with_name("fake_hub.py"))
fake_hub = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_hub)

SMALL = {"config.json": b'{"model_type": "gpt_neox"}', "tokenizer.json": b'{"version": "1.0"}'}


def noise(seed: int, size: int = 100_000) -> bytes:
    return random.Random(seed).randbytes(size)


def single(seed: int = 0) -> dict[str, bytes]:
    """A repository with its weights in one file; nothing here looks inside."""
    return SMALL | {"model.safetensors": noise(seed)}


def sharded() -> dict[str, bytes]:
    shards = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    index = {"metadata": {}, "weight_map": {f"weight.{i}": shards[i % 3] for i in range(6)}}
    files = {name: noise(i) for i, name in enumerate(shards)}
    return SMALL | files | {"model.safetensors.index.json": json.dumps(index).encode()}


@pytest.fixture(scope="module")
def hub():
    with fake_hub.FakeHub() as served:
        yield served


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder with all caches: `hub` of the hub's client, `sparse_jax` of the library."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def client(hub, home):
    """Changes of the environment -> a process that fetches models, the same one for the same changes."""
    running = {}

    def start(**changes):
        key = tuple(sorted(changes.items()))
        if key not in running:
            kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
            path = str(Path(__file__).parents[2])
            env = {
                "PYTHONPATH": path, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "XDG_CACHE_HOME": str(home),
                "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_VERBOSITY": "critical",
                "no_proxy": "127.0.0.1",
            }  # fmt: skip
            running[key] = fake_hub.Client(kept | env | changes)
        return running[key]

    yield start
    for process in running.values():
        process.close()


@pytest.fixture
def online(client):
    return client()


@pytest.fixture
def offline(client):
    return client(HF_HUB_OFFLINE="1")


@pytest.fixture
def cut_off(client):
    """A client for which nothing listens at the hub's address."""
    return client(HF_ENDPOINT="http://127.0.0.1:9")


@pytest.fixture
def repo(hub, request):
    """A model of its own for each test."""
    made = hub.repos["owner/" + name_of(request)] = fake_hub.Repo()
    return made


@pytest.fixture
def name(request, repo):
    return "owner/" + name_of(request)


def name_of(request) -> str:
    """Of the test, with its parameters, within what the hub allows."""
    node = request.node.name
    return f"{node[5:60].split('[')[0]}-{hashlib.sha1(node.encode()).hexdigest()[:6]}"


def folder(answer: dict) -> Path:
    assert "folder" in answer, answer
    return Path(answer["folder"])


def refused(answer: dict) -> str:
    assert "refused" in answer, answer
    assert "\n" not in answer["refused"]
    return answer["refused"]


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def cached(home: Path, name: str, part: str) -> Path:
    return home / "hub" / f"models--{name.replace('/', '--')}" / part


# What is fetched


def test_a_revision_gives_its_own_files(repo, name, online):
    repo.commit(single(0))
    step = repo.commit(single(1), "step1000")
    assert content(folder(online(model=name))) == single(0)
    answer = online(model=name, revision="step1000")
    assert content(folder(answer)) == single(1)
    assert folder(answer).name == step
    assert folder(online(model=name, revision=step)) == folder(answer)
    assert answer["stderr"].count("\n") <= answer["stderr"].count("%")  # progress bars only
    assert not answer["hub_client_imported_early"]


def test_what_is_in_the_cache_is_not_fetched_again(repo, name, online):
    repo.commit(single())
    online(model=name)
    repo.requests.clear()
    assert content(folder(online(model=name))) == single()
    assert repo.requests == []


def test_only_the_files_that_are_needed_are_fetched(repo, name, online):
    needed = single() | {
        "tokenizer_config.json": b"{}", "tokenizer.model": b"pieces", "vocab.json": b"{}", "merges.txt": b"a b",
        "special_tokens_map.json": b"{}", "added_tokens.json": b"{}",
    }  # fmt: skip
    others = [
        "README.md", "model.fp16.safetensors", "original/consolidated.safetensors", "original/tokenizer.model",
        "onnx/model.onnx", "pytorch_model.bin", "tokenizer.pkl", "rust_model.ot", "model-00001-of-00002.safetensors",
        "generation_config.json",
    ]  # fmt: skip
    repo.commit(needed | dict.fromkeys(others, b"something else"))
    assert content(folder(online(model=name))) == needed
    assert {request.file for request in repo.requests} == set(needed)


def test_shards_are_those_that_the_index_names(repo, name, online):
    others = {"model.safetensors": noise(7), "model-00004-of-00004.safetensors": noise(8)}
    repo.commit(sharded() | others)
    assert content(folder(online(model=name))) == sharded()
    assert not set(others) & {request.file for request in repo.requests}


def test_weights_come_last(repo, name, online):
    """So that a cached copy that has them has the rest."""
    repo.commit(sharded())
    online(model=name)
    bodies = [request.file for request in repo.requests if request.method == "GET"]
    assert [file.endswith(".safetensors") for file in bodies] == [False] * 3 + [True] * 3


def test_a_branch_that_moves_does_not_mix_commits(repo, name, online):
    first = repo.commit(single(0))
    repo.listed = lambda: repo.commit(SMALL | {"config.json": b"{}", "model.safetensors": noise(1)})
    answer = online(model=name)
    assert folder(answer).name == first
    assert content(folder(answer)) == single(0)
    assert {request.commit for request in repo.requests} == {first}
    repo.listed = lambda: None
    assert content(folder(online(model=name)))["model.safetensors"] == noise(1)


def test_the_whole_way_to_a_loaded_model(repo, name, online, model_folder):
    """Two checkpoints of one model, the second in shards."""
    tensors = {}
    for branch, seed_name in (("main", "parallel"), ("step1000", "sequential")):
        source = model_folder(seed_name)
        tensors[branch] = load_file(source / "model.safetensors")
        if branch != "main":
            tensors[branch]["gpt_neox.embed_in.weight"] += 1
            where = {}
            for i, shard in enumerate(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
                part = dict(list(tensors[branch].items())[i::2])
                save_file(part, source / shard)
                where |= dict.fromkeys(part, shard)
            (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
            (source / "model.safetensors").unlink()
        repo.commit(content(source), branch)
    for branch, revision in (("main", None), ("step1000", "step1000")):
        answer = online(model=name, revision=revision, load=True)
        assert answer.get("embedding") == tensors[branch]["gpt_neox.embed_in.weight"].tolist(), answer


# Connections that break


@pytest.mark.parametrize("fault", ["drop", "reset", "hang"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_connection_that_breaks_once(repo, name, online, fault, file):
    repo.commit(single())
    repo.faults[file] = f"{fault} once"
    assert content(folder(online(model=name))) == single()
    tries = [request for request in repo.requests if request.file == file and request.method == "GET"]
    assert len(tries) == 2
    if file == "model.safetensors" and fault != "reset":
        assert 0 < tries[1].start < len(noise(0))


@pytest.mark.parametrize("fault", ["drop", "reset"])
@pytest.mark.parametrize("revision", [None, "step1000"])
def test_a_connection_that_always_breaks(repo, name, online, offline, home, fault, revision):
    """It resumes as long as something comes; the half of what is left becomes nothing in the end."""
    repo.commit(single(), revision or "main")
    repo.faults["model.safetensors"] = fault
    message = refused(online(model=name, revision=revision))
    assert f"model.safetensors of model {name!r}" in message
    assert "could not be fetched from http://127.0.0.1:" in message
    assert ("at revision 'step1000'" in message) == (revision is not None)
    assert "run it again to go on" in message
    (snapshot,) = cached(home, name, "snapshots").iterdir()
    assert content(snapshot) == SMALL
    whole = {blob for blob in os.listdir(cached(home, name, "blobs")) if not blob.endswith(".incomplete")}
    assert whole == {fake_hub.git_sha1(c) for c in SMALL.values()}
    assert "the cache has no config.json" in refused(offline(model=name, revision=revision))

    del repo.faults["model.safetensors"]
    repo.requests.clear()
    assert content(folder(online(model=name, revision=revision))) == single()
    assert repo.bodies() == {"model.safetensors"}
    assert content(folder(offline(model=name, revision=revision))) == single()


def test_a_disk_that_is_full(repo, name, online):
    repo.commit(single())
    message = refused(online(model=name, file_size=50_000))
    assert f"model.safetensors of model {name!r} could not be written to the cache" in message
    assert "File too large; make space, or set HF_HOME" in message
    assert content(folder(online(model=name))) == single()


def test_a_cache_that_cannot_be_written(repo, name, online, home):
    repo.commit(single())
    place = cached(home, name, "")
    place.parent.mkdir(exist_ok=True)
    place.write_text("a file where the folder should be")
    message = refused(online(model=name))
    assert "could not be written to the cache" in message
    assert str(home) in message


# Digests


@pytest.mark.parametrize("names_digests", [True, False])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_wrong_bytes_of_the_right_size(repo, name, online, offline, file, names_digests):
    repo.commit(single())
    repo.names_digests = names_digests
    repo.faults[file] = "wrong"
    message = refused(online(model=name))
    right, wrong = single()[file], bytes(255 - byte for byte in single()[file])
    large = file.endswith(".safetensors")
    for there in (right, wrong):
        assert (hashlib.sha256(there).hexdigest() if large else fake_hub.git_sha1(there)) in message
    assert f"{file} of model {name!r} is damaged" in message
    assert "it has been deleted" in message
    assert "the cache has no config.json" in refused(offline(model=name))
    assert "is damaged" in refused(online(model=name))
    repo.faults.clear()
    assert content(folder(online(model=name))) == single()


def test_a_cache_without_links(repo, name, client):
    """Files are copies there, whose names say nothing about their digests."""
    repo.commit(single())
    repo.faults["model.safetensors"] = "wrong once"
    process = client(HF_HUB_DISABLE_SYMLINKS="1")
    assert "is damaged" in refused(process(model=name))
    answer = process(model=name)
    assert content(folder(answer)) == single()
    assert not any(path.is_symlink() for path in folder(answer).iterdir())


def test_a_shard_with_wrong_bytes(repo, name, online):
    repo.commit(sharded())
    repo.faults["model-00002-of-00003.safetensors"] = "wrong once"
    assert "model-00002-of-00003.safetensors of model" in refused(online(model=name))
    repo.requests.clear()
    assert content(folder(online(model=name))) == sharded()
    assert repo.bodies() == {"model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"}


def test_a_checked_file_is_read_again_only_when_it_changed(repo, name, online, offline):
    repo.commit(single())
    file = folder(online(model=name)) / "model.safetensors"
    blob, times = file.resolve(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    blob.write_bytes(noise(1))
    os.utime(blob, ns=times)
    assert folder(online(model=name)) == file.parent  # so it was not read
    os.utime(blob, ns=(times[0], times[1] + 1))
    assert "model.safetensors of model" in refused(offline(model=name))
    assert not file.is_symlink()
    assert not blob.exists()
    assert "lacks" not in refused(offline(model=name))
    assert "expected model.safetensors or model.safetensors.index.json" in refused(offline(model=name))
    assert content(folder(online(model=name))) == single()


@pytest.mark.parametrize("spoilt", ["{", "[1]", '{"a": 1}', None])
def test_a_list_of_checked_files_that_cannot_be_used_does_no_harm(repo, name, online, home, spoilt):
    repo.commit(single())
    marker = home / "sparse_jax" / "verified_blobs.json"
    kept = marker.read_text() if marker.is_file() else "{}"
    marker.unlink(missing_ok=True)
    if spoilt is None:
        shutil.rmtree(marker.parent, ignore_errors=True)
        marker.parent.write_text("a file where the folder should be")
    else:
        marker.parent.mkdir(exist_ok=True)
        marker.write_text(spoilt)
    answer = online(model=name)
    if spoilt is None:
        marker.parent.unlink()
        marker.parent.mkdir()
    else:
        assert any(name.replace("/", "--") in path for path in json.loads(marker.read_text()))
    marker.write_text(kept)
    assert content(folder(answer)) == single()


# What the hub does not have


def test_a_model_that_is_not_there(online):
    message = refused(online(model="owner/nothing"))
    assert "model 'owner/nothing' is neither embedded (novel-neox) nor a local folder" in message
    assert "no such model, or it is private or gated (then set HF_TOKEN" in message
    assert "give an embedded name or a folder" in message
    assert "no such model" in refused(online(model="nothing", revision="step1000"))


@pytest.mark.parametrize("name", ["not a name!", "a/", "a--b/c", "a/b/c", "-"])
def test_names_that_the_hub_does_not_allow(online, offline, name):
    for process in (online, offline):
        message = refused(process(model=name, revision="step1000"))
        assert f"model {name!r} at revision 'step1000' is neither embedded" in message
        assert "it is no valid name on the hub" in message
        assert len(message) < 500


def test_a_revision_that_is_not_there(repo, name, online):
    for step in range(0, 20_000, 1000):
        repo.commit(single(), f"step{step}")
    message = refused(online(model=name, revision="step300"))
    assert f"model {name!r} has no revision 'step300'; it has step3000, " in message
    assert message.endswith(" and 15 more")
    repo.refs.clear()
    assert refused(online(model=name, revision="step300")) == f"model {name!r} has no revision 'step300'"


def test_a_gated_model(repo, name, online, client, hub):
    repo.commit(single())
    repo.gated = True
    for process in (online, client(HF_TOKEN="hf_abc")):
        message = refused(process(model=name))
        assert f"is gated: accept its licence at {hub.url}/{name}, and set HF_TOKEN" in message
    assert repo.bodies() == set()
    repo.gated = False
    assert content(folder(online(model=name))) == single()


def test_a_token_that_is_not_valid(repo, name, online):
    """Not a hub that is down: the cached commit is no answer."""
    repo.commit(single())
    online(model=name)
    repo.faults["api"] = "401"
    message = refused(online(model=name))
    assert "refused access (401); check that HF_TOKEN is valid" in message


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_refused_before_anything_is_fetched(repo, name, online, pickled):
    repo.commit(SMALL | {pickled: noise(0), "model.fp16.safetensors": noise(1), "training_args.bin": b""}, "step0")
    message = refused(online(model=name, revision="step0"))
    assert f"has only pickled weights ({pickled}), which can run code when loaded" in message
    assert "give another revision, or convert it where torch is installed" in message
    assert "python -c 'from transformers import AutoModelForCausalLM as M" in message
    assert f'from_pretrained("{name}", revision="step0").save_pretrained(' in message
    assert repo.requests == []


def test_a_model_without_weights_that_can_be_read(repo, name, online):
    repo.commit(SMALL | {"model.gguf": b"", "adapter_model.safetensors": b"", "training_args.bin": b""})
    message = refused(online(model=name))
    assert "has no weights that can be read: expected model.safetensors or model.safetensors.index.json" in message
    assert message.endswith("(found adapter_model.safetensors, model.gguf)")
    assert repo.requests == []


def test_a_model_without_config(repo, name, online):
    repo.commit({"model.safetensors": noise(0)})
    assert "has no config.json, so it is no language model" in refused(online(model=name))
    assert repo.requests == []


def test_a_shard_that_the_model_lacks(repo, name, online):
    files = sharded()
    del files["model-00002-of-00003.safetensors"]
    repo.commit(files)
    message = refused(online(model=name))
    assert "lacks model-00002-of-00003.safetensors, which its model.safetensors.index.json names" in message
    assert not any(file.endswith(".safetensors") for file in repo.bodies())


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": "b.bin"}}']
)
def test_an_index_that_is_none(repo, name, online, text):
    repo.commit(single() | {"b.bin": noise(1), "model.safetensors.index.json": text.encode()})
    assert "is not a safetensors index" in refused(online(model=name))
    assert not any(file.endswith((".safetensors", ".bin")) for file in repo.bodies())


def test_a_file_that_is_listed_and_not_there(repo, name, online):
    repo.commit(single())
    repo.faults["model.safetensors"] = "absent"
    assert "lacks model.safetensors, which the hub lists" in refused(online(model=name))
    repo.faults.clear()
    assert content(folder(online(model=name))) == single()


# Without the hub


def test_offline_the_cached_commit_is_used(repo, name, online, offline):
    old = repo.commit(single(0))
    online(model=name)
    online(model=name, revision=old)
    repo.commit(single(1))
    for revision in (None, "main", old):
        answer = offline(model=name, revision=revision)
        assert content(folder(answer)) == single(0)
        assert answer["stderr"] == ""
    message = refused(offline(model=name, revision="step1000"))
    assert f"model {name!r} at revision 'step1000' is neither embedded" in message
    assert "HF_HUB_OFFLINE is set, and the cache has no config.json of it" in message


@pytest.mark.parametrize("lost", ["config.json", "model-00003-of-00003.safetensors", "model.safetensors.index.json"])
def test_offline_a_copy_that_is_not_whole_is_refused(repo, name, online, offline, lost):
    repo.commit(sharded())
    file = folder(online(model=name)) / lost
    file.resolve().unlink()
    message = refused(offline(model=name))
    assert "HF_HUB_OFFLINE is set" in message
    assert lost in message
    assert content(folder(online(model=name))) == sharded()


def test_a_hub_that_is_down(repo, name, online, cut_off):
    message = refused(cut_off(model=name))
    assert "neither embedded (novel-neox) nor a local folder, and the hub did not give it: the hub at" in message
    assert "http://127.0.0.1:9 could not be reached (ConnectError" in message
    assert "and the cache has no config.json of it" in message
    commit = repo.commit(single())
    online(model=name)
    answer = cut_off(model=name)
    assert content(folder(answer)) == single()
    assert answer["stderr"].count("\n") == 1
    assert "http://127.0.0.1:9 could not be reached" in answer["stderr"]
    assert f"using the cached commit {commit} of model {name!r}" in answer["stderr"]
    file = folder(answer) / "model.safetensors"
    file.unlink()
    assert "the cached copy of" in refused(cut_off(model=name))


@pytest.mark.parametrize("fault", ["503", "drop", "hang"])
def test_a_hub_that_does_not_list_the_files(repo, name, online, fault):
    repo.commit(single())
    repo.faults["api"] = f"{fault} once"
    assert content(folder(online(model=name))) == single()
    repo.faults["api"] = fault
    answer = online(model=name)
    assert content(folder(answer)) == single()
    assert "could not be reached" in answer["stderr"]
    assert answer["stderr"].count("\n") == 1


def test_a_failed_update_leaves_the_cached_commit(repo, name, online, offline):
    repo.commit(single(0))
    online(model=name)
    repo.commit(single(1))
    repo.faults["model.safetensors"] = "drop"
    refused(online(model=name))
    assert content(folder(offline(model=name))) == single(0)
    repo.faults.clear()
    assert content(folder(online(model=name))) == single(1)
    assert content(folder(offline(model=name))) == single(1)
