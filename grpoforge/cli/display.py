"""What `train` prints on stdout: the plan and the summary."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from grpoforge.cli.tables import count_of as _count
from grpoforge.cli.tables import make_console as _console
from grpoforge.cli.tables import make_table as _table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpoforge.config import Config
    from grpoforge.parts import Parts
    from grpoforge.types import RunSummary


def print_plan(config: Config, parts: Parts, memory: Sequence[str]) -> None:
    """The resolved configuration as YAML, then the plan of a step as comments, so that the whole is a YAML file.

    Args:
        memory: lines about the memory of the device, the total first.
    """
    from grpoforge.sanitize import one_line
    from grpoforge.yaml_source import dump_yaml

    lines = [*plan_lines(config, parts), f"memory        {memory[0]}", *(f"  {line}" for line in memory[1:])]
    comments = [f"# {one_line(line, max_chars=1000)}\n" for line in lines]
    sys.stdout.write(dump_yaml(config.model_dump(mode="json")) + "\n" + "".join(comments))


def plan_lines(config: Config, parts: Parts) -> list[str]:
    """What a step does, in numbers."""
    from grpoforge.algorithm import make_objective
    from grpoforge.assembly import num_steps
    from grpoforge.dialects import describe_dialect

    batch = config.batch
    rows = batch.prompts_per_step * batch.completions_per_prompt
    micro = batch.micro_batch_size or config.minibatch_size
    num_train = None if parts.stream else len(parts.train_rows)
    steps, updates = num_steps(config, num_train), config.updates_per_step
    passes = _count(batch.epochs, "pass", "passes")
    longest = parts.sampler.options.get("max_completion_length", "the sampler's default")
    dialect = describe_dialect(config)
    reference = f"{config.kl.name} x{config.kl.beta:g}, frozen reference" if config.kl.beta else "none (beta is 0)"
    reference += " (in the reward)" if config.kl.beta and config.kl.placement == "reward" else ""
    return [
        f"steps         {steps}, {_count(updates, 'optimizer step')} each: {steps * updates}",
        f"rollouts      {batch.prompts_per_step} prompts x {batch.completions_per_prompt} completions = {rows} rows"
        f" of at most {longest} tokens",
        f"update        {passes}, minibatch {config.minibatch_size}, micro-batch {micro}",
        f"rewards       {', '.join(reward.describe() for reward in parts.rewards)}",
        f"advantage     {parts.advantage.component.id}; loss {parts.loss.component.id}; reduction {config.reduction}",
        f"KL            {reference}",
        *_extra_lines(config),
        *([f"dialect       {dialect}"] if dialect else []),
        f"objective     {make_objective(config, parts)[1]}",
        f"data          {_num_train(parts)} to train on, {len(parts.eval_rows)} to evaluate on",
        "files         run.json metrics.jsonl tensorboard/ rollouts/ checkpoints/",
    ]


def _num_train(parts: Parts) -> str:
    if parts.stream is None:
        return f"{len(parts.train_rows)} problems"
    return f"a stream of problems, shuffled in a buffer of {parts.stream.buffer},"


def _extra_lines(config: Config) -> list[str]:
    """What a step does beside the usual, where it does."""
    batch, entropy = config.batch, config.entropy
    names = ", ".join(part.name for part in config.corrections)
    lines = {
        f"corrections   {names}": bool(names),
        f"filters       up to {_count(batch.dynamic_sampling, 'extra draw')} for groups that score alike": (
            batch.dynamic_sampling > 0
        ),
        "filters       completions cut at the limit are left out of the loss": batch.mask_truncated_completions,
        f"filters       loss on the {batch.top_entropy_quantile:.0%} of tokens with the highest entropy": (
            batch.top_entropy_quantile < 1
        ),
        f"entropy       bonus x{entropy.coef:g}": entropy.coef > 0 and entropy.target is None,
        f"entropy       bonus steered to {entropy.target} nats per token": entropy.target is not None,
    }
    return [line for line, holds in lines.items() if holds]


def print_summary(summary: RunSummary) -> None:
    """Before and after on held-out problems, where the run lies, and what to try next."""
    console = _console()
    table = _table(f"Held-out problems, {_count(summary.step, 'step')}, {summary.seconds:.0f} s")
    for name in ("", "before", f"after (step {summary.step})"):
        table.add_column(name, justify="left" if not name else "right")
    for label, key, show in SUMMARY_ROWS:
        if key in summary.metrics_before and key in summary.metrics_after:
            table.add_row(label, show(summary.metrics_before[key]), show(summary.metrics_after[key]))
    console.print(table)
    console.print(f"run  {summary.run_dir}")
    console.print("next")
    for command in (
        f"grpoforge eval {summary.run_dir} --samples 4",
        f"tensorboard --logdir {summary.run_dir}",
        "grpoforge plugins list",
    ):
        console.print(f"  {command}")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _tokens(value: float) -> str:
    return f"{value:.1f} tokens"


SUMMARY_ROWS = (
    ("accuracy (pass@1, greedy)", "eval_pass@1", _percent),
    ("mean length", "eval_completions/mean_length", _tokens),
    ("reward", "eval_reward", "{:.3f}".format),
)
