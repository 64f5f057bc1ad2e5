"""The default run asks nobody: every connection and every name look-up fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WITHOUT_NETWORK = """
import socket

asked = []


def refuse(*arguments, **options):
    asked.append(repr(arguments))
    raise OSError(101, "Network is unreachable")


class Unconnected(socket.socket):
    def connect(self, address):
        if self.family == socket.AF_UNIX:
            return super().connect(address)
        return refuse(address)

    connect_ex = connect

    def sendto(self, *arguments):
        return refuse(*arguments)


socket.socket = Unconnected
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
# What the caller's environment switches off must be off by itself.
import os

for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))]:
    del os.environ[name]

from grpoforge.cli.main import main

try:
    main()
finally:
    assert not asked, asked
"""


def test_the_default_run_needs_no_network(tmp_path: Path, program: Any) -> None:
    (tmp_path / "without_network.py").write_text(WITHOUT_NETWORK)
    process = program.popen(
        "train", "--reward", "math", "--reward", "brevity", "--max-steps", "2", "--output", "run",
        "--set", "data.num_eval=4", "--set", "batch.prompts_per_step=2", "--set", "batch.minibatch_size=16",
        "--set", "batch.micro_batch_size=16",
        "--set", "sampler.max_completion_length=16",
        python=[str(tmp_path / "without_network.py")],
        HOME=str(tmp_path / "home"),
    )  # fmt: skip
    shown, talk = process.communicate()
    assert process.returncode == 0, talk
    assert "AssertionError" not in talk
    assert "accuracy (pass@1, greedy)" in shown
    assert (tmp_path / "run/checkpoints/step-000002/model.safetensors").is_file()
    kept = {path.parent.name for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix == ".json"}
    assert kept <= {"certificates"}, kept
    written = {path.relative_to(tmp_path / "home").parts[:2] for path in (tmp_path / "home").rglob("*/*")}
    assert written <= {(".cache", "grpoforge")}, "outside of the run directory only the kernels' cache is written"
