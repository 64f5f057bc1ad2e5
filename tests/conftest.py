"""A policy, a tokenizer, rollouts and an engine, small enough to check by hand. Fixtures hand out the builders."""

from __future__ import annotations

import os

# Before anything imports the client of the hub: no test waits for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from grpoforge.binding import bind
from grpoforge.coefficients import Constant
from grpoforge.distributed import Workers
from grpoforge.drawing import Drawing
from grpoforge.engine import Algorithm, Engine
from grpoforge.objective import Frozen, Objective
from grpoforge.policy import Policy
from grpoforge.precision import Precision
from grpoforge.types import Completion, PolicyView, Prompt, Rollouts
from grpoforge_plugins.advantages.group import group
from grpoforge_plugins.kl.schulman import k3
from grpoforge_plugins.losses.clip import Clip

# Two OpenMP programs on the cores of one test machine slow each other down tenfold.
torch.set_num_threads(1)
settings.register_profile("grpoforge", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("grpoforge")

PAD, EOS = 0, 1
VOCABULARY = 24


class LetterTokenizer:
    """Token 0 pads, token 1 ends a completion, token 2 is ``a``, token 3 is ``b``, ..."""

    pad_token_id = PAD
    eos_token_id = EOS

    def batch_decode(self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
        return ["".join(chr(ord("a") + token - 2) for token in row if token > 1) for row in rows]

    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Any:
    """A Qwen2 of two layers. Its weights are a formula, so they are the same under every version of torch.

    A chirp fills the matrices, because ``sin`` of anything linear in the index would have rank 2.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = torch.sin(0.61 * index.square() + 1.3 * index + number + 7.7 * seed)
            centre = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            width = 0.1 if parameter.ndim == 1 else scale * 1.4 / parameter.shape[-1] ** 0.5
            parameter.copy_((centre + width * wave).reshape(parameter.shape))
    if dtype == torch.float64:
        _widen_norms(model)
    return model.eval()


def _widen_norms(model: Any) -> None:
    """Norms that stay in float64: those of transformers compute in float32, where 1e-12 has no meaning."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name.endswith("norm"):
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)


def tiny_policy(seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Policy:
    """`tiny_model` as a policy."""
    return Policy(tiny_model(seed, dtype, scale), LetterTokenizer(), Precision(dtype))


def make_prompts(token_ids: Sequence[Sequence[int]]) -> tuple[Prompt, ...]:
    """Prompts of these tokens."""
    texts = LetterTokenizer().batch_decode(token_ids)
    return tuple(
        Prompt(text=text, token_ids=tuple(ids), columns={"row": index}, index=index)
        for index, (text, ids) in enumerate(zip(texts, token_ids, strict=True))
    )


def make_rollouts(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    temperatures: Sequence[Sequence[float]] | None = None,
    *,
    max_completion_length: int = 8,
) -> Rollouts:
    """Rollouts of these tokens: ``L`` per prompt, and ``[P][G]`` lists of completion tokens."""
    heat = temperatures or [[1.0] * len(group) for group in completions]
    return Rollouts(
        prompts=make_prompts(prompts),
        completions=tuple(
            tuple(_completion(ids, degree) for ids, degree in zip(group, degrees, strict=True))
            for group, degrees in zip(completions, heat, strict=True)
        ),
        max_completion_length=max_completion_length,
    )


def _completion(ids: Sequence[int], temperature: float) -> Completion:
    return Completion(
        text=LetterTokenizer().batch_decode([ids])[0],
        token_ids=tuple(ids),
        logprobs=(-1.0,) * len(ids),
        temperature=temperature,
        finish_reason="stop" if ids and ids[-1] == EOS else "length",
        policy_version=0,
    )


class GivenRollouts:
    """A sampler that answers with what it was given."""

    def __init__(self, rollouts: Rollouts | None = None) -> None:
        self.rollouts = rollouts
        self.num_syncs = 0

    def sample(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int) -> Rollouts:
        assert self.rollouts is not None
        return self.rollouts

    def greedy(self, policy: PolicyView, prompts: Sequence[Prompt]) -> Rollouts:
        assert self.rollouts is not None
        return self.rollouts

    def sync(self, policy: PolicyView) -> None:
        self.num_syncs += 1


SAME = (
    *("reduction", "minibatch_size", "micro_batch_size", "epochs", "max_grad_norm"),
    *("mask_truncated", "top_entropy_quantile"),
)
"""Fields of the algorithm that tests give by the same name."""


def as_coefficient(value: Any) -> Any:
    """A number as a constant coefficient; a coefficient as it is."""
    return Constant(value) if isinstance(value, float | int) else value


def make_frozen(old: torch.Tensor, reference: torch.Tensor, advantages: torch.Tensor) -> Frozen:
    """Frozen log-probs ``[B, T]`` with advantages ``[P, G]``, every token weighing 1."""
    return Frozen(
        old=old, reference=reference, advantages=advantages.reshape(-1).double(), weights=torch.ones_like(old)
    )


def make_engine(policy: Policy, *, learning_rate: float = 0.01, **choices: Any) -> Engine:
    """An engine around ``policy``; ``choices`` override the parts of the algorithm and of the engine."""
    engine = {name: choices.pop(name) for name in ("reference", "workers", "optimizer") if name in choices}
    optimizer = engine.pop("optimizer", None) or torch.optim.SGD(policy.trainable(), lr=learning_rate)
    parts: dict[str, Any] = {
        "sampler": GivenRollouts(),
        "rewards": (),
        "advantage": group,
        "loss": Clip(epsilon_high=0.28),
        "kl": k3,
        "beta": 0.0,
        "reduction": "token",
        "group_size": 2,
        "minibatch_size": 64,
        "micro_batch_size": 64,
        "epochs": 1,
        "max_grad_norm": 1e9,
        "mask_truncated": False,
        "top_entropy_quantile": 1.0,
        "max_extra_draws": 0,
        "corrections": (),
        "entropy": 0.0,
        "kl_in_reward": False,
    }
    assert set(choices) <= set(parts), sorted(set(choices) - set(parts))
    chosen = parts | choices
    kl = bind("kl", chosen["kl"]) if engine.get("reference") is not None else None
    return Engine(
        policy=policy,
        reference=engine.get("reference"),
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        algorithm=Algorithm(
            drawing=Drawing(
                sampler=chosen["sampler"],
                rewards=chosen["rewards"],
                group_size=chosen["group_size"],
                max_extra_draws=chosen["max_extra_draws"],
                on_reward_error="stop",
                reward_time_limit=60.0,
            ),
            advantage=bind("advantage", chosen["advantage"]),
            objective=Objective(
                loss=chosen["loss"],
                kl=None if chosen["kl_in_reward"] else kl,
                corrections=[bind("correction", one) for one in chosen["corrections"]],
            ),
            kl_penalty=kl if chosen["kl_in_reward"] else None,
            beta=as_coefficient(chosen["beta"]),
            entropy=as_coefficient(chosen["entropy"]),
            **{name: chosen[name] for name in SAME},
        ),
        workers=engine.get("workers", Workers()),
    )


def flat_gradient(policy: Policy) -> torch.Tensor:
    """The gradient that `Engine.accumulate` left in the parameters, as one vector; the parameters forget it."""
    parts = [
        torch.zeros(parameter.numel(), dtype=parameter.dtype) if parameter.grad is None else parameter.grad.flatten()
        for parameter in policy.trainable()
    ]
    for parameter in policy.trainable():
        parameter.grad = None
    return torch.cat(parts)


@pytest.fixture(scope="session", name="tiny_policy")
def _tiny_policy() -> Callable[..., Policy]:
    return tiny_policy


@pytest.fixture(scope="session", name="tiny_model")
def _tiny_model() -> Callable[..., Any]:
    return tiny_model


@pytest.fixture(scope="session", name="make_prompts")
def _make_prompts() -> Callable[..., tuple[Prompt, ...]]:
    return make_prompts


@pytest.fixture(scope="session", name="make_rollouts")
def _make_rollouts() -> Callable[..., Rollouts]:
    return make_rollouts


@pytest.fixture(scope="session", name="make_frozen")
def _make_frozen() -> Callable[..., Frozen]:
    return make_frozen


@pytest.fixture(scope="session", name="make_engine")
def _make_engine() -> Callable[..., Engine]:
    return make_engine


@pytest.fixture(scope="session", name="flat_gradient")
def _flat_gradient() -> Callable[[Policy], torch.Tensor]:
    return flat_gradient


@pytest.fixture(scope="session")
def given_rollouts() -> type[GivenRollouts]:
    return GivenRollouts


def save_classifier(folder: Path, *, num_labels: int = 1, pad: bool = True, chat_template: str | None = None) -> Path:
    """A folder with a BERT classifier of random weights over printable ASCII, that reads 96 tokens at most."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters)]
    model = Tokenizer(WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = BertPreTokenizer()
    model.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=96,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], chat_template=chat_template,
        **({"pad_token": "[PAD]"} if pad else {}),
    )  # fmt: skip
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=96, num_labels=num_labels, initializer_range=0.2, hidden_dropout_prob=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", name="save_classifier")
def _save_classifier() -> Callable[..., Path]:
    return save_classifier


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sequence classifier of one label."""
    return save_classifier(tmp_path_factory.mktemp("classifier"))
