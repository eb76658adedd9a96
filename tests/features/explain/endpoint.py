"""An endpoint on 127.0.0.1 whose "language model" is a rule finder: it reads the prompt and nothing else.

Asked to explain, it names the token with the largest total strength among the listed ones. Asked to simulate or judge,
it looks for the tokens that the explanation in the prompt names in quotes.
"""

import json
import math
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

QUOTED = r'"(?:[^"\\]|\\.)*"'


def find_rule(user: str) -> str:
    strengths = defaultdict(int)
    for line in re.findall(r"^Active tokens and how strongly.*?: (.*)$", user, re.MULTILINE):
        for token, strength in re.findall(rf"({QUOTED}) (\d+)", line):
            strengths[token] += int(strength)
    return f"the token {max(sorted(strengths), key=strengths.get)}"


def named(user: str) -> set[str]:
    explanation = re.search(r"^The feature stands for: (.*)$", user, re.MULTILINE)[1]
    return {json.loads(each) for each in re.findall(QUOTED, explanation)}


def lines(user: str) -> list[tuple[str, str]]:
    found = re.findall(rf"^(\d+)\t({QUOTED})$", user, re.MULTILINE)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return found


def answer(user: str) -> str:
    """What the rule finder says to a prompt."""
    if "Active tokens and how strongly" in user:
        return find_rule(user)
    tokens = named(user)
    if "Tokens of the text:" in user:
        return "\n".join(f"{n}\t{token}\t{10 * (json.loads(token) in tokens)}" for n, token in lines(user))
    texts = [json.loads(text) for _, text in lines(user)]
    if "marked tokens" in user:
        texts = ["|".join(re.findall(r"\[\[(.*?)\]\]", text, re.DOTALL)) for text in texts]
    return "\n".join(f"{n}\t{int(any(token in text for token in tokens))}" for n, text in enumerate(texts, 1))


def logprobs(text: str) -> dict:
    """Log-probabilities as the protocol has them: a written 10 is 10 or 8 (0.9, 0.1), a written 0 is 0 or 1."""
    content = []
    for token in re.findall(r"\d+|\D+", text):
        other = {"10": "8", "0": "1"}.get(token, "x")
        top = [{"token": token, "logprob": math.log(0.9)}, {"token": other, "logprob": math.log(0.1)}]
        content.append({"token": token, "logprob": math.log(0.9), "bytes": list(token.encode()), "top_logprobs": top})
    return {"content": content}


def completion(body: dict, with_logprobs: bool) -> dict:
    user = body["messages"][-1]["content"]
    text = answer(user)
    given = logprobs(text) if with_logprobs and body.get("logprobs") else None
    message = {"role": "assistant", "content": text}
    return {
        "id": "x",
        "object": "chat.completion",
        "model": body["model"] + "-0001",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": given}],
        "usage": {"prompt_tokens": len(user) // 4, "completion_tokens": len(text) // 4, "total_tokens": 0},
    }


class Server(ThreadingHTTPServer):
    """The endpoint; use as a context manager.

    bodies: how often each request body came; answered: those of them that were answered with a completion.
    faults: what to do in place of answering, one for each of the next requests: (status, headers, text), "drop" (close
        the connection), "cut" (half a reply) or None (answer).
    gate: called with the number of completions sent before each; it may block.
    """

    daemon_threads = True

    def __init__(self, with_logprobs: bool = True, gate: Callable[[int], None] = lambda sent: None, key="", port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.with_logprobs, self.gate, self.key = with_logprobs, gate, key
        self.lock, self.bodies, self.answered, self.faults = threading.Lock(), Counter(), Counter(), []
        self.headers_seen, self.under_way, self.most_under_way = [], 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def handle_error(self, request, client_address):
        """Of a client that went away: nothing."""

    def __exit__(self, *_):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        data = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with server.lock:
            server.bodies[data] += 1
            server.headers_seen.append(dict(self.headers))
            fault = server.faults.pop(0) if server.faults else None
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        self.reply(data, fault)

    def done(self):
        """No longer under way; before the client can know it."""
        with self.server.lock:
            self.server.under_way -= 1

    def reply(self, data, fault):
        server = self.server
        if fault == "drop":
            self.done()
            self.close_connection = True
        elif isinstance(fault, tuple):
            self.send(*fault)
        elif self.path != "/v1/chat/completions":
            self.send(404, {}, '{"error": {"message": "no such path"}}')
        elif server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            self.send(401, {}, json.dumps({"error": {"message": f"wrong key {self.headers.get('Authorization')}"}}))
        else:
            with server.lock:
                sent = sum(server.answered.values())
                server.gate(sent)
                server.answered[data] += 1
            text = json.dumps(completion(json.loads(data), server.with_logprobs))
            self.send(200, {}, text, cut=fault == "cut")

    def send(self, status, headers, text, cut=False):
        data = text.encode()
        self.done()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = True
