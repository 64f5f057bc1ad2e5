"""The first-party plugin: everything that comes with grpoforge, registered the way anyone's plugin is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpoforge import hookimpl
from grpoforge_plugins import tiny_math
from grpoforge_plugins.advantages.group import group, group_mean
from grpoforge_plugins.datasets.tiny_math import tiny_math as tiny_math_problems
from grpoforge_plugins.kl.schulman import k1, k2, k3
from grpoforge_plugins.losses.clip import Clip
from grpoforge_plugins.policies import huggingface
from grpoforge_plugins.rewards.brevity import brevity
from grpoforge_plugins.rewards.format import format_reward
from grpoforge_plugins.rewards.math import math
from grpoforge_plugins.samplers.hf import HFSampler
from grpoforge_plugins.trackers.console import Console
from grpoforge_plugins.trackers.jsonl import Jsonl
from grpoforge_plugins.trackers.rollouts import RolloutsFile
from grpoforge_plugins.trackers.tensorboard import TensorBoard

if TYPE_CHECKING:
    from grpoforge.config import ModelConfig
    from grpoforge.policy import Policy


@hookimpl
def register_rewards(register: Any) -> None:
    register("math", math, weight=1.0)
    register("brevity", brevity, weight=0.1, gate="math")
    register("format", format_reward, weight=0.2)


@hookimpl
def register_samplers(register: Any) -> None:
    register("hf", HFSampler)


@hookimpl
def register_advantages(register: Any) -> None:
    register("group", group)
    register("group_mean", group_mean)


@hookimpl
def register_kl_estimators(register: Any) -> None:
    register("k1", k1)
    register("k2", k2)
    register("k3", k3)


@hookimpl
def register_losses(register: Any) -> None:
    register("clip", Clip)


@hookimpl
def register_trackers(register: Any) -> None:
    register("console", Console)
    register("jsonl", Jsonl)
    register("tensorboard", TensorBoard)
    register("rollouts", RolloutsFile)


@hookimpl
def register_datasets(register: Any) -> None:
    register("tiny-math", tiny_math_problems)


@hookimpl(trylast=True)
def load_policy(model: ModelConfig) -> Policy:
    """Any Hugging Face folder or hub id, and the embedded ``tiny-math``; asked last, after every other plugin."""
    if model.name == "tiny-math":
        model = model.model_copy(update={"name": str(tiny_math.MODEL_DIR)})
    return huggingface.load(model)
