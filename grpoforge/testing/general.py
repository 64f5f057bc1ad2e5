"""Rules that hold for components of several kinds."""

from __future__ import annotations

import copy
import functools
import json
import random
import time
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from grpoforge.testing.kit import Broken, NotApplicable, Subject, difference, expect_same, foreign, rule, show


@rule("take randomness from the seed that you are given, and keep nothing between calls except in `state_dict`")
def deterministic(subject: Subject) -> str:
    """Equal data, equal answers: bit for bit, whatever the global random generators say."""
    answers = []
    for seed in (1, 2):
        state = random.getstate()
        torch.manual_seed(seed)
        random.seed(seed)
        answers.append(subject.ask())
        random.setstate(state)
    expect_same(answers[1], answers[0], "two instances answer the same question differently")
    built = subject.build()
    if hasattr(built, "state_dict"):
        return "two instances agree; it has a state, so a second call may differ"
    first = subject.answer(built, subject.question())
    expect_same(subject.answer(built, subject.question()), first, "the second call differs from the first")
    return "two instances and two calls agree"


@rule("work on a copy: `x = x.clone()`, `rows = list(rows)`")
def leaves_data_alone(subject: Subject) -> str:
    """What it is given is as it was when it has answered: other parts of the step read it too."""
    question = subject.question()
    before = copy.deepcopy(question)
    subject.answer(subject.build(), question)
    expect_same(question, before, "it changed what it was given")
    return f"{subject.wording} is as it was"


@rule("do the slow part once, when it is built; make loops over rows into tensor operations")
def quick(subject: Subject) -> str:
    """One call on a few rows takes seconds at most."""
    started = time.perf_counter()
    subject.ask()
    seconds = time.perf_counter() - started
    if seconds > subject.seconds:
        raise Broken(f"it took {seconds:.1f} s, more than {subject.seconds:g} s")
    return f"{seconds * 1000:.1f} ms of {subject.seconds:g} s"


@rule("define the function or class at the top level of a module: no lambda, no function in a function")
def travels(subject: Subject) -> str:
    """A worker process can be handed it: the function or class is found by its name, and so are its options."""
    recipe = functools.partial(subject.component.factory, **subject.options)
    try:
        # Only what was written on the line above is ever read here.
        received = ForkingPickler.loads(ForkingPickler.dumps(recipe))
    except Exception as error:  # the boundary: what cannot be sent, nobody documents
        raise Broken(f"it cannot be sent: {str(error).partition(chr(10))[0]}") from error
    if received.func is not subject.component.factory:
        raise Broken(f"what arrives is another object of the name `{received.func.__qualname__}`")
    return f"as {received.func.__module__}.{received.func.__qualname__}"


@rule("return from `state_dict` everything that calls change, as JSON values and tensors, and take it back whole")
def state(subject: Subject) -> str:
    """A new instance that loads the state of another answers as that one does: a resumed run is the same run."""
    built = subject.build()
    methods = [name for name in ("state_dict", "load_state_dict") if hasattr(built, name)]
    if not methods:
        raise NotApplicable("it has no `state_dict`")
    if len(methods) == 1:
        raise Broken(f"it has `{methods[0]}` and not its counterpart")
    subject.answer(built, subject.question())
    with foreign():
        saved = built.state_dict()
    _check_storable(saved)
    resumed = subject.build()
    with foreign():
        resumed.load_state_dict(_stored(saved))
    expected = subject.answer(built, subject.question())
    expect_same(subject.answer(resumed, subject.question()), expected, "after loading the state the answer differs")
    return f"round trip of {', '.join(saved) or 'an empty state'}"


def _check_storable(value: Any, place: str = "the state") -> None:
    """Raise `Broken` for what a checkpoint cannot hold."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise Broken(f"{place} has the key {show(name)}, which is no string")
            _check_storable(inner, f"{place}[{name!r}]")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_storable(inner, f"{place}[{index}]")
    elif not isinstance(value, Tensor | str | int | float | bool | None):
        raise Broken(f"{place} is a {type(value).__name__}, and a checkpoint holds JSON values and tensors only")


def _stored(value: Any) -> Any:
    """``value`` as it comes back from a checkpoint: new tensors, tuples as lists."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {name: _stored(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_stored(inner) for inner in value]
    return json.loads(json.dumps(value))


def same(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether two answers agree: for what is observed and not demanded."""
    return not difference(found, expected, tolerance)
