"""Policies from Hugging Face folders and hub ids."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grpoforge.distributed import local_device
from grpoforge.errors import ModelError, first_line
from grpoforge.policy import Policy, Reader
from grpoforge.precision import Precision

if TYPE_CHECKING:
    from grpoforge.config import ModelConfig

logger = logging.getLogger(__name__)


def load(model: ModelConfig) -> Policy:
    """The policy that ``model.name`` names: a local folder, or a hub id.

    Raises:
        ModelError: the folder is missing, holds no model or no tokenizer, or the hub cannot be reached.
    """
    folder = _folder(model)
    _quiet()
    device = local_device()
    precision = choose_precision(model, device)
    tokenizer, notes = load_tokenizer(str(folder) if folder.is_dir() else model.name, model.revision)
    network = _load_model(model, precision).to(device)
    notes += _repair_generation_config(network)
    _check_vocabulary(network, tokenizer, model.name)
    if model.lora is not None:
        network = add_adapter(network, model)
    if model.gradient_checkpointing:
        _checkpoint_gradients(network)
    return Policy(network, tokenizer, precision, notes=notes)


def load_reader(model: ModelConfig) -> Reader:
    """The tokenizer of the model that ``model.name`` names, and its context length; no weights are read.

    Raises:
        ModelError: see `load`.
    """
    from transformers import AutoConfig

    folder = _folder(model)
    _quiet()
    source = str(folder) if folder.is_dir() else model.name
    tokenizer, notes = load_tokenizer(source, model.revision)
    try:
        config = AutoConfig.from_pretrained(source, revision=model.revision, trust_remote_code=False)
    except Exception as failure:  # the boundary: what a damaged file raises, nobody documents
        raise ModelError(f"cannot load the model {model.name}: {first_line(failure)}", _remedy(source)) from None
    return Reader(tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None), tuple(notes))


def _folder(model: ModelConfig) -> Path:
    """The path of the model folder that ``model.name`` means; of a hub id one that is not there."""
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
    elif model.name.startswith((".", "/", "~")) or model.name.count("/") != 1:
        raise ModelError(
            f"there is no model folder {model.name}", "give a folder with config.json and *.safetensors, or a hub id"
        )
    return folder


def choose_precision(model: ModelConfig, device: torch.device) -> Precision:
    """``auto`` is bf16 on GPUs that have it. Trained weights stay in fp32 (bf16 would swallow small updates)."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = model.precision == "bf16" or (model.precision == "auto" and has_bf16)
    if not bf16:
        return Precision(torch.float32)
    weights = torch.bfloat16 if model.lora is not None else torch.float32
    return Precision(weights, autocast=torch.bfloat16)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ModelError(f"the model folder {folder} has no config.json", "give a folder saved by `save_pretrained`")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"the model folder {folder} has no *.safetensors weights",
            "convert it: pickled weights (.bin, .pt) can run code and are never loaded",
        )


def load_tokenizer(source: str, revision: str | None) -> tuple[Any, list[str]]:
    """The tokenizer, ready for batches, and notes on what it lacked.

    Raises:
        ModelError: there is none, or it has no EOS token, so that completions could never end.
    """
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(
            f"the model folder {source} has no tokenizer", "add its tokenizer.json and tokenizer_config.json"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as failure:  # the boundary: what a damaged file raises, nobody documents
        raise ModelError(f"cannot load the tokenizer of {source}: {first_line(failure)}", _remedy(source)) from None
    notes = []
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {source} has no EOS token", "set `eos_token` in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append("the tokenizer has no pad token: EOS is used (masks come from lengths)")
    if not getattr(tokenizer, "chat_template", None):
        notes.append("the tokenizer has no chat template: a plain prompt template is used")
    return tokenizer, notes


def _load_model(model: ModelConfig, precision: Precision) -> Any:
    from transformers import AutoModelForCausalLM

    source = os.path.expanduser(model.name)
    if os.path.isdir(source):
        # An adapter remembers its base model by this name, and is read from other folders than the present one.
        source = os.path.abspath(source)
    try:
        network, loading = AutoModelForCausalLM.from_pretrained(
            source,
            revision=model.revision,
            dtype=precision.weights,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as failure:  # the boundary: what a damaged file raises, nobody documents
        raise ModelError(f"cannot load the model {model.name}: {first_line(failure)}", _remedy(source)) from None
    _check_loaded(loading, model.name)
    return network


def _check_loaded(loading: Mapping[str, Any], name: str) -> None:
    """Refuse weights that transformers would have replaced by random numbers."""
    missing, mismatched = sorted(loading["missing_keys"]), sorted(loading["mismatched_keys"])
    if mismatched:
        key, found, wanted = mismatched[0]
        raise ModelError(
            f"the weights of {name} do not fit its config.json: `{key}` is {list(found)} and should be {list(wanted)}",
            "use the config.json that the weights were saved with",
        )
    if missing:
        raise ModelError(
            f"the weights of {name} lack {len(missing)} of the model's tensors, `{missing[0]}` first",
            "use weights of this architecture with a language model head, complete",
        )


def _repair_generation_config(network: Any) -> list[str]:
    """Keep only the token ids of a generation configuration that transformers would refuse to save; notes on it."""
    from transformers import GenerationConfig

    found = network.generation_config
    try:
        found.validate(strict=True)
    except ValueError:
        ids = {name: getattr(found, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        network.generation_config = GenerationConfig(**ids)
        return ["the model's generation configuration contradicts itself: only its token ids are kept"]
    return []


def _remedy(source: str) -> str:
    if os.path.isdir(source):
        return "save or download the folder again: it needs config.json, *.safetensors and a tokenizer"
    return "check the name and the network, or give a local folder with config.json and *.safetensors"


def _check_vocabulary(network: Any, tokenizer: Any, name: str) -> None:
    rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens but the model has embeddings for {rows}",
            "use the tokenizer that the model was trained with",
        )


def add_adapter(network: Any, model: ModelConfig) -> Any:
    """``network`` under the LoRA adapter that ``model.lora`` describes.

    Raises:
        ModelError: it is an adapter already, or has none of the modules that are to get one.
    """
    from peft import LoraConfig, get_peft_model

    assert model.lora is not None
    if getattr(network, "peft_config", None):
        raise ModelError(
            f"the model {model.name} is an adapter already: `model.lora` would put a second one on it",
            "name its base model, or merge the adapter into it",
        )
    adapter = LoraConfig(
        r=model.lora.r,
        lora_alpha=model.lora.alpha,
        target_modules=model.lora.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers for a name that it is about to rename.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return get_peft_model(network, adapter)
        except ValueError as failure:
            raise ModelError(
                f"no adapter fits `model.lora.target_modules` {model.lora.target_modules!r}: {first_line(failure)}",
                "use `all-linear`, or names of the model's linear layers such as `q_proj`",
            ) from None


def _checkpoint_gradients(network: Any) -> None:
    with warnings.catch_warnings():
        # The name is about to change, and the range of versions that we support has only the old one in common.
        warnings.simplefilter("ignore", FutureWarning)
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network.enable_input_require_grads()
    network.train()


def _quiet() -> None:
    """No progress bars and no reports: they would tear the live display, and what matters in them is checked here."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # Five lines for each retry without a network; the error that follows says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
