"""Sampling with vLLM: ``vllm`` draws from servers, ``vllm_colocate`` from an engine in this process."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch.distributed as dist

from grpoforge.collate import split
from grpoforge.distributed import Workers
from grpoforge.types import Completion, PolicyView, Prompt, Rollouts
from grpoforge_plugins.samplers import options
from grpoforge_plugins.samplers.vllm_colocate import InProcess
from grpoforge_plugins.samplers.vllm_http import Server
from grpoforge_plugins.samplers.vllm_protocol import Drawn, Engine, Request, seed_of
from grpoforge_plugins.samplers.vllm_servers import Servers, Sync

LOCAL = ("http://127.0.0.1:8000",)
"""Where ``vllm serve`` listens by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How completions are drawn. Raises ConfigError for what cannot be."""

    temperature: float
    max_completion_length: int
    top_p: float
    top_k: int
    min_p: float

    def __post_init__(self) -> None:
        options.check(
            options.positive("temperature", self.temperature),
            options.at_least_one("max_completion_length", self.max_completion_length),
            *options.cuts(self.top_p, self.top_k, self.min_p),
        )

    def sampled(self, prompt: Prompt, num: int, seed: int, stop_ids: tuple[int, ...]) -> Request:
        """``num`` completions of ``prompt`` at random."""
        return Request(
            prompt_ids=prompt.token_ids,
            num=num,
            temperature=self.temperature,
            seed=seed,
            max_tokens=self.max_completion_length,
            stop_ids=stop_ids,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
        )

    def greedy(self, prompt: Prompt, stop_ids: tuple[int, ...]) -> Request:
        """The most probable completion of ``prompt``."""
        return Request(
            prompt_ids=prompt.token_ids,
            num=1,
            temperature=0.0,
            seed=0,
            max_tokens=self.max_completion_length,
            stop_ids=stop_ids,
        )


class _Sampler:
    """What both have in common: requests, rollouts, and which weights the engine holds."""

    def __init__(self, engine: Engine, drawing: Drawing) -> None:
        self.engine = engine
        self.drawing = drawing
        self.max_completion_length = drawing.max_completion_length
        self._token = secrets.token_hex(4)
        self._num_loads = 0
        self._loaded_model: weakref.ref[Any] | None = None
        self._policy_version = 0

    def sample(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int) -> Rollouts:
        """``group_size`` completions per prompt; all randomness comes from ``seed``.

        Raises:
            ConfigError: vLLM is not there, or does not fit the policy.
            RunFailed: vLLM failed.
        """
        stop_ids = tuple(sorted(policy.eos_token_ids()))
        requests = [
            self.drawing.sampled(prompt, group_size, seed_of(seed, position), stop_ids)
            for position, prompt in enumerate(prompts)
        ]
        return self._rollouts(policy, prompts, requests, self.drawing.temperature)

    def greedy(self, policy: PolicyView, prompts: Sequence[Prompt]) -> Rollouts:
        """The most probable completion of each prompt. vLLM divides by no temperature here: log-probs are at 1."""
        stop_ids = tuple(sorted(policy.eos_token_ids()))
        return self._rollouts(policy, prompts, [self.drawing.greedy(prompt, stop_ids) for prompt in prompts], 1.0)

    def sync(self, policy: PolicyView) -> None:
        """Bring the engine to the policy's weights."""
        workers = Workers(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Workers()
        self._num_loads += 1
        # Never used twice, by no run: what an engine holds can be told apart from what it was started with.
        version = workers.from_main(f"grpoforge-{self._token}-{self._num_loads}-{policy.version}")
        self.engine.load(policy, version, workers.is_main)
        workers.any(False)  # nobody draws before the main process has sent the weights
        self._loaded_model, self._policy_version = weakref.ref(policy.model), policy.version

    def _rollouts(
        self, policy: PolicyView, prompts: Sequence[Prompt], requests: Sequence[Request], temperature: float
    ) -> Rollouts:
        if self._loaded_model is None or self._loaded_model() is not policy.model:
            self.sync(policy)
        answers = self.engine.generate(requests)
        drawn = [one for answer in answers for one in answer]
        texts = policy.tokenizer.batch_decode([list(one.token_ids) for one in drawn], skip_special_tokens=True)
        completions = [self._completion(one, text, temperature) for one, text in zip(drawn, texts, strict=True)]
        return Rollouts(
            prompts=tuple(prompts),
            completions=tuple(tuple(completions[group]) for group in split(len(drawn), requests[0].num)),
            max_completion_length=self.max_completion_length,
        )

    def _completion(self, drawn: Drawn, text: str, temperature: float) -> Completion:
        return Completion(
            text=text,
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs,
            temperature=temperature,
            finish_reason=drawn.finish_reason,
            policy_version=self._policy_version,
        )


class VLLMSampler(_Sampler):
    """Draws from one or more servers, ``vllm serve``, over HTTP.

    Log-probs are those of the distribution that a token was drawn from: at the temperature, and after ``top_k``,
    ``top_p`` and ``min_p``, which cut it. Token ids go there and come back; text is made here, from them.
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, "logits are divided by it before softmax"] = 1.0,
        max_completion_length: Annotated[int, "tokens per completion at most"] = 512,
        top_p: Annotated[float, "draw from the smallest set of tokens with this much probability"] = 1.0,
        top_k: Annotated[int, "draw from this many most probable tokens; 0 for all"] = 0,
        min_p: Annotated[float, "leave out tokens below this share of the top token's probability"] = 0.0,
        base_urls: Annotated[tuple[str, ...], "addresses of the servers; prompts are spread over them"] = LOCAL,
        timeout: Annotated[float, "seconds to wait for an answer"] = 600.0,
        retries: Annotated[int, "further attempts after a failed one, 0.5 s, 1 s, 2 s, ... later"] = 4,
        concurrency: Annotated[int, "prompts under way per server"] = 64,
        sync: Annotated[Sync, "how weights get to the servers: GPU to GPU, or through a folder"] = "auto",
        sync_folder: Annotated[str, "the folder, which the servers see too; empty for the temporary folder"] = "",
    ) -> None:
        options.check(
            ("timeout", timeout, timeout > 0, "choose it above 0"),
            ("retries", retries, retries >= 0, "choose it at least 0"),
            ("concurrency", concurrency, concurrency >= 1, "choose it at least 1"),
            ("base_urls", len(base_urls), len(base_urls) >= 1, "name at least one server"),
        )
        servers = [Server(url, timeout=timeout, retries=retries) for url in base_urls]
        super().__init__(
            Servers(servers, sync=sync, folder=sync_folder, concurrency=concurrency),
            Drawing(
                temperature=temperature,
                max_completion_length=max_completion_length,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
            ),
        )


class VLLMColocateSampler(_Sampler):
    """Draws from a vLLM engine in the training process, which sleeps between rollouts where the platform lets it.

    Log-probs as `VLLMSampler`'s. One process: several would each need the group that torch gives to a process.
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, "logits are divided by it before softmax"] = 1.0,
        max_completion_length: Annotated[int, "tokens per completion at most"] = 512,
        top_p: Annotated[float, "draw from the smallest set of tokens with this much probability"] = 1.0,
        top_k: Annotated[int, "draw from this many most probable tokens; 0 for all"] = 0,
        min_p: Annotated[float, "leave out tokens below this share of the top token's probability"] = 0.0,
        gpu_memory_utilization: Annotated[float, "share of the memory that vLLM may take, of the GPU or the CPU"] = 0.3,
        tensor_parallel_size: Annotated[int, "GPUs that one copy of the model is divided over"] = 1,
        dtype: Annotated[str, "of vLLM's weights: float32, bfloat16, ...; auto for the model's"] = "auto",
        enforce_eager: Annotated[bool, "start without compiling the model"] = False,
        max_model_len: Annotated[int, "tokens of prompt and completion at most; 0 for the model's context"] = 0,
    ) -> None:
        share = gpu_memory_utilization
        options.check(
            ("gpu_memory_utilization", share, 0 < share <= 1, "choose it in (0, 1]"),
            ("tensor_parallel_size", tensor_parallel_size, tensor_parallel_size >= 1, "choose it at least 1"),
            ("max_model_len", max_model_len, max_model_len >= 0, "choose it at least 0; 0 for the model's context"),
        )
        super().__init__(
            InProcess(
                gpu_memory_utilization=gpu_memory_utilization,
                tensor_parallel_size=tensor_parallel_size,
                dtype=dtype,
                enforce_eager=enforce_eager,
                max_model_len=max_model_len,
            ),
            Drawing(
                temperature=temperature,
                max_completion_length=max_completion_length,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
            ),
        )
