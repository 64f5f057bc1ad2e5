"""``tensorboard/``: every number as a scalar, and now and then a completion as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from grpoforge.errors import GrpoforgeError
from grpoforge.sanitize import sanitize
from grpoforge.tracking import RunInfo, sample_row

if TYPE_CHECKING:
    from grpoforge.types import StepReport

_MAX_CHARS = 4000


class TensorBoard:
    """Writes event files for ``tensorboard --logdir RUN``; scalars keep their metric names.

    A resumed run hides what the earlier process wrote after the checkpoint. Raises GrpoforgeError when the
    package tensorboard is not installed.
    """

    def __init__(
        self,
        run: RunInfo,
        *,
        text_every: Annotated[int, Field(ge=0), "steps between samples; 0: none"] = 20,
    ) -> None:
        self._text_every = text_every
        purge_step = run.first_step + 1 if run.first_step else None
        self._writer = _summary_writer()(str(run.run_dir / "tensorboard"), purge_step=purge_step)

    def step_finished(self, report: StepReport) -> None:
        self._add_scalars(report.step, report.metrics)
        if self._text_every and report.step % self._text_every == 0:
            self._writer.add_text("sample", _sample(report, report.step // self._text_every), report.step)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add_scalars(step, metrics)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise GrpoforgeError(
            f"the tracker `tensorboard` needs the package tensorboard, which cannot be imported: {error}",
            "run `pip install tensorboard`, or take `tensorboard` out of `trackers`",
        ) from error
    return SummaryWriter


def _sample(report: StepReport, turn: int) -> str:
    """A completion and its ledger as one Markdown code block."""
    row = sample_row(report, turn)
    prompt, completion = (sanitize(row[key], max_chars=_MAX_CHARS) for key in ("prompt", "completion"))
    lines = [prompt, "---", completion, "---", f"advantage {row['advantage']:+.3f}"]
    lines += [
        f"{name}: reward {row[f'{name}/reward']:.3f}, weighted {row[f'{name}/weighted']:.3f}, "
        f"share of the advantage {row[f'{name}/share']:+.3f}"
        for name in report.scores.names
    ]
    return fenced("\n".join(lines))


def fenced(text: str) -> str:
    """``text`` as a Markdown code block it cannot leave: the fence is longer than its runs of backticks."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
