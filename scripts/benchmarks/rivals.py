"""llama.cpp and ik_llama.cpp beside lowbit, on the same numbers: their `llama-bench` on a GGUF file that lowbit wrote.

Build one from the source package of llama-cpp-python (pip download --no-binary llama-cpp-python llama-cpp-python):

    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DGGML_NATIVE=ON && cmake --build build -t llama-bench
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

SECONDS = 600


@dataclass
class Rival:
    """A `llama-bench` binary. extra: arguments that its project recommends."""

    binary: Path
    gguf: Path
    threads: int
    extra: tuple[str, ...] = ()
    failure: str = "it ended"

    def hear(self) -> dict | None:
        """Facts: bytes of the file, the build."""
        run = self._run(1, 0)
        if run is None:
            return None
        build = {name: run[name] for name in ("build_commit", "build_number", "cpu_info") if name in run}
        return {"weights_bytes": self.gguf.stat().st_size, "versions": build}

    def ask(self, batch: int, tokens: int, new: int, number: int) -> dict | None:
        """Timings as those of a worker. llama-bench makes one sequence, and times reading and making on their own."""
        if batch > 1:
            return None
        reads = new <= 2
        run = self._run(tokens, 0) if reads else self._run(0, new - 1)
        if run is None:
            return None
        rate = run["avg_ts"]
        return {"first_seconds": tokens / rate, "steps": new - 1, "decode_seconds": (new - 1) / rate, "batch": 1}

    def _run(self, prompt: int, made: int) -> dict | None:
        command = [str(self.binary), "-m", str(self.gguf), "-p", str(prompt), "-n", str(made), "-r", "1",
                   "-t", str(self.threads), "-o", "json", *self.extra]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            return json.loads(done.stdout[done.stdout.index("[") :])[0]
        except (OSError, subprocess.TimeoutExpired, ValueError, LookupError) as error:
            self.failure = f"{type(error).__name__}: {error}"[:300]
            return None

    def last_words(self) -> str:
        return self.failure

    def end(self) -> None:
        """Nothing runs between two runs."""
