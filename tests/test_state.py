"""A state comes back exactly as it was, types included, without pickle."""

from __future__ import annotations

import json
import random
import struct
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grpoforge.errors import CheckpointError
from grpoforge.state import load_state, pack_state, rng_state, save_state, set_rng_state, unpack_state

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint32,
    torch.bool,
]


def same(left: Any, right: Any) -> bool:
    """Equal in value, type and bits, all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    if isinstance(left, float):
        return (left != left and right != right) or struct.pack("d", left) == struct.pack("d", right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left), list(right)) and same(list(left.values()), list(right.values()))
    return bool(left == right)


def tensors() -> st.SearchStrategy[Tensor]:
    def build(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * 10).to(dtype)

    shapes = st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0, 4)])
    return st.builds(build, st.sampled_from(DTYPES), shapes, st.integers(0, 1000))


def texts() -> st.SearchStrategy[str]:
    surrogates = st.characters(min_codepoint=0xD800, max_codepoint=0xDFFF, categories=["Cs"])
    dollars = st.sampled_from(["$", "$tensor", "$tuple", "$int", ""])
    return st.text(max_size=5) | st.text(surrogates, max_size=3) | dollars


def states() -> st.SearchStrategy[dict[Any, Any]]:
    numbers = st.booleans() | st.integers() | st.floats(allow_nan=False)
    keys = st.none() | numbers | texts() | st.binary(max_size=3) | st.tuples(numbers, texts())
    values = keys | st.floats() | st.integers(-(2**200), 2**200) | tensors()

    def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        dicts = st.dictionaries(texts(), children, max_size=3) | st.dictionaries(keys, children, max_size=3)
        lists = st.lists(children, max_size=3)
        return lists | lists.map(tuple) | dicts | dicts.map(OrderedDict)

    anything = st.recursive(values, containers, max_leaves=12)
    return st.dictionaries(texts(), anything, max_size=4) | st.dictionaries(keys, anything, max_size=4)


@settings(max_examples=150, deadline=None)
@given(states())
def test_pack_round_trip_is_exact(state: dict[Any, Any]) -> None:
    packed, spec = pack_state(state)
    spec = json.loads(json.dumps(spec, allow_nan=False))
    assert same(unpack_state(packed, spec), state)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states())
def test_files_round_trip_is_exact(tmp_path: Path, state: dict[Any, Any]) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    save_state(tmp_path, "trainer_state", state)
    assert same(load_state(tmp_path, "trainer_state"), state)


def test_spec_is_readable() -> None:
    state = {"epoch": 3, "lr": (1e-5, float("nan")), "moments": {0: torch.ones(2)}, "big": -(2**64)}
    packed, spec = pack_state(state)
    assert spec == {
        "epoch": 3,
        "lr": {"$tuple": [1e-5, {"$float": "nan"}]},
        "moments": {"$items": [[0, {"$tensor": "0"}]]},
        "big": {"$int": "-0x10000000000000000"},
    }
    assert list(packed) == ["0"] and packed["0"].tolist() == [1.0, 1.0]


def test_int_of_any_size_survives(tmp_path: Path) -> None:
    save_state(tmp_path, "state", {"n": 10**5000})  # beyond the digits that int() reads
    assert load_state(tmp_path, "state") == {"n": 10**5000}


def test_no_tensor_no_tensor_file(tmp_path: Path) -> None:
    save_state(tmp_path, "trainer_state", {"step": 7})
    assert [path.name for path in tmp_path.iterdir()] == ["trainer_state.json"]
    assert load_state(tmp_path, "trainer_state") == {"step": 7}


def test_shared_sliced_and_transposed_tensors_survive(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    large = torch.zeros(1_000_000)
    state = {"a": base, "b": base, "row": base[1], "t": base.T, "few": large[:3], "p": nn.Parameter(base)}
    save_state(tmp_path, "state", state)
    loaded = load_state(tmp_path, "state")
    assert loaded["a"].tolist() == loaded["b"].tolist() == loaded["p"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["row"].tolist() == [3, 4, 5] and loaded["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert type(loaded["p"]) is Tensor and not loaded["p"].requires_grad
    assert (tmp_path / "state.safetensors").stat().st_size < 2000


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"o": [{"lr": np.float64(1)}]}, "state['o'][0]['lr'] is a numpy.float64; a state holds None, bool"),
        ({"o": {1: {2, 3}}}, "state['o'][1] is a builtins.set;"),
        ({"o": np.zeros(2)}, "state['o'] is a numpy.ndarray;"),
        ({"f": len}, "state['f'] is a builtins.builtin_function_or_method;"),
        ({"p": (Pair(1, 2),)}, "Pair; a state holds"),
        ({"size": torch.Size([2])}, "state['size'] is a torch.Size;"),
        ({torch.ones(1): 1}, "a key of state is a tensor;"),
        ({frozenset(): 1}, "the key frozenset() of state is a builtins.frozenset;"),
        ({"z": torch.zeros(1, dtype=torch.complex64)}, "['z'] is a tensor (torch.complex64, torch.strided"),
        ({"z": torch.eye(2).to_sparse()}, "['z'] is a tensor (torch.float32, torch.sparse_coo, on"),
        ({"z": torch.zeros(1, device="meta")}, "['z'] is a tensor (torch.float32, torch.strided, on meta"),
    ],
)
def test_unsupported_value_is_named_with_its_place(state: dict[Any, Any], message: str) -> None:
    with pytest.raises(TypeError) as caught:
        pack_state(state)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": {"$tensor": "0"}}', "tensor '0' is missing"),
        ('{"a": {"$tensor": []}}', "tensor [] is missing"),
        ('{"a": {"$reduce": ["os.system", "true"]}}', "unknown tag '$reduce'"),
        ('{"a": {"$items": [[[], 1]]}}', "malformed '$items': unhashable type: 'list'"),
        ('{"a": {"$int": 5}}', "malformed '$int'"),
        ('{"a": {"$bytes": "?"}}', ""),
        ("[1]", "a state is a dict, not list"),
        ('{"a": ', "Expecting value"),
        ("[" * 50_000, "maximum recursion depth exceeded"),
    ],
)
def test_malformed_state_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "optimizer.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load_state(tmp_path, "optimizer")
    assert caught.value.message.startswith(f"state {tmp_path}/optimizer.json cannot be read: {reason}")
    assert caught.value.hint == "resume from another checkpoint, or restore this one from a copy"


def test_missing_and_torn_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"optimizer\.json cannot be read: No such file or directory"):
        load_state(tmp_path, "optimizer")
    save_state(tmp_path, "optimizer", {"x": torch.ones(100)})
    (tmp_path / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"optimizer\.json cannot be read: .*header"):
        load_state(tmp_path, "optimizer")


class Training:
    """A net with dropout, AdamW and a cosine schedule."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)

    def step(self) -> float:
        noise = random.random() + float(np.random.normal())
        loss = (self.model(torch.randn(16, 4)) - noise).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def test_training_goes_on_bit_identically(tmp_path: Path) -> None:
    torch.manual_seed(0)
    training = Training()
    for _ in range(3):
        training.step()
    parts = {"model": training.model, "optimizer": training.optimizer, "schedule": training.schedule}
    save_state(tmp_path, "trainer", {**{k: v.state_dict() for k, v in parts.items()}, "rng": rng_state()})
    expected = [training.step() for _ in range(5)]
    weights = training.model.state_dict()

    torch.manual_seed(99)
    random.seed(99)
    resumed = Training()
    state = load_state(tmp_path, "trainer")
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    resumed.schedule.load_state_dict(state["schedule"])
    set_rng_state(state["rng"])
    assert [resumed.step() for _ in range(5)] == expected
    assert all(torch.equal(weights[name], value) for name, value in resumed.model.state_dict().items())


def test_optimizer_state_comes_back_with_its_types(tmp_path: Path) -> None:
    training = Training()
    training.step()
    state = training.optimizer.state_dict()
    save_state(tmp_path, "optimizer", state)
    assert same(load_state(tmp_path, "optimizer"), state)


def test_rng_state_restores_every_stream() -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.gauss(0, 1), float(np.random.normal()), float(np.random.rand()), torch.randn(1).item()

    draw()  # leaves half of a pair in the generators of normal variates
    state = rng_state()
    packed, spec = pack_state(state)
    expected = [draw() for _ in range(3)]
    set_rng_state(unpack_state(packed, json.loads(json.dumps(spec))))
    assert [draw() for _ in range(3)] == expected


def test_cuda_streams_are_restored_on_the_devices_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [torch.tensor([device], dtype=torch.uint8) for device in range(3)]
    restored: dict[int, Tensor] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: streams)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.update({device: state}))
    set_rng_state(rng_state())
    assert {device: state.tolist() for device, state in restored.items()} == {0: [0], 1: [1]}
