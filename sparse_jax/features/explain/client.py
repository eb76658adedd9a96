"""Chat completions over the OpenAI protocol: retries, a rate limit, threads, and every reply kept on arrival.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", "some-model", key_env="OPENAI_API_KEY")
    with Cache(path) as cache:
        replies = Client(endpoint, cache).ask_all(requests)

The key is read from the environment variable when a request is sent and stands nowhere else: not in a file, a message
or an object's repr. What the endpoint says is searched for it before it is kept or shown.
"""

import http.client
import json
import os
import random
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from sparse_jax.errors import InputError
from sparse_jax.features.explain.cache import Cache, key_of
from sparse_jax.features.explain.cost import Prices, count_tokens
from sparse_jax.features.explain.limits import Pace, retry_after
from sparse_jax.features.explain.requests import Reply, Request

# What is tried again: the endpoint is busy, or broke down. (408: it had not got the whole request in time.)
BUSY = (408, 429)
# The longest wait between two tries that we choose, and that we accept from the endpoint.
LONGEST_BACKOFF, LONGEST_RETRY_AFTER = 60.0, 900.0
# A reply's alternatives that say a small integer are kept, of the twenty that the protocol allows.
TOP_LOGPROBS = 20
_INTEGER = re.compile(r"\s*(?:10|\d)\s*", re.ASCII)


@dataclass(frozen=True)
class Endpoint:
    """Who is asked, and how.

    Attributes:
        base_url: where `/chat/completions` is, such as `http://127.0.0.1:8000/v1`.
        model: its name there.
        key_env: name of the environment variable that holds the key; unset or empty: none is sent.
        logprobs: ask for log-probabilities where they are used.
        timeout: seconds to wait for the endpoint to say something.
        tries: how often a request is sent before the run ends.
        requests_per_minute: 0: as fast as the replies come.
        concurrency: requests under way at once.
        extra: merged into the body of each request; a value of None takes a field out.
    """

    base_url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    logprobs: bool = True
    timeout: float = 120.0
    tries: int = 6
    requests_per_minute: float = 0.0
    concurrency: int = 4
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        """Raises InputError for what cannot be used, without repeating what may be secret."""
        parts = urllib.parse.urlsplit(self.base_url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise InputError("--base-url holds a user, a password or a query: put the key into the variable --key-env")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--base-url {self.base_url!r}: give an address such as http://127.0.0.1:8000/v1")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            raise InputError("--key-env is no name of an environment variable: give the name, never the key itself")
        if not self.model:
            raise InputError("--judge: give the model's name at the endpoint")
        if self.tries < 1 or self.concurrency < 1 or self.timeout <= 0 or self.requests_per_minute < 0:
            raise InputError("--tries, --concurrency, --timeout: positive numbers; --requests-per-minute: not negative")

    @property
    def address(self) -> str:
        return self.base_url.rstrip("/") + "/chat/completions"

    def key(self) -> str:
        """The key; empty where there is none.

        Raises:
            InputError: it holds what no header may.
        """
        key = os.environ.get(self.key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"the variable {self.key_env} holds signs that no key has: set it again")
        return key

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON that is sent."""
        body = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": request.system},
                {"role": "user", "content": request.user},
            ],
            "temperature": 0,
            "max_tokens": request.max_tokens,
        }
        if self.logprobs and request.values:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return {name: value for name, value in (body | self.extra).items() if value is not None}

    def cache_key(self, request: Request) -> str:
        """What the reply is kept under."""
        return key_of(self.address, self.body(request))


def parse_reply(content: dict[str, Any]) -> Reply:
    """What is kept of an endpoint's answer.

    Raises:
        ValueError: it is no chat completion.
    """
    try:
        choice = content["choices"][0]
        text = choice["message"].get("content") or ""
        if not isinstance(text, str):
            raise TypeError("the message is no text")
        tokens = (choice.get("logprobs") or {}).get("content")
        tokens = None if not tokens else [_alternatives(token) for token in tokens]
        usage = {name: n for name, n in (content.get("usage") or {}).items() if isinstance(n, int)}
        return Reply(text, choice.get("finish_reason"), usage, content.get("model"), tokens)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError("the reply is no chat completion") from error


def _alternatives(token: dict[str, Any]) -> tuple[str, dict[str, float] | None]:
    """A token and its alternatives that are small integers. Tokens without a digit have none that are used."""
    text = _spelled(token)
    if not re.search(r"\d", text, re.ASCII):
        return text, None
    listed = [*(token.get("top_logprobs") or ()), token]
    spelled = {_spelled(each): each.get("logprob") for each in listed}
    return text, {t: float(logprob) for t, logprob in spelled.items() if logprob is not None and _INTEGER.fullmatch(t)}


def _spelled(token: dict[str, Any]) -> str:
    """A token as text. Its bytes say it better than its name, in which some endpoints write a space as another sign."""
    if token.get("bytes"):
        return bytes(token["bytes"]).decode("utf8", errors="backslashreplace")
    return token["token"]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Again(Exception):
    """The request may be sent again, after `seconds` (None: choose)."""

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


class Client:
    """Asks an endpoint; all threads share its pace, and its account of what was spent."""

    def __init__(
        self,
        endpoint: Endpoint,
        cache: Cache,
        prices: Prices | None = None,
        *,
        sleep: Callable[[float], Any] | None = None,
    ):
        self.endpoint, self.cache, self.prices = endpoint, cache, prices or Prices()
        self.paid = {"calls": 0, "retries": 0, "prompt_tokens": 0, "completion_tokens": 0}
        self._lock, self._stopped = threading.Lock(), threading.Event()
        # A wait that ends when all is stopped: nobody sleeps through another thread's failure or Ctrl-C.
        self._sleep = sleep or self._stopped.wait
        self._pace = Pace(endpoint.requests_per_minute, sleep=self._sleep, stopped=self._stopped.is_set)
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def spent(self) -> float:
        """What the replies of this run cost."""
        return self.prices.of(self.paid["prompt_tokens"], self.paid["completion_tokens"])

    def ask(self, request: Request) -> Reply:
        """The reply to a question, from the cache where it is there.

        Raises:
            InputError: the endpoint refuses, or cannot be reached; the limit of what may be spent is reached.
        """
        reply = self.cache.get_or_ask(
            self.endpoint.cache_key(request), request.kind, lambda: self._paid(request).to_json()
        )
        return Reply.from_json(reply)

    def ask_all(self, requests: Sequence[Request], progress: Callable[[], Any] = lambda: None) -> list[Reply]:
        """The replies to many questions, in their order, several under way at once.

        After a failure no further question is sent; replies that are under way still arrive and are kept.
        """

        failures: list[BaseException] = []

        def ask(request: Request) -> Reply:
            try:
                reply = self.ask(request)
            except BaseException as error:
                failures.append(error)  # the first is the one that stopped the others
                self._stopped.set()  # here, not where results are awaited: questions would be paid for until it looks
                raise
            progress()
            return reply

        with ThreadPoolExecutor(self.endpoint.concurrency, "ask") as pool:
            futures = [pool.submit(ask, request) for request in requests]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                if failures:
                    raise failures[0]
                return [future.result() for future in futures]
            except BaseException:
                self._stopped.set()
                for future in futures:
                    future.cancel()
                raise

    def _paid(self, request: Request) -> Reply:
        """The reply to a question that is not in the cache."""
        for number in range(1, self.endpoint.tries + 1):
            self._pace.wait()
            if self._stopped.is_set():
                raise InputError("stopped after another request failed")
            with self._lock:
                if self.prices.limit is not None and self.spent >= self.prices.limit:
                    raise InputError(f"--max-cost {self.prices.limit:.4g} is spent; what was paid for is kept")
            try:
                reply = self._send(request)
            except _Again as again:
                if number == self.endpoint.tries or self._stopped.is_set():
                    raise InputError(
                        f"{self.endpoint.base_url} gave no reply in {number} tries: {again}; what was paid for is "
                        "kept, --resume goes on"
                    ) from again
                with self._lock:
                    self.paid["retries"] += 1
                self._wait_after(again, number)
                continue
            with self._lock:
                self.paid["calls"] += 1
                # An endpoint that does not say what it used is taken to have used what the words come to.
                words = {"prompt_tokens": request.system + request.user, "completion_tokens": reply.text}
                for name, text in words.items():
                    said = (reply.usage or {}).get(name)
                    self.paid[name] += count_tokens(text) if said is None else said
            return reply
        raise AssertionError("unreachable")

    def _wait_after(self, again: _Again, number: int) -> None:
        """Wait before the next try: as long as the endpoint asks for, everyone; else longer each time, this thread."""
        backoff = min(LONGEST_BACKOFF, 2.0 ** (number - 1)) * random.uniform(0.75, 1.25)
        if again.seconds:
            self._pace.close_for(again.seconds)
        else:
            self._sleep(backoff)

    def _send(self, request: Request) -> Reply:
        """One try."""
        key = self.endpoint.key()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(self.endpoint.body(request)).encode()
        call = urllib.request.Request(self.endpoint.address, data, headers, method="POST")
        try:
            with self._opener.open(call, timeout=self.endpoint.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, key) from None
        except (OSError, http.client.HTTPException) as error:
            # Not the exception's own words where they could hold headers; its kind and the system's reason are enough.
            reason = getattr(error, "reason", None) or error
            raise _Again(hide(f"{type(error).__name__}: {reason}", key)) from None
        try:
            return parse_reply(json.loads(hide(content.decode("utf8"), key)))
        except ValueError as error:
            raise _Again(f"what came back is no chat completion ({type(error).__name__})") from None

    def _refused(self, error: urllib.error.HTTPError, key: str) -> Exception:
        """What to raise for a status that is no success."""
        try:
            said = hide(error.read(2000).decode("utf8", errors="replace"), key)
        except (OSError, http.client.HTTPException):
            said = ""
        message, code = _said(said)
        where = f"{self.endpoint.base_url} refuses (HTTP {error.code})"
        # An empty account answers 429 too; waiting will not fill it.
        if (error.code in BUSY or error.code >= 500) and code != "insufficient_quota":
            seconds = retry_after(error.headers.get("Retry-After"))
            if seconds is not None and seconds > LONGEST_RETRY_AFTER:
                return InputError(f"{where} and asks to come back in {seconds:.0f} s: --resume then. {message}")
            return _Again(f"HTTP {error.code} {message}".strip(), seconds)
        if error.code in (401, 403):
            held = "is not set" if not key else "holds a key that is not taken"
            return InputError(f"{where}: the environment variable {self.endpoint.key_env} {held}. {message}")
        if 300 <= error.code < 400:
            return InputError(f"{where}: it redirects, which is not followed; give the address it redirects to")
        hints = {
            400: "; where it does not know a field of the request, take it out with --extra or --no-logprobs",
            404: f"; see --base-url and whether it has a model {self.endpoint.model!r}",
        }
        return InputError(f"{where}: {message or error.reason}{hints.get(error.code, '')}")


def hide(text: str, key: str) -> str:
    """The text without the key. What is shorter than eight signs is no secret but a word ("none", "EMPTY")."""
    return text.replace(key, "***") if len(key) >= 8 else text


def _said(text: str) -> tuple[str, str | None]:
    """(the message, the code) of an error's body, in the protocol's form or any other."""
    try:
        error = json.loads(text)["error"]
        if isinstance(error, dict):
            return str(error.get("message", ""))[:500], error.get("code") or error.get("type")
        return str(error)[:500], None
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:200], None
