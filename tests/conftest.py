"""Strict settings for every test: no implicit dtype promotion, several CPU devices, warnings are errors (pyproject)."""

import os
import shutil
from pathlib import Path

# Before jax starts: eight fake devices, and compiled programs kept between runs.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Fake devices are threads that wait for each other in collectives. XLA ends the process where one is waited for longer
# than 40 s, which is what a busy machine with fewer cores than devices takes now and then.
# (Once: workers of pytest-xdist have it already, and programs are kept by these flags too.)
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "").split(" --xla_cpu_collective_call_")[0]
    + " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "sparse_jax" / "jax"))
# Small programs too: the same ones are compiled in every worker and in every experiment run as a process of its own.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# No program with collectives may begin before the last has ended: they can wait for each other for ever. (There is no
# environment variable for it.)
jax.config.update("jax_cpu_enable_async_dispatch", False)

BROWSER_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
BROWSER_FLAGS += ["--disable-background-networking", "--disable-component-update"]
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_dropped():
    """Linux lets a process map 65,530 pieces of memory; thousands of compiled programs reach that, and it crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def shared() -> Path:
    """The folder of data that is not part of the project; the test is skipped where it is absent."""
    if not (SHARED / "models").is_dir():
        pytest.skip("the ../shared folder is not here")
    return SHARED


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: the system's, or the one that playwright has downloaded.

    Playwright keeps an event loop running meanwhile, beside which Orbax cannot start its own: a module that opens pages
    saves no checkpoints.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        found = found or playwright.chromium.executable_path
        if not os.path.exists(found):
            pytest.skip("Chromium is not installed")
        browser = playwright.chromium.launch(executable_path=found, args=BROWSER_FLAGS)
        yield browser
        browser.close()
