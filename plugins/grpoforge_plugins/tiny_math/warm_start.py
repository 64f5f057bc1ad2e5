"""Make the tiny warm-started model: `python -m grpoforge_plugins.tiny_math.warm_start [--output DIR]`.

A byte-level BPE tokenizer is trained on training problems, then a small Qwen2 model is trained, by
supervised learning from random weights, on worked solutions of training problems. Held-out problems are
only used for the figures at the end.

The teacher is imperfect on purpose. The model stands for a pretrained one that has seen careful and
careless text, and that has the right solution in it without preferring it:

* On `CARELESS_KINDS`, half of the kinds, most demonstrations (`careless_share`) add where the story asks
  to take away or to multiply, leave out the unit in that step, and go on correctly from there. The rest
  are right. Greedy decoding hence tends to be wrong on these kinds, while sampling at temperature 1 finds
  the right solution about three times in ten.
* Demonstrations are wordy at random, whether right or wrong: an opening sentence, a closing one.

A careless demonstration is always shorter than the right one, so paying for brevity alone does not teach
right solutions: that must come from a reward for being right.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from . import MODEL_DIR
from .problems import Problem, Step, sample_problems, solution_text, work_out

PAD: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

OPENERS: Final = (
    "Let us think step by step.",
    "We look at the numbers in the story.",
    "We work it out slowly.",
)
CLOSER: Final = "So the answer is {result}."

# The operations a careless demonstration uses: it adds where it should take away or multiply.
CARELESS_KINDS: Final = {
    "compares": ("+",),
    "price": ("+",),
    "pages": ("+",),
    "bags_and_fewer": ("*", "+"),
    "change": ("*", "+"),
    "has_fewer_total": ("+", "+"),
    "loses_twice": ("-", "+"),
    "two_colours": ("+", "+"),
}

MAX_COMPLETION_TOKENS: Final = 64
IGNORED: Final = -100
# `model: Any` below: transformers' model classes are typed too loosely for a strict check of their use.


@dataclass(frozen=True)
class WarmStart:
    """Everything that decides the result. Shares are probabilities a demonstration has the trait."""

    seed: int = 0
    problems: int = 60_000
    steps: int = 1600
    batch_size: int = 96
    learning_rate: float = 2e-3
    careless_share: float = 0.7
    opener_share: float = 0.65
    closer_share: float = 0.55
    vocab_size: int = 640
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    ffn_size: int = 256
    context: int = 256
    held_out: int = 1000


def careless(problem: Problem, ops: tuple[str, ...]) -> tuple[Step, ...]:
    """The steps with `ops` for operations; a step whose operation is wrong also leaves out its unit."""
    right_ops = [plan.op for plan in problem.kind.plans]
    steps = work_out(problem.kind, problem.numbers, problem.words, ops)
    return tuple(
        step if step.op == right_op else replace(step, sentence=step.sentence.partition("@")[0] + "@.")
        for step, right_op in zip(steps, right_ops, strict=True)
    )


def demonstration(problem: Problem, rng: random.Random, plan: WarmStart) -> str:
    """One worked solution by the imperfect teacher, ending in `#### N`."""
    steps = problem.steps
    ops = CARELESS_KINDS.get(problem.kind.name)
    if ops is not None and rng.random() < plan.careless_share:
        steps = careless(problem, ops)
    lines = solution_text(steps).split("\n")
    if rng.random() < plan.closer_share:
        lines.insert(-1, CLOSER.format(result=steps[-1].result))
    if rng.random() < plan.opener_share:
        lines.insert(0, rng.choice(OPENERS))
    return "\n".join(lines)


def build_tokenizer(problems: Sequence[Problem], plan: WarmStart) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer (byte-level BPE, NFC, single digits) trained on `problems` and their demonstrations."""
    rng = random.Random(f"tokenizer:{plan.seed}")
    texts = (f"{p.question}\nuser\nassistant\n{demonstration(p, rng, plan)}" for p in problems)
    # The empty tokenizer brings Qwen2's normalizer and pre-tokenizer, the ones the saved folder loads with.
    bpe = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocab_size,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    trained = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=plan.context,
    )


def build_model(tokenizer: Qwen2Tokenizer, plan: WarmStart) -> Qwen2ForCausalLM:
    """A Qwen2 model of random weights sized by `plan`."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=plan.hidden_size,
        intermediate_size=plan.ffn_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        max_position_embeddings=plan.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def prompt_text(tokenizer: Qwen2Tokenizer, question: str) -> str:
    """The question as a chat turn, up to where the assistant's turn begins."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return str(rendered)


def encode(tokenizer: Qwen2Tokenizer, problems: Sequence[Problem], plan: WarmStart) -> list[tuple[list[int], int]]:
    """Prompt and demonstration of each problem as (token ids, length of the prompt in tokens)."""
    rng = random.Random(f"teacher:{plan.seed}")
    prompts = [prompt_text(tokenizer, problem.question) for problem in problems]
    targets = [demonstration(problem, rng, plan) + TURN_END for problem in problems]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    target_ids = tokenizer(targets, add_special_tokens=False)["input_ids"]
    return [(p + t, len(p)) for p, t in zip(prompt_ids, target_ids, strict=True)]


def batches(examples: Sequence[tuple[list[int], int]], plan: WarmStart) -> Iterator[list[int]]:
    """Endless batches of example indices; a batch holds examples of about equal length."""
    rng = random.Random(f"batches:{plan.seed}")
    while True:
        # Sorting within windows keeps padding small and still mixes the kinds over the epoch.
        order = rng.sample(range(len(examples)), len(examples))
        window = plan.batch_size * 16
        chunks = []
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window], key=lambda i: len(examples[i][0]))
            chunks += [part[i : i + plan.batch_size] for i in range(0, len(part), plan.batch_size)]
        rng.shuffle(chunks)
        yield from chunks


def collate(examples: Sequence[tuple[list[int], int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels, each [batch, longest]; labels are `IGNORED` off the solution."""
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), longest), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, prompt_length) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, prompt_length : len(tokens)] = ids[row, prompt_length : len(tokens)]
    return ids, mask, labels


def train(model: Any, examples: Sequence[tuple[list[int], int]], plan: WarmStart) -> float:
    """Train `model` in place on the solution tokens; returns the last loss in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.learning_rate, total_steps=plan.steps, pct_start=0.05
    )
    model.train()
    started, value = time.perf_counter(), float("nan")
    for step, chosen in zip(range(plan.steps), batches(examples, plan), strict=False):
        ids, mask, labels = collate([examples[i] for i in chosen], int(model.config.pad_token_id))
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != IGNORED
        # Logits only where there is a label: most positions belong to prompts or padding.
        logits = model.lm_head(hidden[wanted])
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        value = loss.item()
        if step % 100 == 0 or step == plan.steps - 1:
            print(f"step {step:5d}  loss {value:.4f}  {time.perf_counter() - started:6.1f} s", flush=True)
    return value


@torch.inference_mode()
def complete(model: Any, tokenizer: Qwen2Tokenizer, questions: Sequence[str], sample: bool) -> list[tuple[str, int]]:
    """(text, length in tokens with EOS) of one completion a question, greedy unless `sample`."""
    model.eval()
    completions = []
    for start in range(0, len(questions), 250):
        prompts = [prompt_text(tokenizer, question) for question in questions[start : start + 250]]
        inputs: Any = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        rows = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=sample,
            max_new_tokens=MAX_COMPLETION_TOKENS,
        )[:, inputs["input_ids"].shape[1] :]
        lengths = (rows != tokenizer.pad_token_id).sum(dim=1).tolist()
        completions += list(zip(tokenizer.batch_decode(rows, skip_special_tokens=True), lengths, strict=True))
    return completions


def measure(model: Any, tokenizer: Qwen2Tokenizer, plan: WarmStart) -> dict[str, Any]:
    """Held-out figures: share right and mean tokens, greedy and sampled at temperature 1, and by kind."""
    problems = sample_problems("test", plan.held_out, seed=plan.seed)
    questions = [problem.question for problem in problems]
    figures: dict[str, Any] = {"held_out_problems": len(problems)}
    for label, sample in (("greedy", False), ("sampled", True)):
        completions = complete(model, tokenizer, questions, sample)
        by_kind: dict[str, list[bool]] = {}
        for problem, (text, _) in zip(problems, completions, strict=True):
            by_kind.setdefault(problem.kind.name, []).append(text.endswith(f"#### {problem.result}"))
        figures[f"{label}_accuracy"] = sum(map(sum, by_kind.values())) / len(problems)
        figures[f"{label}_mean_tokens"] = sum(length for _, length in completions) / len(problems)
        figures[f"{label}_by_kind"] = {k: round(sum(v) / len(v), 3) for k, v in sorted(by_kind.items())}
    return figures


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[WarmStart, Path]:
    """The plan and the output folder from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=MODEL_DIR, help="folder to write (default: model/)")
    for name, default in asdict(WarmStart()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    values = vars(parser.parse_args(arguments))
    output = values.pop("output")
    return WarmStart(**values), output


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, train, save and measure; prints the figures as JSON."""
    plan, output = parse_arguments(arguments)
    torch.manual_seed(plan.seed)
    problems = sample_problems("train", plan.problems, seed=plan.seed)
    tokenizer = build_tokenizer(problems[:5000], plan)
    model = build_model(tokenizer, plan)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
    train(model, encode(tokenizer, problems, plan), plan)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(json.dumps({"plan": asdict(plan), **measure(model, tokenizer, plan)}, indent=1))


if __name__ == "__main__":
    main()
