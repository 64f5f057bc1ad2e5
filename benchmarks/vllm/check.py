"""Whether grpoforge and a real vLLM work together, through the command line: python benchmarks/vllm/check.py

1. ``grpoforge train --sampler vllm`` on ``tiny-math`` against a server. When two steps are done and the third is being
   drawn, the server is killed: one ``error:`` line with its address, exit code 1, the steps saved.
2. The server is started again and ``--resume`` finishes the run. At every step the log-probs that vLLM reported, of
   tokens drawn after the weights were loaded anew, are those of the policy to 1e-3.
3. The same with ``--sampler vllm_colocate``, in vLLM's environment.
4. What would be sent by NCCL is what vLLM's trainer side accepts (there is no GPU here to send it between).

``benchmarks/vllm/install.sh`` first. Listens on 127.0.0.1 only, leaves no process and no file, takes about three
minutes. Exit code 0 when everything held.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from serving import environment_folder, free_port, serving, vllm_variables  # noqa: E402

MODEL = ROOT / "plugins/grpoforge_plugins/tiny_math/model"
AGREEMENT = 1e-3
"""Nats between the log-prob that vLLM reports for a token and the policy's own; both are float32."""
NUM_STEPS, KILLED_AFTER = 5, 2
RUN_SECONDS = 240
PROBLEMS = ("--set", "data.num_eval=32", "--set", "sampler.max_completion_length=64")

TRANSFER = """
from grpoforge.config import ModelConfig
from grpoforge_plugins import load_policy
from grpoforge_plugins.samplers.vllm_transfer import weight_source
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

policy = load_policy(ModelConfig(name="tiny-math", precision="fp32"))
source = weight_source(policy)
info = NCCLTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=1, world_size=2)
sent = list(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
print(info.backend, len(sent), "tensors")
"""


def say(text: str) -> None:
    print(text, flush=True)


def expect(held: bool, what: str) -> None:
    """Say that it held, or end."""
    if not held:
        raise SystemExit(f"FAILED: {what}")
    say(f"  ok  {what}")


def python_path(folder: Path) -> str:
    """Where the other environment finds this checkout, and what this environment knows of it: its entry point."""
    installed = next(file for file in metadata.files("grpoforge") or () if file.name == "entry_points.txt")
    known = Path(str(installed.locate())).parent
    shutil.copytree(known, folder / "known" / known.name, dirs_exist_ok=True)
    return os.pathsep.join(str(one) for one in (ROOT, ROOT / "plugins", ROOT / "kernels", folder / "known"))


def start(python: Path | str, *arguments: str, folder: Path, log: str) -> subprocess.Popen[bytes]:
    """``grpoforge ARGUMENTS`` in ``folder``; what it says goes to ``log``."""
    variables = vllm_variables() | {"PYTHONPATH": python_path(folder), "NO_COLOR": "1"}
    with (folder / log).open("w") as out:
        return subprocess.Popen(
            [str(python), "-m", "grpoforge", *arguments], cwd=folder, env=variables, stdout=out, stderr=out
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> tuple[int, str]:
    """Exit code and what was said; killed when it takes too long."""
    try:
        process.wait(RUN_SECONDS)
    finally:
        process.kill()
        process.wait()
    return process.returncode, log.read_text()


def steps(run: Path) -> list[dict[str, Any]]:
    """The metrics of every step so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [one for one in found if "step_time" in one]


def show_agreement(found: list[dict[str, Any]], num_steps: int) -> None:
    """Every step, and that vLLM agreed with a policy that had moved."""
    name = "sampling/sampling_logp_difference"
    for one in found:
        mean, largest = one[f"{name}/mean"], one[f"{name}/max"]
        say(
            f"      step {one['step']}: largest difference of a log-prob {largest:.1e}, mean {mean:.1e} "
            f"(kl {one['kl']:.5f}, rollout {one['time/rollout']:.2f} s, update and sync {one['time/update']:.2f} s)"
        )
    expect([one["step"] for one in found] == list(range(1, num_steps + 1)), f"{num_steps} steps, each once")
    worst = max(one[f"{name}/max"] for one in found)
    expect(worst < AGREEMENT, f"vLLM's log-probs are the policy's to {worst:.1e} (at most {AGREEMENT:g})")
    expect(found[-1]["kl"] > 1e-4, f"and the policy has moved: kl {found[-1]['kl']:.5f} to where it began")


def check_server(python: Path, folder: Path) -> None:
    """A run whose server dies and comes back."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ("train", "--sampler", "vllm", "--set", f"sampler.base_urls=[{url}]", *PROBLEMS)
    with serving(python, MODEL, port, folder / "server.log") as server:
        say(f"server {url}: ready after {server.wait_until_ready():.0f} s")
        train = start(
            sys.executable, *arguments, "--max-steps", str(NUM_STEPS), "--output", "run", folder=folder, log="train.log"
        )
        try:
            deadline = time.monotonic() + RUN_SECONDS
            while len(steps(folder / "run")) < KILLED_AFTER or not server.num_running():
                if train.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the run did not get there:\n{(folder / 'train.log').read_text()[-3000:]}")
                time.sleep(0.02)
            say(f"  killing the server while it draws; its processes used {server.peak_memory_gb():.1f} GB")
            server.kill()
            code, said = finish(train, folder / "train.log")
        finally:
            train.kill()
    error = next((line for line in said.splitlines() if line.startswith("error: ")), "")
    say(f"      {error}")
    expect(code == 1 and "Traceback" not in said, f"exit code {code}, no traceback")
    expect(f"the vLLM server {url} failed: " in error, "the error names the server")
    expect("hint: start it again" in said and "`grpoforge train --resume`" in said, "the hint says what to do")
    with serving(python, MODEL, port, folder / "server.log") as server:
        say(f"server {url}: back after {server.wait_until_ready():.0f} s")
        train = start(sys.executable, "train", "--resume", "run", folder=folder, log="resume.log")
        code, said = finish(train, folder / "resume.log")
    expect(code == 0, f"--resume: exit code {code}" + ("" if code == 0 else f"\n{said[-3000:]}"))
    show_agreement(steps(folder / "run"), NUM_STEPS)


def check_colocate(python: Path, folder: Path) -> None:
    """A run with vLLM in its own process."""
    say("vllm_colocate, in vLLM's environment")
    options = ("gpu_memory_utilization=0.1", "dtype=float32", "enforce_eager=true")
    settings = [part for option in options for part in ("--set", f"sampler.{option}")]
    arguments = [
        "train",
        "--sampler",
        "vllm_colocate",
        *settings,
        *PROBLEMS,
        "--max-steps",
        "3",
        "--output",
        "colocated",
    ]
    code, said = finish(start(python, *arguments, folder=folder, log="colocate.log"), folder / "colocate.log")
    expect(code == 0, f"exit code {code}" + ("" if code == 0 else f"\n{said[-3000:]}"))
    show_agreement(steps(folder / "colocated"), 3)


def check_transfer(python: Path, folder: Path) -> None:
    """What NCCL would carry."""
    say("NCCL weight transfer, up to the wire")
    script = folder / "transfer.py"
    script.write_text(TRANSFER)
    done = subprocess.run(
        [str(python), str(script)],
        cwd=folder,
        env=vllm_variables() | {"PYTHONPATH": python_path(folder)},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    expect(done.returncode == 0, f"vLLM takes the weights as described: {(done.stdout or done.stderr).strip()[-300:]}")


def main() -> None:
    python = environment_folder() / "bin" / "python"
    if not (environment_folder() / "complete").exists():
        raise SystemExit(f"there is no complete vLLM in {environment_folder()}: run benchmarks/vllm/install.sh")
    # A time limit of CI ends it by SIGTERM: leave through every `finally`.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="grpoforge-vllm-") as folder:
        check_server(python, Path(folder))
        check_colocate(python, Path(folder))
        check_transfer(python, Path(folder))
    say(f"all held, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
