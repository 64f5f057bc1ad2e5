"""tensorboard/: scalars under their own names, samples that cannot leave their code block."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
from tensorboard.backend.event_processing import event_accumulator as accumulator

from grpoforge.errors import GrpoforgeError
from grpoforge.tracking import RunInfo
from grpoforge.types import StepReport
from grpoforge_plugins.trackers.tensorboard import TensorBoard, fenced

MakeReport = Callable[..., StepReport]


def events(run: RunInfo) -> Any:
    loaded = accumulator.EventAccumulator(str(run.run_dir / "tensorboard"))
    loaded.Reload()
    return loaded


def scalars(run: RunInfo, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run).Scalars(name)]


def texts(run: RunInfo) -> list[tuple[int, str]]:
    stored = events(run).Tensors("sample/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in stored]


def test_scalars_keep_their_names(run: RunInfo, make_report: MakeReport) -> None:
    tracker = TensorBoard(run)
    tracker.step_finished(make_report(1, metrics={"reward": 0.5, "rewards/math/mean": 0.25}))
    tracker.evaluated(1, {"eval_pass@1": 0.75})
    tracker.close()
    assert scalars(run, "reward") == [(1, 0.5)]
    assert scalars(run, "rewards/math/mean") == [(1, 0.25)]
    assert scalars(run, "eval_pass@1") == [(1, 0.75)]


def test_a_nan_metric_is_kept(run: RunInfo, make_report: MakeReport) -> None:
    tracker = TensorBoard(run)
    tracker.step_finished(make_report(1, metrics={"kl": float("nan")}))
    tracker.close()
    assert math.isnan(scalars(run, "kl")[0][1])


def test_a_resumed_run_hides_what_came_after_the_checkpoint(run: RunInfo, make_report: MakeReport) -> None:
    killed = TensorBoard(run)
    for step in (1, 2, 3):
        killed.step_finished(make_report(step, metrics={"reward": float(step)}))
    killed.close()
    resumed = TensorBoard(dataclasses.replace(run, first_step=2))
    resumed.step_finished(make_report(3, metrics={"reward": 30.0}))
    resumed.close()
    assert scalars(run, "reward") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_sample_is_one_code_block(run: RunInfo, make_report: MakeReport) -> None:
    tracker = TensorBoard(run, text_every=2)
    for step in (1, 2):
        tracker.step_finished(make_report(step))
    tracker.close()
    assert texts(run) == [
        (
            2,
            "```text\n2+2?\n---\n4\n---\nadvantage -0.750\n"
            "math: reward 0.000, weighted 0.000, share of the advantage -0.500\n"
            "brevity: reward 0.000, weighted 0.000, share of the advantage -0.250\n```",
        )
    ]


def test_zero_means_no_samples(run: RunInfo, make_report: MakeReport) -> None:
    tracker = TensorBoard(run, text_every=0)
    tracker.step_finished(make_report(20))
    tracker.close()
    assert events(run).Tags()["tensors"] == []


@pytest.mark.parametrize("text", ["```\n![x](http://evil)\n```", "`" * 50, "~~~\n<script>", "a\n````\n# b"])
def test_text_cannot_leave_its_block(text: str) -> None:
    import markdown

    html = markdown.markdown(fenced(text), extensions=["tables", "fenced_code"])
    assert html.count("<code") == html.count("</code>") == 1
    assert html.startswith("<pre><code")
    assert html.endswith("</code></pre>")
    assert "<img" not in html
    assert "<script" not in html
    assert "<h1" not in html


def test_hostile_completions_are_escaped(run: RunInfo, make_report: MakeReport) -> None:
    tracker = TensorBoard(run, text_every=1)
    tracker.step_finished(make_report(1, text="\x1b[2J\ud800\u202e"))
    tracker.close()
    assert "\n\\x1b[2J\\ud800\\u202e\n" in texts(run)[0][1]


def test_without_tensorboard_the_run_does_not_start(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(GrpoforgeError) as caught:
        TensorBoard(run)
    assert caught.value.message.startswith(
        "the tracker `tensorboard` needs the package tensorboard, which cannot be imported: "
    )
    assert caught.value.hint == "run `pip install tensorboard`, or take `tensorboard` out of `trackers`"
