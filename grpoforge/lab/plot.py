"""The report as one SVG: a panel for each question. matplotlib is optional, and loaded here alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpoforge.errors import ConfigError, DataError
from grpoforge.lab.advantages import CURVE_GROUP, DIFFICULTIES
from grpoforge.lab.losses import GAPS
from grpoforge.lab.report import LabReport

WIDTH, HEIGHT = 7.0, 4.2
"""Inches of a panel."""
# No date and no random ids: the same figures give the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "grpoforge", "font.size": 9.0, "legend.fontsize": 7.0}
STROKES = ("-", "--", ":", "-.")
MARKS = "osv^D<>pX*P"


def require_plotting(path: Path) -> None:
    """Refuse, before anything is measured, a plot that could not be made.

    Raises:
        ConfigError: matplotlib is missing, or ``path`` is no SVG file.
    """
    if path.suffix != ".svg":
        raise ConfigError(f"`--plot {path}` is not an SVG file", f"name it `{path.stem or 'lab'}.svg`")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "`--plot` draws with matplotlib, which is not installed", "install it: pip install 'grpoforge[plot]'"
        )


def write_plot(report: LabReport, path: Path) -> None:
    """Draw ``report`` as the SVG file ``path``.

    Raises:
        DataError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = _panels(report)
    with matplotlib.rc_context(STYLE):
        figure: Any = Figure(figsize=(WIDTH, HEIGHT * max(len(panels), 1)), layout="constrained")
        for index, draw in enumerate(panels):
            draw(figure.add_subplot(len(panels), 1, index + 1), report)
        try:
            figure.savefig(path, format="svg", metadata={"Date": None})
        except OSError as error:
            raise DataError(
                f"`--plot {path}` cannot be written: {error.strerror}", "give a file in a folder of yours"
            ) from None


def _panels(report: LabReport) -> list[Callable[[Any, LabReport], None]]:
    chosen: list[Callable[[Any, LabReport], None]] = []
    if report.kl:
        chosen.append(_draw_kl)
    if report.advantage:
        chosen += [_draw_difficulty, _draw_advantages]
    if report.loss:
        chosen += [_draw_cosine, _draw_noise]
    return chosen


def _draw_kl(axes: Any, report: LabReport) -> None:
    """How far the expected gradient is from that of the reverse KL, on- and off-policy."""
    places = range(len(report.kl))
    for case, shift in (("on_policy", -0.2), ("off_policy", 0.2)):
        heights = [getattr(row, case).from_reverse for row in report.kl]
        axes.bar([place + shift for place in places], heights, width=0.38, label=case.replace("_", "-"))
    axes.set_xticks(list(places), [row.name for row in report.kl], rotation=30, ha="right")
    axes.set_ylabel("distance, relative")
    axes.set_title("KL estimators: expected gradient against that of KL(policy || reference)")
    axes.legend()


def _draw_difficulty(axes: Any, report: LabReport) -> None:
    """The weight of a prompt by its difficulty."""
    rows = report.advantage
    _lines(axes, [row.name for row in rows], [row.weight_by_difficulty for row in rows], DIFFICULTIES)
    positive = [value for row in rows for value in row.weight_by_difficulty if value > 0]
    if positive:
        _log_scale(axes)
        axes.set_ylim(max(min(positive) / 1.2, 0.03), 1.2 * max(positive))
    axes.set_xlabel(f"probability that a completion is right (groups of {CURVE_GROUP})")
    axes.set_ylabel("weight of the prompt")
    axes.set_title("Advantages: expected gradient over the true one, by difficulty")


def _draw_advantages(axes: Any, report: LabReport) -> None:
    """Direction against noise, a mark for each group size."""
    for number, row in enumerate(report.advantage):
        points = [one for one in row.groups.values() if one and one.cosine is not None and one.noise is not None]
        axes.plot(
            [one.cosine for one in points],
            [one.noise for one in points],
            linestyle=STROKES[number // 10 % len(STROKES)],
            marker=MARKS[number % len(MARKS)],
            linewidth=0.8,
            label=_label(row.name),
        )
    axes.set_xlabel("cosine of the expected gradient with the true one (right is better)")
    axes.set_ylabel("noise: rows for signal = noise")
    _log_scale(axes)
    axes.set_title("Advantages: direction against noise, a line over group sizes")
    _legend(axes)


def _draw_cosine(axes: Any, report: LabReport) -> None:
    """Direction of the expected gradient by the gap."""
    values = [[_known(one.cosine) for one in row.gaps] for row in report.loss]
    _lines(axes, [row.name for row in report.loss], values, GAPS)
    axes.set_xlabel("gap between the policy and the one that sampled (log-ratio of a token)")
    axes.set_ylabel("cosine with the true gradient")
    axes.set_title("Losses: direction of the expected gradient, off-policy")


def _draw_noise(axes: Any, report: LabReport) -> None:
    """Noise by the gap, with the unbiased estimate for comparison."""
    names = ["exact ratio", *(row.name for row in report.loss)]
    found = [report.exact_ratio, *(row.gaps for row in report.loss)]
    _lines(axes, names, [[_known(one.noise) for one in gaps] for gaps in found], GAPS)
    _log_scale(axes)
    axes.set_xlabel("gap between the policy and the one that sampled (log-ratio of a token)")
    axes.set_ylabel("noise: rows for signal = noise")
    axes.set_title("Losses: noise of the gradient, off-policy")


def _lines(axes: Any, names: Sequence[str], values: Sequence[Sequence[float]], places: Sequence[float]) -> None:
    for number, (name, heights) in enumerate(zip(names, values, strict=True)):
        stroke, mark = STROKES[number // 10 % len(STROKES)], MARKS[number % len(MARKS)]
        axes.plot(places, heights, linestyle=stroke, marker=mark, markersize=3, label=_label(name))
    _legend(axes)


def _log_scale(axes: Any) -> None:
    """Logarithmic, with plain numbers beside the ticks."""
    axes.set_yscale("log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:.3g}")


def _legend(axes: Any) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _label(name: str) -> str:
    # matplotlib leaves labels that begin with an underscore out of the legend.
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name


def _known(value: float | None) -> float:
    return float("nan") if value is None else value
