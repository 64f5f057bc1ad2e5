"""vLLM inside the training process: one copy of its engine, fed with the policy's tensors directly."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

from grpoforge.errors import ConfigError, PluginError, RunFailed, first_line
from grpoforge.types import PolicyView
from grpoforge_plugins.samplers.vllm_protocol import Drawn, Malformed, Request, drawn
from grpoforge_plugins.samplers.vllm_weights import original_weights, save_weights

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine and its one worker in this process: tensors go in as they are
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is data
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the training step uses the same cores
}
"""Set before vLLM is imported, where the user has not."""


class InProcess:
    """vLLM's ``LLM``, started with the first weights and updated in place with all others."""

    def __init__(self, *, tensor_parallel_size: int, max_model_len: int, **engine: Any) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise PluginError(
                "the sampler `vllm_colocate` needs vLLM, which is not installed here",
                "`pip install 'grpoforge[vllm]'`, or use a server: `--sampler vllm` (docs/guides/vllm.md)",
            )
        self.tensor_parallel_size = tensor_parallel_size
        self.engine = engine | {"tensor_parallel_size": tensor_parallel_size, "max_model_len": max_model_len or None}
        self._llm: Any = None
        self._sleeps = self._is_asleep = False
        self._vocabulary = 0

    def load(self, policy: PolicyView, version: str, is_main: bool) -> None:
        """Take the policy's weights and call them ``version``.

        Raises:
            ConfigError: there are several processes, or vLLM cannot start.
            RunFailed: vLLM failed.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"the sampler `vllm_colocate` runs in one process, and this run has {dist.get_world_size()}",
                "use servers: `--sampler vllm` (docs/guides/vllm.md)",
            )
        with _undisturbed():
            if self._llm is None:
                self._start(policy)
            with _failures():
                self._take(policy, version)

    def generate(self, requests: Sequence[Request]) -> list[list[Drawn]]:
        """The completions of every request, in order. Raises RunFailed when vLLM failed or drew nonsense."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        params = [SamplingParams(**request.sampling(), detokenize=False) for request in requests]
        with _undisturbed(), _failures():
            self._wake()
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
            answers = [self._answer(one, request) for one, request in zip(outputs, requests, strict=True)]
            self._sleep()
        return answers

    def _answer(self, output: Any, request: Request) -> list[Drawn]:
        found = []
        for one in sorted(output.outputs, key=lambda one: one.index):
            tokens = list(one.token_ids)
            logprobs = [step[token].logprob for step, token in zip(one.logprobs or (), tokens, strict=False)]
            found.append(drawn(tokens, logprobs, one.finish_reason, request, self._vocabulary))
        return found

    def _start(self, policy: PolicyView) -> None:
        """The engine, born with the policy's weights. Its memory is what is free now, at most the share it may take."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._vocabulary = policy.model.get_input_embeddings().weight.shape[0]
        self._sleeps = policy.device.type == "cuda"
        with tempfile.TemporaryDirectory(prefix="grpoforge-weights-") as folder:
            save_weights(policy, Path(folder))
            try:
                from vllm import LLM

                self._llm = LLM(
                    model=folder,
                    skip_tokenizer_init=True,
                    logprobs_mode="processed_logprobs",
                    generation_config="vllm",
                    enable_sleep_mode=self._sleeps,
                    disable_log_stats=True,
                    # vLLM 0.32 on a CPU dies of a seeded request whose prompt is read in two pieces.
                    enable_chunked_prefill=False if policy.device.type == "cpu" else None,
                    **self.engine,
                )
            except Exception as failure:  # the boundary: what vLLM raises, nobody documents
                raise ConfigError(
                    f"vLLM does not start in this process: {type(failure).__name__}: {first_line(failure)}",
                    "lower `sampler.gpu_memory_utilization`, or look for vLLM's own lines above",
                ) from failure

    def _take(self, policy: PolicyView, version: str) -> None:
        """The policy's weights, by name: as they are to a worker in this process, in a folder to workers elsewhere."""
        self._wake()
        if self.tensor_parallel_size == 1:
            weights = iter(original_weights(policy).items())
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        else:
            with tempfile.TemporaryDirectory(prefix="grpoforge-weights-") as folder:
                save_weights(policy, Path(folder))
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._llm.reset_prefix_cache()
        self._llm.update_weight_version(version)

    def _sleep(self) -> None:
        """Leave the GPU to the update: weights go to the CPU's memory, the cache goes away."""
        if self._sleeps:
            self._llm.sleep(level=1)
            self._is_asleep = True

    def _wake(self) -> None:
        if self._is_asleep:
            self._llm.wake_up()
            self._is_asleep = False


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Whatever vLLM raises inside ends the run with a line that says so."""
    try:
        yield
    except Malformed as failure:
        raise RunFailed(f"vLLM answered {failure}", "see docs/guides/vllm.md") from failure
    except Exception as failure:  # the boundary: what vLLM raises, nobody documents
        raise RunFailed(
            f"vLLM failed in this process: {type(failure).__name__}: {first_line(failure)}",
            "look for vLLM's own lines above, then continue with `grpoforge train --resume`",
        ) from failure


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Every global random generator outside as it was: vLLM seeds them when it starts and draws from torch's."""
    python, array = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(python)
    numpy.random.set_state(array)
