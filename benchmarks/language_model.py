"""How long the language model keeps people waiting: the first call, and text that it writes.

    python -m benchmarks.language_model

First call: a fresh process with an empty compilation cache makes a GPT-2-small-shaped model (12 layers, width 768, 12
heads, 50,257 tokens; random weights) and runs `forward` on one row of 128 tokens, and then with every layer's residual
stream captured; transformers' eager first call, in a process of its own, stands beside it. Written text: 200 greedy
tokens after a short prompt with the embedded model, ours (first call, compilation included, and later ones) and
transformers' `generate` with its KV cache, in turns. Needs the `bench` extra.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

PROMPT = "It is a truth universally acknowledged, that a single man"
N_TOKENS, REPEATS = 200, 5

FIRST_OURS = """
import json, time
started = time.perf_counter()
import jax, numpy as np
from sparse_jax.lm import forward, random_model
from sparse_jax.lm.families.gpt2 import GPT2Config
lm = jax.jit(lambda key: random_model(GPT2Config(12, 768, 3072, 12, 50257, 1024), key))(jax.random.key(0))
jax.block_until_ready(lm.params)
tokens = np.zeros((1, 128), np.int32)
ready = time.perf_counter()
forward(lm, tokens).logits.block_until_ready()
plain = time.perf_counter()
forward(lm, tokens, capture=[f"resid_post.{i}" for i in range(12)], stop=12).residual.block_until_ready()
print(json.dumps({"ready": ready - started, "first": plain - ready, "captures": time.perf_counter() - plain}))
"""

FIRST_THEIRS = """
import json, time
started = time.perf_counter()
import torch
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config()).eval()
tokens = torch.zeros((1, 128), dtype=torch.long)
ready = time.perf_counter()
with torch.no_grad():
    model(tokens)
plain = time.perf_counter()
with torch.no_grad():
    model(tokens, output_hidden_states=True)
print(json.dumps({"ready": ready - started, "first": plain - ready, "captures": time.perf_counter() - plain}))
"""


def first_calls() -> dict[str, dict[str, float]]:
    """Seconds until ready, of the first forward, and of the first with captures, of each library."""
    found = {}
    for name, code in (("sparse_jax", FIRST_OURS), ("transformers", FIRST_THEIRS)):
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
            out = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
        found[name] = json.loads(out.stdout.splitlines()[-1])
    return found


def generation() -> dict[str, list[float]]:
    """Seconds of each call that writes `N_TOKENS` tokens; the two libraries take turns and must write the same."""
    import jax
    import torch
    from transformers import AutoModelForCausalLM

    from sparse_jax.lm import generate, load, load_tokenizer, resolve

    jax.config.update("jax_enable_compilation_cache", False)
    folder = resolve("novel-neox")
    prompt = load_tokenizer(folder).encode([PROMPT])[0][None]
    lm = load("novel-neox")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ours():
        return generate(lm, prompt, N_TOKENS).tokens.tolist()[0]

    def theirs():
        ids = torch.tensor(prompt, dtype=torch.long)
        options = {"do_sample": False, "min_new_tokens": N_TOKENS, "max_new_tokens": N_TOKENS, "pad_token_id": 1}
        with torch.no_grad():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()

    seconds: dict[str, list[float]] = {"sparse_jax": [], "transformers": []}
    for _ in range(1 + REPEATS):
        written = {}
        for name, write in (("sparse_jax", ours), ("transformers", theirs)):
            started = time.perf_counter()
            written[name] = write()
            seconds[name].append(time.perf_counter() - started)
    same = sum(a == b for a, b in zip(written["sparse_jax"], written["transformers"], strict=True))
    print(f"{same} of {N_TOKENS} greedy tokens agree")
    return seconds


def main() -> None:
    calls = first_calls()
    print(f"{'seconds':14}{'until ready':>14}{'first forward':>15}{'first with captures':>21}")
    for name, found in calls.items():
        print(f"{name:14}{found['ready']:14.2f}{found['first']:15.2f}{found['captures']:21.2f}")
    seconds = generation()
    print(f"{N_TOKENS} tokens: first call, then median of {REPEATS}")
    medians = {name: sorted(taken[1:])[REPEATS // 2] for name, taken in seconds.items()}
    for name, taken in seconds.items():
        print(f"{name:14}{taken[0]:8.2f} s {medians[name]:8.3f} s")
    print(f"transformers / sparse_jax, later calls: {medians['transformers'] / medians['sparse_jax']:.2f}")


if __name__ == "__main__":
    main()
