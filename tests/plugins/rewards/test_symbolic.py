from __future__ import annotations

import importlib.util
import json
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpoforge.declarations import declared
from grpoforge.errors import ConfigError, RewardError
from grpoforge.registry import make_component
from grpoforge_plugins.rewards import symbolic
from grpoforge_plugins.rewards.answers import stated_formula
from grpoforge_plugins.rewards.math import Math
from grpoforge_plugins.rewards.symbolic import Worker, compares, worker

CHECKOUT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("GRPOFORGE_SHARED", CHECKOUT.parent / "shared"))
HOSTILE: tuple[Any, ...] = runpy.run_path(str(CHECKOUT / "tests/hostile_completions.py"))["HOSTILE"]
SCRIPT = CHECKOUT / "plugins/grpoforge_plugins/rewards/symbolic_worker.py"

ENDLESS = r"\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}"
"""Math-Verify#65: parsing it never returns, whatever the library's own limit says."""


def reward(text: str, reference: object, **options: Any) -> float | None:
    (found,) = Math(**{"verifier": "symbolic", **options})([text], [reference])
    return found


EQUAL = [
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{\sqrt{2}}{2}"),
    (r"So it is \boxed{(x+1)^2}.", "x^2+2x+1"),
    (r"#### $\sqrt{12}$", r"2\sqrt{3}"),
    (r"The answer is $\frac{\pi}{2}$.", r"\boxed{\frac{\pi}{2}}"),
    (r"\boxed{x=5}", "5"),
    (r"\boxed{5}", "x=5"),
    (r"\boxed{\{2, 1\}}", r"\{1,2\}"),
    (r"\boxed{2,1}", "1,2"),
    (r"\boxed{[0,1)}", "[0,1)"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{\text{B}}", r"\text{B}"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\boxed{2i+1}", "1+2i"),
    (r"\boxed{1024}", "2^{10}"),
    (r"\boxed{5 \text{ or } 6}", r"6 \text{ or } 5"),
    ("#### 18", 18),
    ("A: $18.00", "… #### 18"),
    ("#### 1,080 eggs", "1080"),
    (r"\boxed{\frac{3}{4}}", "0.75"),
    ("\\boxed{\u221242}", "-42"),
]

DIFFERENT = [
    (r"\boxed{\frac{1}{\sqrt{3}}}", r"\frac{\sqrt{2}}{2}"),
    (r"\boxed{x^2+1}", "x^2+2x+1"),
    (r"\boxed{y=5}", "x=5"),
    (r"\boxed{(2,1)}", "(1,2)"),
    (r"\boxed{\pi}", "3.14"),
    ("#### 17", 18),
    ("nothing stated", "18"),
    ("", "18"),
    # percent is a unit here, as in GSM8K
    (r"\boxed{400\%}", "4"),
    # hedges
    (r"\boxed{1}\boxed{2}", "2"),
    (r"\boxed{x}\boxed{y}", "y"),
    (r"\boxed{1,2,3,4}", "4"),
    (r"\boxed{1,2,3,4}", "1234"),
    ("#### 42 or 43", "42"),
    (r"\boxed{42 \text{ or } 43}", "43"),
    (r"\boxed{42 \text{ and } 43}", "42"),
    (r"\boxed{42 \text{ not } 43}", "42"),
    (r"#### 42 $ and $ 43", "42"),
    (r"\boxed{42 \pm 1}", "43"),
    # relations: the library takes one side
    (r"\boxed{42=43}", "43"),
    (r"\boxed{40=41=42}", "42"),
    (r"\boxed{42 \approx 41}", "42"),
    (r"\boxed{x \le 42}", "42"),
    (r"\boxed{x=42=43}", "43"),
    # side by side: the library adds
    (r"\boxed{42\;43}", "85"),
    (r"\boxed{42 \quad 43}", "85"),
    (r"\boxed{42 43}", "85"),
    # words that multiply: the library drops them
    (r"\boxed{42\text{ million}}", "42"),
    ("#### 42 thousand", "42"),
    # never closed
    (r"\boxed{x", "x"),
]


@pytest.mark.parametrize(("text", "reference"), EQUAL)
def test_equal(text: str, reference: object) -> None:
    assert reward(text, reference) == 1.0
    assert reward(text, reference, verifier="auto") == 1.0


@pytest.mark.parametrize(("text", "reference"), DIFFERENT)
def test_different(text: str, reference: object) -> None:
    assert reward(text, reference) == 0.0
    assert reward(text, reference, verifier="auto") == 0.0


@pytest.mark.parametrize("reference", [None, "", "there is no answer to this", "?", True, r"\frac{", ["x"]])
def test_row_without_a_readable_reference_is_not_scored(reference: object) -> None:
    assert reward(r"\boxed{x}", reference) is None
    assert reward("#### 18", reference, verifier="auto") is None


def test_what_is_no_number_is_no_answer_to_the_exact_verifier() -> None:
    assert reward(r"\boxed{2\sqrt{4}}", "4", verifier="exact") == 0.0
    assert reward(r"\boxed{2\sqrt{4}}", "4", verifier="auto") == 1.0


def test_auto_asks_nobody_about_numbers() -> None:
    worker().close()
    lines = (SHARED / "data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    assert Math(verifier="auto")(solutions, solutions) == [1.0] * 1319
    assert worker().pid is None


@pytest.mark.slow
@pytest.mark.parametrize(("split", "num_rows"), [("train", 7473), ("test", 1319)])
def test_every_gsm8k_solution_is_right_by_the_library_too(split: str, num_rows: int) -> None:
    lines = (SHARED / "data/gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    math = Math(verifier="symbolic", total_time_limit=600.0)
    assert math(solutions, solutions) == [1.0] * num_rows
    parts = [solution.rpartition("#### ") for solution in solutions]
    changed = [f"{work}#### {int(number.replace(',', '')) + 1:,}" for work, _, number in parts]
    assert math(changed, solutions) == [0.0] * num_rows
    assert math.stopped == 0


def test_lenient_reads_the_last_number() -> None:
    assert reward("She makes 18 dollars.", r"\frac{36}{2}", extraction="lenient") == 1.0
    assert reward("She makes 18 dollars.", r"\frac{36}{2}") == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 18.0", "18"),
        (r"\boxed{400\%}", "400"),
        (r"\boxed{ x  + 1 }", "x + 1"),
        (r"#### $x+1$.", "x+1"),
        (r"\boxed{x}\boxed{y}", None),
        ("#### Step 1\n#### $y$", "y"),
        ("A: $y$\nA: $z$", "z"),
        ("The answer is clear", None),
        (r"\boxed{}", None),
        ("#### " + "x" * 2000, None),
        ("", None),
    ],
)
def test_answer_of_a_formula(text: str, answer: str | None) -> None:
    assert declared(Math(verifier="auto"), "answer_of")(text) == answer


@pytest.mark.parametrize(
    ("reference", "answer", "admitted"),
    [
        ("x", r"x \lor y", True),
        (r"\forall x", "x", True),
        ("42", r"\text{for } 42", True),
        (r"x \le 42", r"x \leq 42", True),
        (r"x \le 42", "42", True),
        ("1 2", "1 2", True),
        ("42", "f(x) = 42", True),
        ("42", "2x = 84", False),
    ],
)
def test_what_the_library_is_asked_about(reference: str, answer: str, admitted: bool) -> None:
    assert compares(reference, answer) is admitted


@pytest.mark.slow
@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_hostile_completions(hostile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged as by `exact`, or as the formula that they are, or stopped; and nothing is run."""
    monkeypatch.chdir(tmp_path)
    formulas = {"arithmetic", "zero to the zero"}
    expected = {1.0} if hostile.name in formulas else {hostile.reward, None}
    assert reward(hostile.text, hostile.reference, time_limit=0.3) in expected
    assert list(tmp_path.iterdir()) == []


def test_an_endless_check_is_stopped_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    math = Math(verifier="symbolic", time_limit=0.3)
    texts = [rf"\boxed{{{ENDLESS}}}", r"\boxed{\sqrt{4}}", "#### 18", rf"\boxed{{{ENDLESS}}}"]
    with caplog.at_level(logging.WARNING):
        assert math(texts, ["5", "2", "17", "5"]) == [None, 1.0, 0.0, None]
        assert math(texts[:1], ["5"]) == [None]
    assert math.stopped == 3
    (told,) = [record.getMessage() for record in caplog.records]
    assert "was stopped: more than 0.3 s (`time_limit`)" in told and "`rewards/*/unscored`" in told


def test_an_endless_reference_is_stopped_too() -> None:
    assert reward("#### 5", ENDLESS, time_limit=0.3) is None


def test_a_call_has_a_limit_of_its_own() -> None:
    math = Math(verifier="symbolic", time_limit=0.3, total_time_limit=0.4)
    texts = [rf"\boxed{{{ENDLESS} + {number}}}" for number in range(40)]
    started = time.monotonic()
    assert math(texts, ["5"] * 40) == [None] * 40
    assert math.stopped == 40
    assert time.monotonic() - started < 6.0, "forty times the limit of one would be twelve"
    assert math([r"\boxed{\sqrt{4}}"], ["2"]) == [1.0], "the next call has its own"


def test_a_stopped_process_is_gone_and_replaced() -> None:
    mine = Worker()
    assert mine.compare("2", r"\sqrt{4}", 1.0) == "equal"
    first = mine.pid
    assert mine.compare("2", r"\sqrt{9}", 1.0) == "different"
    assert mine.pid == first
    assert mine.compare("5", ENDLESS, 0.2) == "stopped"
    assert mine.pid is None and not alive(first)
    assert mine.compare("2", r"\sqrt{4}", 1.0) == "equal"
    second = mine.pid
    assert second not in (None, first)
    mine.close()
    assert not alive(second)
    mine.close()


def test_a_process_that_was_killed_from_outside_is_replaced() -> None:
    mine = Worker()
    assert mine.compare("2", "2", 1.0) == "equal"
    assert mine.pid is not None
    os.kill(mine.pid, signal.SIGKILL)
    assert soon(lambda: mine.pid is None)
    assert mine.compare("2", "2", 1.0) == "equal"
    assert mine.pid is not None
    os.kill(mine.pid, signal.SIGSTOP)
    assert mine.compare("2", "2", 0.2) == "stopped"
    mine.close()


def test_a_process_that_grows_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Worker()
    assert mine.compare("2", "2", 1.0) == "equal"
    monkeypatch.setattr(symbolic, "MAX_MEGABYTES", 10)
    assert mine.compare("5", ENDLESS, 1.9) == "stopped"
    assert mine.pid is None


def test_a_process_that_has_grown_is_replaced_after_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Worker()
    assert mine.compare("2", "2", 1.0) == "equal"
    monkeypatch.setattr(symbolic, "MAX_MEGABYTES", 10)
    assert mine.compare("2", "2", 1.0) == "equal"
    assert mine.pid is None


def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(symbolic, "_SCRIPT", tmp_path / "missing.py")
    with pytest.raises(RewardError) as caught:
        Worker().compare("2", "2", 1.0)
    assert caught.value.message.startswith("the process that compares formulas did not start")
    assert "`python -c 'import math_verify'`" in caught.value.hint


ASKING = """
from grpoforge_plugins.rewards.symbolic import worker


def ask(queue):
    verdict, pid = worker().compare("2", "2", 1.9), worker().pid
    worker().close()
    queue.put((verdict, pid))
"""


@pytest.fixture
def in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """What number the comparing process has of a process that is started so.

    Its function stands in a module that the other process can import, which this one is not.
    """
    (tmp_path / "asking_another.py").write_text(ASKING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "asking_another", raising=False)

    def start(method: str) -> int:
        context: Any = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        process = context.Process(target=importlib.import_module("asking_another").ask, args=(queue,))
        process.start()
        process.join(100)
        assert process.exitcode == 0
        verdict, pid = queue.get()
        assert verdict == "equal"
        return int(pid)

    return start


def test_a_fork_has_a_process_of_its_own(in_another_process: Callable[[str], int]) -> None:
    worker().close()
    assert worker().compare("2", "2", 1.0) == "equal"
    mine = worker().pid
    assert in_another_process("fork") != mine
    assert worker().pid == mine and worker().compare("2", r"\sqrt{4}", 1.0) == "equal"


@pytest.mark.slow
def test_a_spawned_process_has_one_too(in_another_process: Callable[[str], int]) -> None:
    assert in_another_process("spawn") != worker().pid


PARENT = """
import importlib.util, json, subprocess, sys, time
started = subprocess.Popen([sys.executable, "-P", sys.argv[1], str(__import__("os").getpid()), "2048"],
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE)
started.stdout.readline()
print(started.pid, flush=True)
if sys.argv[2:]:
    question = {"reference": "5", "answer": sys.argv[2], "seconds": 0.2}
    started.stdin.write(json.dumps(question).encode() + b"\\n"); started.stdin.flush()
time.sleep(600)
"""


@pytest.mark.parametrize("question", [[], [ENDLESS]], ids=["idle", "inside an endless check"])
def test_it_dies_with_its_parent(question: list[str]) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(SCRIPT), *question], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    time.sleep(0.1)
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert soon(lambda: not alive(pid))


def test_it_loads_no_torch_and_takes_no_print_for_an_answer() -> None:
    code = (
        "import runpy, sys; sys.argv = ['worker', '0', '2048']; "
        f"found = runpy.run_path({str(SCRIPT)!r}); found['verdict']('2', '2'); "
        "assert 'torch' not in sys.modules and 'grpoforge_plugins' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def alive(pid: int | None) -> bool:
    """Whether the process is there; a zombie is."""
    return pid is not None and Path(f"/proc/{pid}").exists() and state(pid) != "Z (orphan)"


def state(pid: int) -> str:
    """Its state; one left to init, which may be slow to wait for it, is told apart."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "Z (orphan)" if fields[0] == "Z" and int(fields[1]) != os.getpid() else fields[0]


def soon(holds: Callable[[], bool]) -> bool:
    """Whether it holds within ten seconds."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("verifier", ["symbolic", "auto"])
def test_a_missing_library_is_told_when_options_are_checked(verifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    component = make_component("reward", "math", "grpoforge", Math)
    component.validate({"verifier": verifier})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    component.validate({"verifier": "exact"})
    with pytest.raises(ConfigError) as caught:
        component.validate({"verifier": verifier})
    assert caught.value.message == (
        f"option `verifier` is `{verifier}`, which needs the package math-verify, and it is not installed"
    )
    assert caught.value.hint == "run `pip install 'grpoforge[math]'`, or use `verifier=exact`"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"time_limit": 2.0}, "option `time_limit` of reward `grpoforge:math`: input should be less than 2"),
        ({"time_limit": 0.0}, "option `time_limit` of reward `grpoforge:math`: input should be greater than 0"),
        ({"total_time_limit": 0.0}, "option `total_time_limit` of reward `grpoforge:math`: input should be greater"),
        ({"verifier": "sympy"}, "option `verifier` of reward `grpoforge:math`: input should be 'exact', 'symbolic'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_component("reward", "math", "grpoforge", Math).validate(options)


def test_a_formula_is_found_in_hostile_text_in_no_time() -> None:
    for hostile in HOSTILE:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            stated_formula(hostile.text)
            times.append(time.perf_counter() - started)
        assert min(times) <= 0.05, hostile.name
