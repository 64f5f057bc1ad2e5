"""The first-party plugin: everything that comes with grpoforge, registered the way anyone's plugin is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpoforge import hookimpl
from grpoforge_plugins import tiny_math
from grpoforge_plugins.advantages.batch import batch_std, gdpo, prpo, reinforce_pp, reinforce_pp_baseline
from grpoforge_plugins.advantages.group import gpg, group, group_mean, leave_one_out, maxrl, opo, robust
from grpoforge_plugins.advantages.paired import Paired
from grpoforge_plugins.advantages.pass_at_k import PassAtK
from grpoforge_plugins.corrections.mask import GeometricMask, IcePop, SequenceMask, opsm
from grpoforge_plugins.corrections.target import TargetSequenceMask, TargetTIS
from grpoforge_plugins.corrections.truncate import TwoSidedTIS, tis, tis_sequence
from grpoforge_plugins.datasets.gsm8k import gsm8k
from grpoforge_plugins.datasets.tiny_math import tiny_math as tiny_math_problems
from grpoforge_plugins.kl.corrected import k1_corrected, k3_corrected
from grpoforge_plugins.kl.full import full, full_forward
from grpoforge_plugins.kl.plus import k1_plus, k3_plus
from grpoforge_plugins.kl.schulman import absolute, k1, k2, k3
from grpoforge_plugins.losses.cispo import CISPO
from grpoforge_plugins.losses.clip import Clip
from grpoforge_plugins.losses.covariance import ClipCov, KLCov
from grpoforge_plugins.losses.dppo import DPPOKL, DPPOTV
from grpoforge_plugins.losses.gmpo import GMPO
from grpoforge_plugins.losses.gspo import GSPO, LUSPO, GSPOToken
from grpoforge_plugins.losses.reinforce import DRO, TOPR, reinforce
from grpoforge_plugins.losses.sapo import SAPO
from grpoforge_plugins.losses.vespo import VESPO
from grpoforge_plugins.policies import huggingface, size
from grpoforge_plugins.preference.reward import Preference
from grpoforge_plugins.rewards.brevity import brevity
from grpoforge_plugins.rewards.format import format_reward
from grpoforge_plugins.rewards.language import language
from grpoforge_plugins.rewards.length import CosineLength
from grpoforge_plugins.rewards.math import Math
from grpoforge_plugins.rewards.overlong import soft_overlong
from grpoforge_plugins.rewards.reasoning import reasoning
from grpoforge_plugins.rewards.repetition import repetition
from grpoforge_plugins.rewards.reward_model import RewardModel
from grpoforge_plugins.samplers.hf import HFSampler
from grpoforge_plugins.samplers.native import NativeSampler
from grpoforge_plugins.samplers.paired import PairedSampler
from grpoforge_plugins.samplers.vllm import VLLMColocateSampler, VLLMSampler
from grpoforge_plugins.trackers.console import Console
from grpoforge_plugins.trackers.jsonl import Jsonl
from grpoforge_plugins.trackers.rollouts import RolloutsFile
from grpoforge_plugins.trackers.tensorboard import TensorBoard

if TYPE_CHECKING:
    from grpoforge.config import ModelConfig
    from grpoforge.policy import Policy, PolicySize, Reader


@hookimpl
def register_rewards(register: Any) -> None:
    register("math", Math, weight=1.0)
    register("reasoning", reasoning, weight=0.5)
    register("brevity", brevity, weight=0.1, gate="math")
    register("format", format_reward, weight=0.2)
    register("length", CosineLength, weight=1.0)
    register("repetition", repetition, weight=0.1)
    register("language", language, weight=0.1)
    register("reward_model", RewardModel, weight=1.0)
    register("soft_overlong", soft_overlong, weight=1.0)
    register("preference", Preference, weight=0.3)


@hookimpl
def register_samplers(register: Any) -> None:
    register("native", NativeSampler)
    register("hf", HFSampler)
    register("paired", PairedSampler)
    register("vllm", VLLMSampler)
    register("vllm_colocate", VLLMColocateSampler)


@hookimpl
def register_advantages(register: Any) -> None:
    register("group", group)
    register("group_mean", group_mean)
    register("batch_std", batch_std)
    register("leave_one_out", leave_one_out)
    register("reinforce_pp", reinforce_pp)
    register("reinforce_pp_baseline", reinforce_pp_baseline)
    register("gdpo", gdpo)
    register("pass_at_k", PassAtK)
    register("opo", opo)
    register("maxrl", maxrl)
    register("gpg", gpg)
    register("prpo", prpo)
    register("robust", robust)
    register("paired", Paired)


@hookimpl
def register_kl_estimators(register: Any) -> None:
    register("k1", k1)
    register("k2", k2)
    register("k3", k3)
    register("abs", absolute)
    register("k1_corrected", k1_corrected)
    register("k3_corrected", k3_corrected)
    register("k1_plus", k1_plus)
    register("k3_plus", k3_plus)
    register("full", full)
    register("full_forward", full_forward)


@hookimpl
def register_corrections(register: Any) -> None:
    register("tis", tis)
    register("tis_sequence", tis_sequence)
    register("tis_two_sided", TwoSidedTIS)
    register("icepop", IcePop)
    register("sequence_mask", SequenceMask)
    register("geometric_mask", GeometricMask)
    register("opsm", opsm)
    register("target_tis", TargetTIS)
    register("target_sequence_mask", TargetSequenceMask)


@hookimpl
def register_losses(register: Any) -> None:
    register("clip", Clip)
    register("gspo", GSPO)
    register("gspo_token", GSPOToken)
    register("luspo", LUSPO)
    register("cispo", CISPO)
    register("sapo", SAPO)
    register("gmpo", GMPO)
    register("vespo", VESPO)
    register("dppo_tv", DPPOTV)
    register("dppo_kl", DPPOKL)
    register("reinforce", reinforce)
    register("dro", DRO)
    register("topr", TOPR)
    register("clip_cov", ClipCov)
    register("kl_cov", KLCov)


@hookimpl
def register_trackers(register: Any) -> None:
    register("console", Console)
    register("jsonl", Jsonl)
    register("tensorboard", TensorBoard)
    register("rollouts", RolloutsFile)


@hookimpl
def register_datasets(register: Any) -> None:
    register("tiny-math", tiny_math_problems)
    register("gsm8k", gsm8k)


@hookimpl(trylast=True)
def load_policy(model: ModelConfig) -> Policy:
    """Any Hugging Face folder or hub id, and the embedded ``tiny-math``; asked last, after every other plugin."""
    return huggingface.load(_embedded(model))


@hookimpl(trylast=True)
def load_reader(model: ModelConfig) -> Reader:
    """The tokenizer and the context of what `load_policy` loads."""
    return huggingface.load_reader(_embedded(model))


@hookimpl(trylast=True)
def policy_size(model: ModelConfig) -> PolicySize | None:
    return size.policy_size(_embedded(model))


def _embedded(model: ModelConfig) -> ModelConfig:
    """``model`` with its folder for a name where it comes with this package."""
    return model.model_copy(update={"name": str(tiny_math.MODEL_DIR)}) if model.name == "tiny-math" else model
