"""The client against a server that fails in all the ways that endpoints do."""

import json
import threading
import time
from email.utils import formatdate

import pytest

from sparse_jax.errors import InputError
from sparse_jax.features.explain import Cache, Client, Endpoint, Prices, Request, prompts
from sparse_jax.features.explain.client import parse_reply
from sparse_jax.features.explain.limits import Pace, retry_after
from tests.features.explain import endpoint
from tests.features.explain.endpoint import Server

KEY = "sk-test-0123456789abcdef"


def simulation(word: str = "king", values: bool = True) -> Request:
    return Request("simulation", "system", prompts.simulate(f'the token " {word}"', [" a", f" {word}"]), 50, 20, values)


@pytest.fixture
def server():
    with Server() as server:
        yield server


def client_of(server, cache=None, prices=None, waits=None, **fields):
    endpoint = Endpoint(server.url, "judge", **{"key_env": "NO_SUCH_KEY", **fields})
    return Client(
        endpoint, Cache(None) if cache is None else cache, prices, sleep=None if waits is None else waits.append
    )


def test_what_is_sent_and_kept(server, tmp_path):
    with Cache(tmp_path / "replies.jsonl") as cache:
        client = client_of(server, cache, Prices(2.0, 4.0))
        reply = client.ask(simulation())
        assert reply.text == '1\t" a"\t0\n2\t" king"\t10'
        assert reply.model == "judge-0001"
        assert client.ask(simulation()) == reply
    (body,) = map(json.loads, server.bodies)
    assert body["model"] == "judge"
    assert body["temperature"] == 0
    assert body["max_tokens"] == 50
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "Authorization" not in server.headers_seen[0]
    assert client.paid["calls"] == sum(server.bodies.values()) == 1
    assert client.paid["prompt_tokens"] == reply.usage["prompt_tokens"] > 0
    usage = reply.usage
    assert client.spent == pytest.approx((2 * usage["prompt_tokens"] + 4 * usage["completion_tokens"]) / 1e6)
    # Alternatives only at tokens with digits, only integers.
    spoken = {token: alternatives for token, alternatives in reply.tokens if alternatives is not None}
    assert set(spoken["10"]) == {"10", "8"}
    assert set(spoken["2"]) == {"2"}
    with Cache(tmp_path / "replies.jsonl") as cache:
        assert client_of(server, cache).ask(simulation()) == reply
    assert sum(server.bodies.values()) == 1


def test_fields_can_be_added_and_taken_out(server):
    client = client_of(server, logprobs=False, extra={"temperature": None, "seed": 7, "max_tokens": None})
    assert client.ask(simulation()).tokens is None
    (body,) = map(json.loads, server.bodies)
    assert set(body) == {"model", "messages", "seed"}
    # Another request, another key: no reply is found for it.
    assert client.endpoint.cache_key(simulation()) != client_of(server).endpoint.cache_key(simulation())


@pytest.mark.parametrize(
    "fault",
    ["drop", "cut", (500, {}, "oops"), (503, {}, '{"error": "full"}'), (429, {}, "{}"), (200, {}, "no json"),
     (200, {}, '{"choices": []}'), (408, {}, "")],
)  # fmt: skip
def test_passing_faults_are_survived(server, fault):
    server.faults = [fault, fault]
    waits = []
    client = client_of(server, waits=waits)
    assert client.ask(simulation()).text.endswith("10")
    assert sum(server.bodies.values()) == 3
    assert client.paid["calls"] == 1
    assert client.paid["retries"] == 2
    # Longer each time: about one second, then about two.
    assert 0.7 < waits[0] < 1.3 < 1.4 < waits[1] < 2.6


def test_retry_after_is_honoured(server):
    server.faults = [(429, {"Retry-After": "1"}, "{}")]
    started = time.monotonic()
    client = client_of(server, concurrency=2)
    client.ask_all([simulation("king"), simulation("queen")])
    assert 1.0 <= time.monotonic() - started < 5
    assert client.paid == client.paid | {"calls": 2, "retries": 1}


def test_an_endpoint_that_stays_broken(server, tmp_path):
    server.faults = [None] + 100 * ["drop"]
    with Cache(tmp_path / "replies.jsonl") as cache:
        client = client_of(server, cache, waits=[], tries=3, concurrency=1)
        with pytest.raises(InputError, match=r"no reply in 3 tries: .*--resume"):
            client.ask_all([simulation(word) for word in ("king", "queen", "bishop", "rook")])
        assert len(cache) == 1
    assert sum(server.bodies.values()) <= 1 + 3 + 3


def test_nobody_is_there():
    with Server() as server:
        url = server.url
    client = Client(Endpoint(url, "judge", tries=2), Cache(None), sleep=lambda seconds: None)
    with pytest.raises(InputError, match=r"no reply in 2 tries: .*[Rr]efused"):
        client.ask(simulation())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ((400, {}, '{"error": {"message": "logprobs unknown"}}'), "HTTP 400.*logprobs unknown.*--no-logprobs"),
        ((401, {}, '{"error": {"message": "bad key"}}'), "HTTP 401.*NO_SUCH_KEY is not set.*bad key"),
        ((404, {}, "nothing"), "HTTP 404.*nothing.*'judge'"),
        ((302, {"Location": "http://127.0.0.1:9/v1"}, ""), "redirects"),
        ((429, {}, '{"error": {"message": "pay", "code": "insufficient_quota"}}'), "HTTP 429.*pay"),
        ((429, {"Retry-After": "86400"}, "{}"), "come back in 86400 s"),
    ],
)
def test_what_waiting_will_not_help_ends_at_once(server, fault, words):
    server.faults = [fault]
    waits = []
    with pytest.raises(InputError, match=words):
        client_of(server, waits=waits).ask(simulation())
    assert waits == []
    assert sum(server.bodies.values()) == 1


def test_after_a_refusal_nothing_more_is_asked(server):
    server.faults = [None, (400, {}, "{}")]
    with pytest.raises(InputError, match="HTTP 400"):
        client_of(server, concurrency=1).ask_all([simulation(f"w{i}") for i in range(50)])
    assert sum(server.bodies.values()) == 2


def test_the_key_goes_to_the_endpoint_and_nowhere_else(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with Server(key=KEY) as server, Cache(tmp_path / "replies.jsonl") as cache:
        client = client_of(server, cache, key_env="JUDGE_KEY", concurrency=1)
        client.ask(simulation())
        assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"
        # An endpoint that says the key aloud, in a reply and in errors.
        said = {"choices": [{"message": {"content": f"you are {KEY}"}, "finish_reason": "stop"}]}
        server.faults = [(200, {}, json.dumps(said))]
        assert client.ask(simulation("queen")).text == "you are ***"
        for status in (400, 401, 500):
            server.faults = 6 * [(status, {}, json.dumps({"error": {"message": f"key {KEY}"}}))]
            with pytest.raises(InputError, match=r"key \*\*\*") as caught:
                client_of(server, cache, key_env="JUDGE_KEY", waits=[]).ask(simulation("rook"))
            assert KEY not in str(caught.value)
            assert KEY not in repr(caught.value.__context__)
        assert KEY not in repr(client.endpoint)
        assert KEY not in repr(vars(client))
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    assert KEY not in "".join(capfd.readouterr())
    monkeypatch.setenv("JUDGE_KEY", "two\nlines")
    with Server() as server, pytest.raises(InputError, match="JUDGE_KEY holds signs"):
        client_of(server, key_env="JUDGE_KEY").ask(simulation())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base_url": f"http://me:{KEY}@host/v1"}, "user, a password or a query"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "user, a password or a query"),
        ({"base_url": "host:8000/v1"}, "--base-url 'host:8000/v1'"),
        ({"key_env": KEY}, "never the key itself"),
        ({"model": ""}, "--judge"),
        ({"tries": 0}, "--tries"),
        ({"requests_per_minute": -1.0}, "--requests-per-minute"),
    ],
)
def test_what_no_endpoint_can_be(fields, words):
    with pytest.raises(InputError, match=words) as caught:
        Endpoint(**{"base_url": "http://host/v1", "model": "judge", **fields})
    assert KEY not in str(caught.value)


def test_so_many_at_once_and_in_order():
    barrier = threading.Barrier(3, timeout=10)
    with Server() as server:
        # Each waits until three are there: fewer under way at once would never end.
        original = server.finish_request
        server.finish_request = lambda *args: (barrier.wait(), original(*args))
        replies = client_of(server, concurrency=3).ask_all([simulation(f"w{i}") for i in range(9)])
        assert server.most_under_way <= 3
    assert [f" w{i}" in reply.text for i, reply in enumerate(replies)] == [True] * 9


class Clock:
    """Time that passes only in sleep."""

    def __init__(self):
        self.now, self.lock = 0.0, threading.Lock()

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        with self.lock:
            self.now += seconds


def test_the_pace_is_kept():
    clock, sent = Clock(), []
    pace = Pace(120, clock, clock.sleep)
    for _ in range(5):
        pace.wait()
        sent.append(clock.now)
    assert sent == [0.0, 0.5, 1.0, 1.5, 2.0]
    pace.close_for(10)
    pace.wait()
    assert clock.now == 12.0
    free = Pace(0, clock, clock.sleep)
    free.wait()
    free.wait()
    assert clock.now == 12.0


def test_retry_after_values():
    assert retry_after("7") == 7
    assert retry_after("0.5") == 0.5
    assert retry_after(formatdate(1_000_030, usegmt=True), lambda: 1_000_000) == 30
    assert retry_after(formatdate(1_000_000, usegmt=True), lambda: 1_000_030) == 0
    assert retry_after(None) is None
    assert retry_after("soon") is None


def test_the_limit_of_costs_ends_a_run(server):
    prices = Prices(1e6, 1e6, limit=60.0)  # one unit of money a token; a reply costs about that
    client = client_of(server, prices=prices, concurrency=1)
    with pytest.raises(InputError, match="--max-cost 60 is spent"):
        client.ask_all([simulation(f"w{i}") for i in range(20)])
    assert client.spent >= 60
    assert sum(server.bodies.values()) == client.paid["calls"] < 4


def test_an_endpoint_that_does_not_say_what_it_used(server, monkeypatch):
    whole = endpoint.completion
    monkeypatch.setattr(endpoint, "completion", lambda *given: whole(*given) | {"usage": None})
    prices = Prices(1e6, 1e6, limit=60.0)
    client = client_of(server, prices=prices, concurrency=1)
    with pytest.raises(InputError, match="--max-cost 60 is spent"):
        client.ask_all([simulation(f"w{i}") for i in range(20)])
    assert client.paid["prompt_tokens"] > client.paid["completion_tokens"] > 0


def test_odd_replies():
    assert parse_reply({"choices": [{"message": {"content": None}}]}).text == ""
    assert parse_reply({"choices": [{"message": {"content": "x"}, "logprobs": {"content": None}}]}).tokens is None
    for wrong in ({}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": 3}}]}, [], "x"):
        with pytest.raises(ValueError, match="no chat completion"):
            parse_reply(wrong)


def test_bytes_say_what_a_token_is():
    """Names with a sign for a space, a token that is half a character, an alternative without a log-probability."""
    seven = {"token": "\u01207", "bytes": [32, 55], "logprob": -0.1}
    top = [seven, {"token": "8", "logprob": -2.0}, {"token": "9", "logprob": None}, {"token": "x", "logprob": -3.0}]
    content = [{"token": "\u00c3", "bytes": [0xEF], "logprob": 0.0, "top_logprobs": []}, {**seven, "top_logprobs": top}]
    reply = parse_reply({"choices": [{"message": {"content": "x 7"}, "logprobs": {"content": content}}]})
    assert reply.tokens == [("\\xef", None), (" 7", {" 7": -0.1, "8": -2.0})]
