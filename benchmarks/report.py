"""Makes the README's table and the plot of it from the results: ``python -m benchmarks.report``.

The only place that writes them. Reads `cpu_*.json` (and `gpu_*.json` where they are) of one folder, refuses
results of a rehearsal, and replaces what stands between the two markers in the README. Without results it
says so and changes nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import ROOT
from benchmarks.harness.plot import MISSING

BEGIN = "<!-- benchmarks: written by benchmarks/report.py -->"
END = "<!-- end of benchmarks -->"
PLOT = "docs/overhead.svg"
OURS = ("ml_debugger", "ml_debugger, power")
Results = dict[str, dict[str, Any]]


class NoResultsError(Exception):
    """There is nothing to report, or nothing that may be reported."""


def read_results(folder: Path) -> Results:
    """The results by their name.

    Raises:
        NoResultsError: There are none, or one is of a rehearsal, or of rows that were lost.
    """
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("[cg]pu_*.json"))}
    if not found:
        raise NoResultsError(f"{folder} holds no results: `make bench` writes them")
    for name, document in found.items():
        if document["options"].get("quick"):
            raise NoResultsError(f"{name} is a rehearsal with tiny sizes: its figures mean nothing")
        for losses in _losses(document["summary"]):
            if losses["rows_submitted"] != losses["rows_committed"]:
                raise NoResultsError(f"{name} has lost rows, so its figures are void: {losses}")
    return found


def _losses(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "rows_submitted" in value:
            yield value
        for item in value.values():
            yield from _losses(item)
    elif isinstance(value, list):
        for item in value:
            yield from _losses(item)


def table(results: Results) -> str:
    """Question, target and figure, a line each, of the results that are there."""
    lines = ["| question | target | measured |", "|---|---|---|"]
    for name, rows in _ROWS.items():
        if name in results:
            lines += [f"| {' | '.join(row)} |" for row in rows(results[name]["summary"])]
    if "cpu_baselines" in results:
        lines += ["", *_baseline_table(results["cpu_baselines"]["summary"])]
    return "\n".join(lines)


def _interval(found: dict[str, float], digits: int = 3) -> str:
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def _step_rows(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for batch, found in summary.items():
        for arm, values in found["arms"].items():
            told = f"{_interval(values['ratio'])}; its thread's CPU {values['thread_ratio']['median']:.3f}"
            if "captured_bytes_per_s" not in values:
                yield f"the machine's noise: {arm} / untraced, {batch}", "", told
                continue
            rate = values["captured_bytes_per_s"] / 1e6
            target = "1.03" if "map" in arm else "1.01"
            question = f"training step, traced / untraced, {batch}, {arm}, {rate:.0f} MB/s"
            yield question, f"<= {target}", told


def _hook_rows(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    small, large = summary["small"], summary["large"]
    yield "hook, small tensor, µs over an empty hook", "<= 2", _interval(small["hook_over_empty_us"], 2)
    yield "hook, large tensor, time / one warm copy", "<= 1.05", _interval(large["hook_over_copy"], 2)


def _sustained_rows(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    targets = {
        "tmpfs, process": ">= 0.75",
        "disk, process": ">= 0.95 on disks up to 1 GB/s",
        "disk, power": ">= 0.90",
    }
    for name, target in targets.items():
        found = summary[name]
        ours, bare = found["bytes_per_s"]["median"] / 1e9, found["bare_bytes_per_s"]["median"] / 1e9
        told = f"{_interval(found['throughput_ratio'], 2)}: {ours:.2f} GB/s of {bare:.2f}, no row lost"
        yield f"captured and committed / bare write, {name}", target, told
    cpu = summary["tmpfs, process"]
    yield "CPU seconds / bare write, tmpfs", "<= 1.5", _interval(cpu["cpu_ratio"], 2)
    latency = summary["disk, power"]["flush_s"]
    told = f"median {latency['median'] * 1e3:.1f}, worst {latency['worst'] * 1e3:.1f}"
    yield "ms until a small call is on the disk (flush, `power`)", "", told
    for (label, found), target in zip(summary["bytes_on_disk"].items(), ("1.01", "1.3", "2.1"), strict=True):
        yield f"bytes on disk / payload, {label}", f"<= {target}", f"{found['ratio']:.3f}"


def _rival_rows(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for load, found in summary.items():
        told = f"{_interval(found['wall_ratio'], 2)}, CPU {_interval(found['cpu_ratio'], 2)}"
        yield f"time of `lmdb` + `msgpack` in a thread / ours, {load}", "> 1", told


def _export_rows(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, found in summary["speed_over_cp_and_sha256sum"].items():
        memory = summary["memory_bytes"][name] / 2**20
        told = f"{_interval(found, 2)}, {memory:.0f} MiB of memory"
        yield f"export speed / (cp + sha256sum), {name}", ">= 0.8", told


def _drop_rows(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for size, found in summary.items():
        yield f"ms until a dropped epoch of {size} is invisible", "<= 20", _ms(found["invisible_s"])
        yield f"its space is back, / `unlink`, {size}", "<= 1.2", _interval(found["drop_over_unlink"], 2)


def _upload_rows(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for place, found in summary["throughput"].items():
        speed = found["upload_bytes_per_s"]["median"] / 1e6
        told = f"{_interval(found['throughput_ratio'], 2)}, {speed:.0f} MB/s"
        yield f"upload / plain PUT over loopback, {place}", ">= 0.9", told
    yield "step with `auto_sync` / without", "", _interval(summary["step"]["ratio"])


def _ms(found: dict[str, float]) -> str:
    return _interval({key: value * 1e3 for key, value in found.items()}, 2)


def _scaling_rows(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield "µs a call of three layers at no bytes", "<= 60", f"{summary['batches']['a_us']:.0f}"
    for name, found in summary["epochs"].items():
        if name != "one":
            yield f"CPU a call, epochs: {name} / one epoch", "<= 1.1", f"{found['cpu_ratio']:.2f}"
    grown = summary["memory"]["growth"]["RssAnon"] / 2**20
    yield f"MiB that {summary['memory']['calls']} calls add", "<= 1", f"{grown:.2f}"


def _import_rows(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield (
        "ms of CPU that `import ml_debugger.training` adds to `import torch`",
        "<= 20",
        _ms(summary["cpu_s"]),
    )


_ROWS: dict[str, Callable[[dict[str, Any]], Iterator[tuple[str, str, str]]]] = {
    "cpu_training_overhead": _step_rows,
    "cpu_hook_cost": _hook_rows,
    "cpu_sustained": _sustained_rows,
    "cpu_rival": _rival_rows,
    "cpu_export": _export_rows,
    "cpu_drop": _drop_rows,
    "cpu_upload": _upload_rows,
    "cpu_scaling": _scaling_rows,
    "cpu_import_time": _import_rows,
}


def _baseline_table(summary: dict[str, Any]) -> Iterator[str]:
    jobs = summary["jobs"]
    names: list[str] = []
    for job in jobs:
        names += [name for name in job["arms"] if name not in names]
    yield f"| step time / untraced | survives | {' | '.join(job['job'] for job in jobs)} |"
    yield f"|---|---|{'---|' * len(jobs)}"
    for name in names:
        cells = [f"{job['arms'][name]['ratio']['median']:.3f}" if name in job["arms"] else "" for job in jobs]
        survives = next(job["arms"][name]["survives"] for job in jobs if name in job["arms"])
        yield f"| {name} | {survives} | {' | '.join(cells)} |"


def section(results: Results, *, has_plot: bool) -> str:
    """What stands between the markers."""
    machine = next(iter(results.values()))["machine"]
    revision = (machine["git_revision"] or "unknown")[:12]
    told = (
        f"Measured on {machine['cpu']}, {machine['cpu_cores']} cores, torch {machine['torch']}, LMDB "
        f"{machine['lmdb']}, {machine['date'][:10]}, revision {revision}; medians with 95 % intervals; "
        "`make bench` measures the same on your machine."
    )
    parts = [told, "", table(results)]
    if has_plot:
        parts += ["", f"![Step time over untraced against captured bytes a step]({PLOT})"]
    return "\n".join(parts)


def put_between_markers(text: str, inside: str) -> str:
    """``text`` with another inside between its markers.

    Raises:
        NoResultsError: It has not both markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise NoResultsError(f"the README lacks the line {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n{inside}\n{END}{after}"


def draw_overhead(path: Path, summary: dict[str, Any]) -> bool:
    """Step time over untraced against captured bytes a step, a line a tool; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float]]] = {}
    for job in summary["jobs"]:
        for name, arm in job["arms"].items():
            lines.setdefault(name, []).append((job["captured_bytes_a_step"] / 1e6, arm["ratio"]["median"]))
    with matplotlib.rc_context({"svg.hashsalt": "ml-debugger"}):
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for name, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            is_ours = name in OURS
            style = {"linewidth": 2.5, "zorder": 3} if is_ours else {"linewidth": 1.0, "alpha": 0.8}
            axes.plot(x, y, marker="o" if is_ours else ".", label=name, **style)
        axes.axhline(1.0, color="#888888", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("captured MB a step")
        axes.set_ylabel("step time / untraced")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, metadata={"Date": None})
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--print", action="store_true", help="print the section and write nothing")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
        plot = options.readme.parent / PLOT
        if options.print:
            print(section(results, has_plot=plot.exists()))
            return 0
        text = put_between_markers(options.readme.read_text(), "")  # before anything is written
        if "cpu_baselines" in results:
            plot.parent.mkdir(parents=True, exist_ok=True)
            if not draw_overhead(plot, results["cpu_baselines"]["summary"]):
                print(MISSING, file=sys.stderr)
        text = put_between_markers(text, section(results, has_plot=plot.exists()))
    except NoResultsError as error:
        print(f"nothing is reported: {error}", file=sys.stderr)
        return 1
    temporary = options.readme.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, options.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
