"""Parts to a trainer: load the policy, tokenize the prompts, tie everything together. The last stop before step one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import get_scheduler

from grpoforge.algorithm import make_algorithm
from grpoforge.config import Config
from grpoforge.data import Example, PromptFormat, PromptSet, to_prompts
from grpoforge.distributed import Workers
from grpoforge.engine import Algorithm, Engine
from grpoforge.errors import ConfigError, GrpoforgeError, ModelError
from grpoforge.evaluation import Evaluation
from grpoforge.learner import Learner
from grpoforge.objective import coupling_of
from grpoforge.outcomes import default_k
from grpoforge.parts import ChosenReward, Parts, bind_reward
from grpoforge.plugins import PluginHost
from grpoforge.policy import Policy, Reader
from grpoforge.run_dir import RunDir
from grpoforge.seeds import mix
from grpoforge.shared_prefix import refused
from grpoforge.sources import Row
from grpoforge.streaming import StreamedPrompts
from grpoforge.tracking import RunInfo
from grpoforge.trainer import Schedule, Trainer, failed
from grpoforge.types import Loss, Sampler, StepReport

logger = logging.getLogger(__name__)


def num_steps(config: Config, num_train: int | None) -> int:
    """Steps of a run: ``max_steps`` or ``epochs`` passes over the training problems, whichever is less; at least one.

    Args:
        num_train: training problems; None where nobody counted them, and there are ``max_steps``.
    """
    if config.max_steps is not None and (config.epochs is None or num_train is None):
        return config.max_steps
    assert num_train is not None
    of_epochs = max(1, (config.epochs or 1) * num_train // config.batch.prompts_per_step)
    return min(of_epochs, config.max_steps or of_epochs)


def check_workers(config: Config, workers: Workers) -> None:
    """Refuse a batch that the ranks cannot share evenly.

    Raises:
        ConfigError: prompts or minibatch are no multiple of the number of ranks.
    """
    for key, value in (("prompts_per_step", config.batch.prompts_per_step), ("minibatch_size", config.minibatch_size)):
        if value % workers.size:
            raise ConfigError(
                f"`batch.{key}` is {value}, which {workers.size} processes cannot share evenly",
                f"use a multiple of {workers.size}",
            )


def check_coupling(loss: Loss, name: str, workers: Workers) -> None:
    """Refuse a loss that looks at the whole minibatch where no process holds all of it.

    Raises:
        ConfigError: the loss declares coupling ``batch`` and there are several processes.
    """
    if coupling_of(loss) == "batch" and workers.size > 1:
        raise ConfigError(
            f"loss `{name}` looks at every completion of an optimizer step, and each of {workers.size} processes holds "
            "a part",
            "use one process, or another loss",
        )


def load_policy(config: Config, host: PluginHost) -> Policy:
    """The policy that ``config.model`` names, from the first plugin that knows it.

    Raises:
        ModelError: nobody knows it, or it cannot be loaded.
    """
    policy = host.hook.load_policy(model=config.model)
    if policy is None:
        raise ModelError(f"no plugin can load the model `{config.model.name}`", "give a model folder or a hub id")
    loaded: Policy = policy
    return loaded


def check_trainable(policy: Policy, name: str) -> None:
    """Refuse to train a policy that can only be evaluated, such as an adapter that was saved beside no model.

    Raises:
        ModelError: no parameter takes gradients.
    """
    if not policy.trainable():
        raise ModelError(
            f"the model {name} has no trainable parameters",
            "if it is an adapter: name its base model and set `model.lora`, merge it into its base model, or go on "
            "with its run by `--resume`",
        )


def prompt_format(
    config: Config, policy: Policy | Reader, sampler: Sampler, examples: Sequence[Example] = ()
) -> PromptFormat:
    """How rows become prompts, and the longest prompt that leaves room for a completion.

    A sampler that says how long its completions may be does so by an attribute ``max_completion_length``.

    Raises:
        ConfigError: the completion alone fills the model's context.
    """
    data, context = config.data, policy.context_length
    max_completion_length: int | None = getattr(sampler, "max_completion_length", None)
    limit, origin = data.max_prompt_length, "`data.max_prompt_length` allows"
    if context is not None and max_completion_length is not None:
        room = context - max_completion_length
        if room < 1:
            raise ConfigError(
                f"`sampler.max_completion_length` is {max_completion_length}, and the context of {config.model.name} "
                f"has {context} tokens",
                f"use less than {context}",
            )
        if limit is None or room < limit:
            limit = room
            origin = f"a context of {context} leaves beside completions of {max_completion_length}"
    return PromptFormat(
        column=data.prompt,
        system_prompt=data.system_prompt,
        template=data.template,
        max_length=limit,
        limit_origin=origin,
        on_long=data.long_prompts,
        instruction=data.instruction,
        few_shot=data.few_shot,
        examples=tuple(examples),
    )


def make_evaluation(
    config: Config,
    policy: Policy,
    sampler: Sampler,
    measured: tuple[Sequence[ChosenReward], str],
    rows: Sequence[Row],
    workers: Workers,
    examples: Sequence[Example] = (),
) -> Evaluation:
    """What evaluation measures, on the problems of ``rows``.

    Args:
        measured: the rewards to score, and the name of the one that says what is right.
        examples: worked examples, of which every prompt shows ``data.few_shot``.

    Raises:
        DataError: no prompt fits the model's context.
    """
    rewards, correctness = measured
    prompts = to_prompts(rows, policy.tokenizer, prompt_format(config, policy, sampler, examples))
    return Evaluation(
        prompts=prompts,
        question=config.data.prompt,
        sampler=sampler,
        rewards=[bind_reward(reward, list(prompts[0].columns)) for reward in rewards],
        correctness=correctness,
        samples=config.eval.samples,
        ks=config.eval.k or default_k(config.eval.samples),
        batch_size=config.eval.batch_size,
        seed=mix(config.seed, 2),
        workers=workers,
        on_reward_error=config.scoring.on_error,
        reward_time_limit=config.scoring.time_limit,
    )


def share_prefix(config: Config, policy: Policy) -> None:
    """Let the policy compute what rows share once, or note why it does not.

    Raises:
        ModelError: ``batch.shared_prefix`` is ``on`` and the model cannot.
    """
    obstacle = policy.share_prefix(config.batch.shared_prefix)
    if obstacle and config.batch.shared_prefix == "on":
        raise refused(obstacle)
    if obstacle:
        policy.notes += (f"every prompt is computed once per completion: {obstacle}",)


def make_engine(config: Config, algorithm: Algorithm, policy: Policy, workers: Workers, total_updates: int) -> Engine:
    """Optimizer, schedule and reference around the policy.

    Raises:
        ModelError: see `share_prefix`.
    """
    share_prefix(config, policy)
    optimizer = torch.optim.AdamW(
        policy.trainable(),
        lr=config.optim.learning_rate,
        betas=config.optim.betas,
        weight_decay=config.optim.weight_decay,
        fused=True,  # one pass over the weights and moments instead of ten
    )
    schedule = get_scheduler(
        config.optim.schedule if config.optim.schedule != "constant" else "constant_with_warmup",
        optimizer,
        num_warmup_steps=config.optim.warmup_steps,
        num_training_steps=total_updates,
    )
    return Engine(
        policy=policy,
        reference=policy.freeze() if config.kl.beta > 0 else None,
        optimizer=optimizer,
        schedule=schedule,
        algorithm=algorithm,
        workers=workers,
    )


def assemble(
    config: Config,
    host: PluginHost,
    parts: Parts,
    policy: Policy,
    run_dir: RunDir,
    workers: Workers,
    *,
    first_step: int = 0,
) -> Trainer:
    """A trainer ready to run (or to restore a checkpoint of step ``first_step`` into).

    Raises:
        GrpoforgeError: the model, its tokenizer or its context do not fit the run.
    """
    check_trainable(policy, config.model.name)
    sampler = parts.sampler.build()
    fmt = prompt_format(config, policy, sampler, parts.examples)
    train, columns = training_prompts(parts, policy.tokenizer, fmt, config.seed)
    measured = (parts.measured, parts.correctness)
    evaluation = make_evaluation(config, policy, sampler, measured, parts.eval_rows, workers, parts.examples)
    algorithm = make_algorithm(config, parts, sampler, columns)
    check_coupling(algorithm.objective.loss, config.loss.name, workers)
    num_train = len(train) if isinstance(train, PromptSet) else None
    max_steps = num_steps(config, num_train)
    engine = make_engine(config, algorithm, policy, workers, max_steps * config.updates_per_step)
    info = run_info(config, parts, policy, run_dir, (num_train, len(evaluation.prompts)), (first_step, max_steps))
    trackers = [chosen.build(info) for _, chosen in parts.trackers] if workers.is_main else []
    learning = learners(algorithm)
    prepare(learning)
    return Trainer(
        engine=engine,
        train=train,
        evaluation=evaluation,
        schedule=Schedule(
            max_steps=max_steps,
            prompts_per_step=config.batch.prompts_per_step,
            eval_every=config.eval.every,
            checkpoint_every=config.checkpoint.every,
            keep_last=config.checkpoint.keep_last,
            best_metric=config.eval.metric,
            best_direction=config.eval.direction,
            seed=config.seed,
        ),
        trackers=trackers,
        components={"prompts": train, **named_components(algorithm, evaluation, trackers)},
        run_dir=run_dir,
        learners=learning,
        step_finished=step_hook(host) if workers.is_main else lambda report: None,
    )


def training_prompts(
    parts: Parts, tokenizer: Any, fmt: PromptFormat, seed: int
) -> tuple[PromptSet | StreamedPrompts, Sequence[str]]:
    """Where the prompts of steps come from, and the columns of each.

    Raises:
        DataError: no prompt fits the model's context. A stream finds that out when it is read.
    """
    if parts.stream is not None:
        return StreamedPrompts(parts.stream, tokenizer, fmt), parts.stream.columns
    train = PromptSet(to_prompts(parts.train_rows, tokenizer, fmt), seed)
    return train, list(train.prompts[0].columns)


def named_components(algorithm: Algorithm, evaluation: Evaluation, trackers: Sequence[Any]) -> dict[str, Any]:
    """Every component by the name its state has in checkpoints.

    Evaluation has rewards of its own: measuring must not change what a stateful reward remembers of training.
    """
    objective = algorithm.objective
    kl = objective.kl or algorithm.kl_penalty
    named = {
        "sampler": algorithm.drawing.sampler,
        "advantage": algorithm.advantage.function,
        "loss": objective.loss,
        "kl": kl.function if kl else None,
        "coefficient beta": algorithm.beta,
        "coefficient entropy": algorithm.entropy,
    }
    named |= {f"correction {number}": one.function for number, one in enumerate(objective.corrections)}
    named |= {f"reward {reward.name}": reward.function for reward in algorithm.drawing.rewards}
    named |= {f"evaluation reward {reward.name}": reward.function for reward in evaluation.rewards}
    return named | {f"tracker {type(tracker).__name__}": tracker for tracker in trackers}


def learners(algorithm: Algorithm) -> list[tuple[str, Learner]]:
    """The components that learn from finished steps, each with its name. Those of evaluation only measure."""
    named: list[tuple[str, Any]] = [(reward.name, reward.function) for reward in algorithm.drawing.rewards]
    named += [("sampler", algorithm.drawing.sampler), ("advantage", algorithm.advantage.function)]
    named.append(("loss", algorithm.objective.loss))
    return [(name, part) for name, part in named if isinstance(part, Learner)]


def prepare(learning: Sequence[tuple[str, Learner]]) -> None:
    """Let components that learn load what they will need, before the first step.

    Raises:
        RunFailed: one raised.
    """
    for name, part in learning:
        try:
            part.prepare()
        except GrpoforgeError:
            raise
        except Exception as error:  # the boundary: a component is foreign code
            raise failed(f"`prepare` of `{name}`", error) from error


def step_hook(host: PluginHost) -> Callable[[StepReport], None]:
    """Calls ``step_finished`` of every plugin, one at a time, so that a failure has a name.

    Raises:
        RunFailed: a plugin's hook raised.
    """
    plugins = host.manager.list_name_plugin()
    callers = [
        (name, host.manager.subset_hook_caller("step_finished", [other for _, other in plugins if other is not plugin]))
        for name, plugin in plugins
    ]

    def step_finished(report: StepReport) -> None:
        for name, caller in callers:
            try:
                caller(report=report)
            except GrpoforgeError:
                raise
            except Exception as error:  # the boundary: a plugin is foreign code
                raise failed(f"plugin `{name}`, hook `step_finished`,", error) from error

    return step_finished


def run_info(
    config: Config, parts: Parts, policy: Policy, run_dir: RunDir, sizes: tuple[int | None, int], steps: tuple[int, int]
) -> RunInfo:
    """What trackers are told about the run."""
    return RunInfo(
        run_dir=run_dir.path,
        model=config.model.name,
        num_parameters=policy.num_parameters,
        dataset=config.data.dataset,
        num_train=sizes[0],
        num_eval=sizes[1],
        rewards=tuple(reward.describe() for reward in parts.rewards),
        device=str(policy.device),
        dtype=str(policy.precision.autocast or policy.precision.weights).removeprefix("torch."),
        prompts_per_step=config.batch.prompts_per_step,
        completions_per_prompt=config.batch.completions_per_prompt,
        first_step=steps[0],
        max_steps=steps[1],
        notes=policy.notes,
    )
