"""Language models from the Hugging Face hub: the files that one commit needs, in the hub's cache, checked by digest.

`huggingface_hub` fetches each file and compares sizes. Which files, that all are of one commit, that their bytes are
those the hub names, and one line for each thing that can go wrong, are this module's part.
"""

import difflib
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sparse_jax.errors import InputError
from sparse_jax.lm.blob_digests import verify, write_whole
from sparse_jax.lm.embedded import MODELS
from sparse_jax.lm.weights import INDEX, SINGLE

CONFIG = "config.json"
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
# Formats that run code when they are loaded, whatever the file is called.
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLED_WEIGHTS = ("pytorch_model", "model", "consolidated")
ATTEMPTS = 3
BRANCHES_SHOWN = 5


@dataclass(frozen=True)
class _Wanted:
    """A model as it was asked for; `revision` is None where none was given."""

    model: str
    revision: str | None

    @property
    def branch(self) -> str:
        return self.revision or "main"

    @property
    def text(self) -> str:
        return f"model {self.model!r}" + (f" at revision {self.revision!r}" if self.revision else "")

    def absent(self, why: str) -> InputError:
        """For a name that leads nowhere: it may have been meant for something that is not on the hub."""
        embedded = ", ".join(MODELS)
        return InputError(
            f"{self.text} is neither embedded ({embedded}) nor a local folder, and the hub did not give it: {why}"
        )


@dataclass(frozen=True)
class _Commit:
    """One commit of a model: its files, each with the digest that the hub names (None where it names none)."""

    sha: str
    digests: dict[str, str | None]


class _NotReached(Exception):
    """The hub gave no usable answer, for a reason that may pass."""


def fetch(model: str, revision: str | None = None) -> Path:
    """The folder with one commit of a hub model, downloaded to the hub's own cache where it is not there yet.

    Fetched are `config.json`, the tokenizer's files and the safetensors: the shards that `model.safetensors.index.json`
    names, else `model.safetensors`. Every file is compared with the digest that the hub names, once as long as it does
    not change. Where the hub cannot be reached (one line on stderr says so), or HF_HUB_OFFLINE is set, the folder is
    that of the commit cached last for this revision.

    The environment says where from and where to: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.

    Args:
        model: a hub id such as "EleutherAI/pythia-70m".
        revision: branch, tag or commit; by default "main".

    Returns:
        The snapshot folder in the cache. The weights are fetched last: where they are the rest is too, unless another
        program left the tokenizer out.

    Raises:
        InputError: no such model or revision; no access to it; no safetensors among its files, or other files lacking;
            a wrong digest (the file is deleted, so that the next call fetches it again); the hub cannot be reached and
            the cache does not hold all files; the cache cannot be written.
    """
    from huggingface_hub import constants

    wanted = _Wanted(model, revision)
    if constants.HF_HUB_OFFLINE:
        return _from_cache(wanted, "HF_HUB_OFFLINE is set")
    try:
        commit = _commit(wanted)
    except _NotReached as error:
        folder = _from_cache(wanted, str(error))
        print(f"{error}; using the cached commit {folder.name} of {wanted.text}", file=sys.stderr)
        return folder
    return _from_hub(wanted, commit)


def _commit(wanted: _Wanted) -> _Commit:
    """The commit that the revision is now.

    Raises:
        _NotReached: no answer, or not a hub's.
        InputError: the hub has no such model or revision, or does not show it.
    """
    from huggingface_hub import HfApi, constants

    def ask():
        # Without a time-out given here it would wait for ever.
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        return HfApi().model_info(wanted.model, revision=wanted.branch, files_metadata=True, timeout=timeout)

    # With something in the cache nobody has to wait.
    attempts = 1 if _cached_folder(wanted) else ATTEMPTS
    try:
        info = _with_retries(ask, attempts)
    except Exception as error:  # the client raises its own errors, its HTTP library's, and those of parsing the answer
        if _may_pass(error):
            raise _NotReached(f"the hub at {constants.ENDPOINT} could not be reached ({_short(error)})") from error
        raise _refusal(wanted, error) from error
    if info.sha is None or info.siblings is None:
        raise _NotReached(f"{constants.ENDPOINT} did not answer as a hub does (no commit or no files given)")
    return _Commit(info.sha, {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings})


def _from_hub(wanted: _Wanted, commit: _Commit) -> Path:
    """Download what the cache lacks of a commit."""

    def get(name: str) -> Path:
        path = _download(wanted, name, commit.sha)
        verify(path, commit.digests[name], f"{name} of {wanted.text}")
        return path

    config = _get_needed(commit.digests, get, f"{wanted.text} (commit {commit.sha})", wanted)
    _note_revision(config.parent, wanted.branch)
    return config.parent


def _from_cache(wanted: _Wanted, why: str) -> Path:
    """The cached commit of a revision, checked, without a request."""
    folder = _cached_folder(wanted)
    if folder is None:
        raise wanted.absent(f"{why}, and the cache has no {CONFIG} of it")

    def get(name: str) -> Path:
        verify(folder / name, None, f"{name} of {wanted.text}")
        return folder / name

    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    _get_needed(names, get, f"{why}, and the cached copy of {wanted.text} (commit {folder.name})", wanted)
    return folder


def _cached_folder(wanted: _Wanted) -> Path | None:
    """The folder of the commit cached last for the revision, whole or not; None where not even `config.json` is."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(wanted.model, CONFIG, revision=wanted.branch)
    except HFValidationError as error:
        raise _refusal(wanted, error) from error
    # It may also be a sign for "known not to exist".
    return Path(config).parent if isinstance(config, str) else None


def _get_needed(names: Iterable[str], get: Callable[[str], Path], where: str, wanted: _Wanted) -> Path:
    """`get` all needed ones of the files `names` and return that of `config.json`; the weights come last.

    Raises:
        InputError: a needed file is not among `names`; nothing heavy has been fetched then.
    """
    names = set(names)
    if CONFIG not in names:
        raise InputError(f"{where} has no {CONFIG}, so it is no language model in Hugging Face's layout")
    if not names & {INDEX, SINGLE}:
        raise _no_safetensors(names, where, wanted)
    config = get(CONFIG)
    for name in sorted(names):
        if any(fnmatch(name, pattern) for pattern in TOKENIZER) and "/" not in name and not name.endswith(PICKLED):
            get(name)
    shards = _shards(get(INDEX)) if INDEX in names else [SINGLE]
    if missing := [name for name in shards if name not in names]:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(f"{where} lacks {shown}, which its {INDEX} names")
    for name in shards:
        get(name)
    return config


def _shards(index: Path) -> list[str]:
    """The files that a safetensors index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()))
        # Not what another index may name: pickles.
        if all(name.endswith(".safetensors") for name in names):
            return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not a safetensors index: {_short(error)}") from error
    raise InputError(f"{index} is not a safetensors index: it names other files than safetensors")


def _no_safetensors(names: set[str], where: str, wanted: _Wanted) -> InputError:
    pickles = sorted(name for name in names if name.endswith(PICKLED) and name.startswith(PICKLED_WEIGHTS))
    if not pickles:
        others = sorted(name for name in names if name.endswith((".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")))
        found = f" (found {', '.join(others[:3])})" if others else ""
        return InputError(f"{where} has no weights that can be read: expected {SINGLE} or {INDEX}{found}")
    name, revision = json.dumps(wanted.model), json.dumps(wanted.branch)
    folder = re.sub(r"[^\w.-]+", "-", f"{wanted.model.split('/')[-1]}-{wanted.branch}")
    command = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f'[c.from_pretrained({name}, revision={revision}).save_pretrained("{folder}") for c in (M, T)]'
    )
    return InputError(
        f"{where} has only pickled weights ({pickles[0]}), which can run code when loaded, and no {SINGLE}; give "
        f"another revision, or convert it where torch is installed and you trust it, and give the folder {folder}: "
        f"python -c {shlex.quote(command)}"
    )


def _download(wanted: _Wanted, name: str, commit: str) -> Path:
    """One file's place in the cache, fetched if it is not there. A part of a file is never left under its name."""
    from huggingface_hub import hf_hub_download

    try:
        # The client itself goes on after a connection closed early or silent, but not after one that was reset.
        return Path(_with_retries(lambda: hf_hub_download(wanted.model, name, revision=commit), ATTEMPTS))
    except Exception as error:  # a wide family, see `_commit`
        raise _refusal(wanted, error, name) from error


def _with_retries(ask: Callable[[], Any], attempts: int) -> Any:
    """`ask()`, again after a while for errors that may pass."""
    for attempt in range(attempts - 1):
        try:
            return ask()
        except Exception as error:
            if not _may_pass(error):
                raise
            time.sleep(2**attempt)
    return ask()


def _may_pass(error: BaseException) -> bool:
    """Whether to ask again: the fault of the network or the server, not of the question or the disk."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return not (isinstance(error, HFValidationError | EntryNotFoundError) or _of_disk(error))


def _of_disk(error: BaseException) -> bool:
    """No space, no permission and the like; the client's own `OSError`s have no number."""
    network = isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, OSError) and error.errno is not None and not network


def _cause(error: BaseException) -> BaseException:
    """What was raised first, where the client says only that the cache does not have the file either."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def _refusal(wanted: _Wanted, error: BaseException, name: str | None = None) -> InputError:
    """The one line for what the client raised, while it asked for the commit or for the file `name`."""
    from huggingface_hub import constants, errors

    error = _cause(error)
    page = f"{constants.ENDPOINT}/{wanted.model}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.HFValidationError):
        return wanted.absent(f"it is no valid name on the hub ({_short(error)})")
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{wanted.text} is gated: accept its licence at {page}, and set HF_TOKEN to a token of that account "
            "(or run `hf auth login`)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return wanted.absent(
            f"{constants.ENDPOINT} has no such model, or it is private or gated (then set HF_TOKEN to a token that may "
            "read it); check the spelling, or give an embedded name or a folder"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"model {wanted.model!r} has no revision {wanted.branch!r}{_branches(wanted)}")
    if isinstance(error, errors.EntryNotFoundError):
        return InputError(f"{wanted.text} lacks {name}, which the hub lists; try again, or another revision")
    if status in (401, 403):
        return InputError(
            f"{wanted.text}: {constants.ENDPOINT} refused access ({status}); check that HF_TOKEN is valid and may read "
            f"gated models, and accept the licence at {page} if there is one"
        )
    what = f"{name} of {wanted.text}" if name else wanted.text
    if _of_disk(error):
        return InputError(
            f"{what} could not be written to the cache {constants.HF_HUB_CACHE}: {error.strerror or _short(error)}; "
            "make space, or set HF_HOME to a folder that can be written"
        )
    return InputError(
        f"{what} could not be fetched from {constants.ENDPOINT} ({_short(error)}); "
        "files fetched so far are kept, so run it again to go on"
    )


def _branches(wanted: _Wanted) -> str:
    """Some revisions that exist, those with similar names first; nothing if the hub does not tell."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    try:
        # Not `HfApi.list_repo_refs`, which has no time-out.
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/models/{wanted.model}/refs",
            headers=build_hf_headers(),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        refs = answer.json()
        names = [str(ref["name"]) for kind in ("branches", "tags") for ref in refs.get(kind, ())]
    except Exception:  # only a help in a message about something else
        return ""
    if not names:
        return ""
    similar = difflib.get_close_matches(wanted.branch, names, n=BRANCHES_SHOWN)
    shown = list(dict.fromkeys([*similar, *names]))[:BRANCHES_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"; it has {', '.join(shown)}{more}"


def _short(error: BaseException) -> str:
    """An error of a library in part of a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _note_revision(folder: Path, revision: str) -> None:
    """Write in the cache's `refs` which commit a revision was, for a time without the hub.

    The client does so too where it is asked for a branch, but then a branch that moves between two files is two
    commits. Done last, so that a revision is never that of a commit of which only a part is here.
    """
    ref = folder.parent.parent / "refs" / revision
    if revision == folder.name:
        return
    try:
        if not (ref.is_file() and ref.read_text() == folder.name):
            write_whole(ref, folder.name)
    except OSError:
        pass  # a cache that can only be read
