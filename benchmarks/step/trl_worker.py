"""The TRL half of `bench_step.py`: runs in TRL's own environment and knows nothing of grpoforge.

    python trl_worker.py SPEC.json

A real GRPOTrainer on the CPU. Before each cycle (one generation and its optimizer steps) it says `ready` on stdout and
waits for a line on stdin; after it, it prints the seconds of the cycle and of its parts as JSON. In a race
(`until_accuracy`) it does not wait: it measures held-out accuracy every few cycles, with the clock stopped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer


def say(**values: Any) -> None:
    """One line of JSON for the parent."""
    print(json.dumps(values), flush=True)


class Timed(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer with a clock around its rollouts."""

    rollout_seconds = 0.0

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = super()._generate(*args, **kwargs)
        self.rollout_seconds += time.perf_counter() - start
        return result


class Cycles(TrainerCallback):  # type: ignore[misc]
    """Times cycles, each when the parent asks for it."""

    def __init__(self, updates: int) -> None:
        self.updates, self.trainer, self.start = updates, None, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first step of a cycle waits for the parent."""
        if state.global_step % self.updates == 0:
            say(event="ready")
            if not sys.stdin.readline().strip():
                raise SystemExit(0)
            self.trainer.rollout_seconds, self.start = 0.0, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step of a cycle reports."""
        if state.global_step % self.updates == 0:
            seconds, rollout = time.perf_counter() - self.start, self.trainer.rollout_seconds
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            say(event="step", step=seconds, rollout=rollout, rest=seconds - rollout, peak_mb=peak)


class Race(TrainerCallback):  # type: ignore[misc]
    """Stops when held-out accuracy is reached; evaluations are not on the clock."""

    def __init__(self, spec: dict[str, Any], answers: Any) -> None:
        self.spec, self.answers, self.trainer = spec, answers, None
        self.seconds, self.since = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock starts."""
        self.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every few cycles."""
        if state.global_step % (self.spec["updates"] * self.spec["every"]):
            return
        self.seconds += time.perf_counter() - self.since
        accuracy = self.accuracy()
        say(event="accuracy", step=state.global_step // self.spec["updates"], seconds=self.seconds, accuracy=accuracy)
        control.should_training_stop = accuracy >= self.spec["until_accuracy"]
        self.since = time.perf_counter()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Of greedy completions of the held-out problems."""
        model, tokenizer, right = self.trainer.model, self.trainer.processing_class, 0
        was_training = model.training
        model.eval()
        tokenizer.padding_side = "left"
        for at in range(0, len(self.spec["held_out"]), 128):
            rows = self.spec["held_out"][at : at + 128]
            inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True,
                               add_special_tokens=False)  # fmt: skip
            ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            config = GenerationConfig(do_sample=False, max_new_tokens=self.spec["length"], **ends)
            found = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
            for text, row in zip(tokenizer.batch_decode(found, skip_special_tokens=True), rows, strict=True):
                right += is_right(self.answers, text, row["answer"])
        model.train(was_training)
        return right / len(self.spec["held_out"])


def is_right(answers: Any, text: str, reference: str) -> bool:
    """As grpoforge's reward `math` scores it."""
    return answers.extract_answer(text) == answers.reference_answer(reference)


def load_answers(path: str) -> Any:
    """The module that reads final answers, which needs nothing but the standard library."""
    module_spec = importlib.util.spec_from_file_location("answers", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def rewards_of(spec: dict[str, Any], answers: Any) -> list[Any]:
    """`math` and `brevity` (gated on it), or a reward that differs within every group."""
    if answers is None:
        return [lambda completions, **_: [float(row % 2) for row in range(len(completions))]]

    def math(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [float(is_right(answers, text, ref)) for text, ref in zip(completions, answer, strict=True)]

    def brevity(completions: list[str], answer: list[str], completion_ids: list[Any], **_: Any) -> list[float]:
        return [
            right * (1 - len(ids) / spec["length"]) if len(ids) < spec["length"] else 0.0
            for right, ids in zip(math(completions, answer), completion_ids, strict=True)
        ]

    return [math, brevity]


def config_of(spec: dict[str, Any], folder: str) -> GRPOConfig:
    """The same arithmetic as the other half's."""
    generation = {} if "until_accuracy" in spec else {"min_new_tokens": spec["length"]}
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=spec["minibatch"],
        gradient_accumulation_steps=1,
        steps_per_generation=spec["updates"],
        num_generations=spec["group"],
        max_completion_length=spec["length"],
        max_steps=spec["max_cycles"] * spec["updates"],
        temperature=1.0,
        top_k=0,
        beta=spec["beta"],
        loss_type="dapo",
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=spec["warmup"],
        max_grad_norm=1.0,
        weight_decay=0.0,
        reward_weights=[1.0, 0.1] if "until_accuracy" in spec else None,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        report_to="none",
        logging_steps=1000,
        save_strategy="no",
        disable_tqdm=True,
        seed=spec["seed"],
        generation_kwargs=generation | spec["options"].pop("generation_kwargs", {}),
        **spec["options"],
    )


def main() -> None:
    """Train as the parent says."""
    warnings.simplefilter("ignore")
    disable_progress_bar()
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    torch.set_num_threads(spec["threads"])
    answers = load_answers(spec["answers"]) if "until_accuracy" in spec else None
    callback = Race(spec, answers) if answers else Cycles(spec["updates"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stderr = nowhere
        trainer = Timed(
            model=spec["model"],
            reward_funcs=rewards_of(spec, answers),
            args=config_of(spec, folder),
            train_dataset=Dataset.from_list(spec["rows"]),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        callback.trainer = trainer
        trainer.train()


if __name__ == "__main__":
    main()
