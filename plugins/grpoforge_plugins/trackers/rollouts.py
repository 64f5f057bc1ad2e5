"""``rollouts/step-000012.parquet``: every completion of a step with its ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from grpoforge.errors import GrpoforgeError
from grpoforge.tracking import RunInfo, rollout_rows

if TYPE_CHECKING:
    from grpoforge.types import StepReport


class RolloutsFile:
    """Writes every completion of a step, with what each reward gave it, to ``rollouts/step-000012.parquet``.

    The columns are those of ``grpoforge.tracking.sample_row``; ``columns`` is the row of the dataset as JSON.
    A file gets its name only when it is whole.
    Raises GrpoforgeError when pyarrow is not installed.
    """

    def __init__(
        self, run: RunInfo, *, every: Annotated[int, Field(ge=0), "steps between files; 0: never"] = 1
    ) -> None:
        self._pyarrow = _import_pyarrow()
        self._every = every
        self._folder = run.run_dir / "rollouts"
        self._folder.mkdir(parents=True, exist_ok=True)

    def step_finished(self, report: StepReport) -> None:
        if not self._every or report.step % self._every:
            return
        schema = _schema(self._pyarrow, report.scores.names)
        table = self._pyarrow.Table.from_pylist(rollout_rows(report), schema=schema)
        path = self._folder / f"step-{report.step:06d}.parquet"
        unfinished = path.with_suffix(".tmp")
        try:
            self._pyarrow.parquet.write_table(table, unfinished, compression="zstd")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Evaluations have no rollouts to keep."""

    def close(self) -> None:
        """Every file was closed when its step finished."""


def _import_pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise GrpoforgeError(
            f"the tracker `rollouts` writes Parquet files with pyarrow, which cannot be imported: {error}",
            "run `pip install pyarrow`, or take `rollouts` out of `trackers`",
        ) from error
    return pyarrow


def _schema(pyarrow: Any, reward_names: tuple[str, ...]) -> Any:
    # Stated, not inferred: a column of empty lists or of nothing but nulls would be inferred as another type.
    columns = [
        ("step", pyarrow.int64()),
        ("prompt_index", pyarrow.int64()),
        ("origin", pyarrow.string()),
        ("columns", pyarrow.string()),
        ("prompt", pyarrow.string()),
        ("completion", pyarrow.string()),
        ("completion_ids", pyarrow.list_(pyarrow.int64())),
        ("finish_reason", pyarrow.string()),
        ("temperature", pyarrow.float64()),
        ("num_tokens", pyarrow.int64()),
        ("advantage", pyarrow.float64()),
    ]
    parts = ("raw", "reward", "weighted", "share")
    columns += [(f"{name}/{part}", pyarrow.float64()) for name in reward_names for part in parts]
    return pyarrow.schema(columns)
