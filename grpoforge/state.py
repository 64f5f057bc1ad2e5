"""Trainer state without pickle: tensors in safetensors, everything else in JSON; loading runs no code.

For ``optimizer.state_dict()``, ``scheduler.state_dict()``, the states of plugins and the random generators. A
state comes back with the types it had. JSON has fewer types than Python, so the others are tagged:

    {"$tensor": "3"}         tensor "3" of the safetensors file
    {"$tuple": [...]}
    {"$items": [[k, v]]}     a dict whose keys are not plain strings
    {"$ordered": [[k, v]]}   an OrderedDict, as modules return
    {"$int": "0x1f…"}        an int beyond 64 bits
    {"$float": "nan"}        NaN or an infinity
    {"$bytes": base64}
    {"$str": hex}            a string that is not valid Unicode
"""

from __future__ import annotations

import base64
import json
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpoforge.errors import CheckpointError

_SUPPORTED = "None, bool, int, float, str, bytes, list, tuple, dict, OrderedDict and dense real tensors"
_DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool,
})  # fmt: skip


def pack_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """``(tensors, spec)``: the state's tensors by number, on the CPU, and the rest as strict JSON values.

    Types are exact: a subclass (a numpy scalar, a named tuple) is refused, because it would come back as
    another type; a parameter comes back as a tensor.
    Raises TypeError naming the place: ``state['optimizer']['lr'] is a numpy.float64``.
    """
    packing = _Packing()
    return packing.tensors, packing.pack(state, "state")


def unpack_state(tensors: Mapping[str, Tensor], spec: Any) -> dict[str, Any]:
    """The state that ``pack_state`` was given; tensors are on the CPU and without gradient.

    Raises ValueError when ``spec`` is not what ``pack_state`` writes or names a tensor that is not there.
    """
    state = _unpack(spec, tensors)
    if not isinstance(state, dict):
        raise ValueError(f"a state is a dict, not {type(state).__name__}")
    return state


def save_state(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Write ``folder/name.json`` and, when the state has tensors, ``folder/name.safetensors``.

    Raises TypeError for a value that cannot be stored, OSError or SafetensorError when the disk refuses.
    """
    tensors, spec = pack_state(state)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(spec, indent=1, allow_nan=False) + "\n", encoding="ascii")


def load_state(folder: Path, name: str) -> dict[str, Any]:
    """What ``save_state`` stored. Raises CheckpointError when a file is missing or cannot be read."""
    path, tensor_path = folder / f"{name}.json", folder / f"{name}.safetensors"
    try:
        spec = json.loads(path.read_text(encoding="ascii"))
        return unpack_state(load_file(tensor_path) if tensor_path.exists() else {}, spec)
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, RecursionError, SafetensorError) as error:
        reason = str(error)
    raise CheckpointError(
        f"state {path} cannot be read: {reason}",
        "resume from another checkpoint, or restore this one from a copy",
    )


def rng_state() -> dict[str, Any]:
    """The state of every global random generator: Python, numpy, torch on the CPU and on each CUDA device."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].copy()),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what ``rng_state`` returned; CUDA devices that one of the two machines lacks are left alone."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    numpy = state["numpy"]
    np.random.set_state(("MT19937", numpy["key"].numpy(), numpy["pos"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"])
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, device_state in enumerate(state["cuda"][:num_devices]):
        torch.cuda.set_rng_state(device_state, device)


class _Packing:
    """Values to JSON; tensors are set aside under consecutive numbers."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._storages: set[int] = set()
        self._packers: dict[type, Callable[[Any, str], Any]] = {
            type(None): lambda value, where: value,
            bool: lambda value, where: value,
            int: lambda value, where: value if value.bit_length() < 64 else {"$int": hex(value)},
            float: lambda value, where: value if math.isfinite(value) else {"$float": repr(value)},
            str: lambda value, where: _pack_str(value),
            bytes: lambda value, where: {"$bytes": base64.b64encode(value).decode()},
            list: self._pack_list,
            tuple: lambda value, where: {"$tuple": self._pack_list(value, where)},
            dict: self._pack_dict,
            OrderedDict: lambda value, where: {"$ordered": self._pack_items(value, where)},
            Tensor: self._pack_tensor,
            torch.nn.Parameter: self._pack_tensor,
        }

    def pack(self, value: Any, where: str) -> Any:
        packer = self._packers.get(type(value))
        if packer is None:
            raise _unsupported(where, f"{type(value).__module__}.{type(value).__qualname__}")
        return packer(value, where)

    def _pack_list(self, values: list[Any] | tuple[Any, ...], where: str) -> list[Any]:
        return [self.pack(value, f"{where}[{index}]") for index, value in enumerate(values)]

    def _pack_dict(self, value: dict[Any, Any], where: str) -> Any:
        if all(type(key) is str and not key.startswith("$") and type(_pack_str(key)) is str for key in value):
            return {key: self.pack(item, f"{where}[{key!r}]") for key, item in value.items()}
        return {"$items": self._pack_items(value, where)}

    def _pack_items(self, value: dict[Any, Any], where: str) -> list[list[Any]]:
        # A tensor is a key by identity: no lookup would find it again.
        if any(isinstance(key, Tensor) for key in value):
            raise _unsupported(f"a key of {where}", "tensor")
        return [
            [self.pack(key, f"the key {key!r} of {where}"), self.pack(item, f"{where}[{key!r}]")]
            for key, item in value.items()
        ]

    def _pack_tensor(self, tensor: Tensor, where: str) -> dict[str, str]:
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise _unsupported(where, f"tensor ({tensor.dtype}, {tensor.layout}, on {tensor.device})")
        stored = tensor.detach().cpu().resolve_neg().contiguous()
        if stored.untyped_storage().data_ptr() in self._storages:  # safetensors refuses shared storage
            stored = stored.clone()
        self._storages.add(stored.untyped_storage().data_ptr())
        name = str(len(self.tensors))
        self.tensors[name] = stored
        return {"$tensor": name}


def _pack_str(value: str) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON would join two lone surrogates into one character
        return {"$str": value.encode("utf-8", "surrogatepass").hex()}
    return value


def _unsupported(where: str, what: str) -> TypeError:
    return TypeError(f"{where} is a {what}; a state holds {_SUPPORTED}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag, content = next(iter(value.items()), ("", None))
    if not tag.startswith("$"):
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if tag == "$tensor":
        if not isinstance(content, str) or content not in tensors:
            raise ValueError(f"tensor {content!r} is missing")
        return tensors[content]
    if tag not in _UNPACKERS:
        raise ValueError(f"unknown tag {tag!r}")
    try:
        return _UNPACKERS[tag](_unpack(content, tensors))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"malformed {tag!r}: {error}") from None


_UNPACKERS: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$items": dict,
    "$ordered": OrderedDict,
    "$int": lambda text: int(text, 16),
    "$float": float,
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$str": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
}
