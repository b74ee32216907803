"""What a run says while it runs: progress bar, metrics.jsonl, TensorBoard, DeepSpeed's monitors, log.txt.

Rank 0 alone speaks. Tags are the same in every stage: ``progress/<phase>`` and ``speed/<phase>`` of whatever has a bar,
then what the stage measures.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from esi_ds.artifacts import append_jsonl, read_jsonl, write_text_atomic, writing
from esi_ds.status import StatusWriter

POINT_S = 1.0  # seconds between two points of a progress curve
FLUSH_S = 10  # TensorBoard shows a point this late at most


class Monitor(Protocol):
    """Where else a run's curves go (``zero/monitor.py``)."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Bar(tqdm):
    """A progress bar that somebody may listen to."""

    heard: Callable[[Bar], None] | None = None

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if self.heard is not None:
            self.heard(self)
        return shown


class Tracker:
    """A context manager; with ``enabled`` False nothing is written or shown. monitor: closed at its end."""

    def __init__(self, folder: Path, enabled: bool, tensorboard: bool, stage: str, monitor: Monitor | None = None):
        self.folder, self.enabled = folder, enabled
        self._monitor = monitor if enabled else None
        self._last_point = -math.inf
        self._status = StatusWriter(folder, stage) if enabled else None
        self._writer = None
        self._tensorboard = tensorboard and enabled

    def __enter__(self) -> Tracker:
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _spare_the_writer
            self._writer = SummaryWriter(str(self.folder / "tensorboard"), flush_secs=FLUSH_S)
        if self._status is not None:
            self._status.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._status is not None:
            self._status.__exit__(*error)
        with suppress(OSError) if error[0] else nullcontext():  # what ended the run is told of, and nothing after it
            self._draw("close")
        if self._monitor is not None:
            self._monitor.close()

    def progress(self, *, total: int, initial: int, unit: str, description: str) -> Bar:
        """A bar with rate and time left; where stderr is no terminal, a line every half minute at most.

        description: the phase, "<phase>: <what>" where there are several of a sort.
        """
        interval = 0.5 if sys.stderr.isatty() else 30.0
        bar = Bar(
            total=total,
            initial=initial,
            unit=unit,
            desc=description,
            disable=not self.enabled,
            mininterval=interval,
            maxinterval=interval,
            dynamic_ncols=True,
        )
        if self.enabled:
            bar.heard, self._last_point = self._progress_points, -math.inf
        if self._status is not None:
            self._status.watch(bar)
        self._draw("flush")  # all of the phase before this one
        return bar

    def _progress_points(self, bar: Bar) -> None:
        """How much is done, in per cent, and how fast, over the number that is done."""
        now = time.monotonic()
        if bar.n < bar.total and now - self._last_point < POINT_S:
            return
        self._last_point = now
        shown = bar.format_dict
        phase, seconds = shown["prefix"].removesuffix(": ").replace(": ", "/"), shown["elapsed"]
        values = {f"progress/{phase}": 100 * bar.n / max(bar.total, 1)}
        if seconds > 0:
            values[f"speed/{phase}"] = (bar.n - bar.initial) / seconds
        self.points(int(bar.n), values)

    def log(self, line: str) -> None:
        """One message to stdout and log.txt."""
        if self.enabled:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
            file = self.folder / "log.txt"
            with writing(file), file.open("a", encoding="utf-8") as opened:
                opened.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def resume_at(self, step: int) -> None:
        """Drop what an earlier process measured after ``step``: these steps come again."""
        file = self.folder / "metrics.jsonl"
        if self.enabled and file.is_file():
            kept = [row for row in read_jsonl(file) if row["step"] <= step]
            write_text_atomic(file, "".join(json.dumps(row) + "\n" for row in kept))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and a point in each curve. A value that is not finite is null."""
        if not self.enabled:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        append_jsonl(self.folder / "metrics.jsonl", [{"step": step, "time": time.time(), **finite}])
        self.points(step, {name: value for name, value in finite.items() if value is not None})

    def points(self, step: int, values: Mapping[str, float]) -> None:
        """A point in each curve of TensorBoard and of DeepSpeed's monitors, and none in metrics.jsonl."""
        for name, value in values.items():
            self._draw("add_scalar", name, value, step)
        if self._monitor is not None:
            self._monitor.write(step, values)

    def histogram(self, tag: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """A TensorBoard histogram of bins counted elsewhere: the values themselves were never in one place."""
        if not any(counts):
            return
        centres = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        self._draw(
            "add_histogram_raw",
            tag,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(c * n for c, n in zip(centres, counts, strict=True)),
            sum_squares=sum(c * c * n for c, n in zip(centres, counts, strict=True)),
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=0,
        )

    def figure(self, tag: str, figure: Any) -> None:
        """A matplotlib figure as a TensorBoard image."""
        self._draw("add_figure", tag, figure, global_step=0, close=False)

    def text(self, tag: str, text: str) -> None:
        self._draw("add_text", tag, text, global_step=0)

    def _draw(self, kind: str, *arguments: Any, **options: Any) -> None:
        """A call of TensorBoard's writer, where there is one; a full disk is told of by the folder's name."""
        if self._writer is not None:
            with writing(self.folder / "tensorboard"):
                getattr(self._writer, kind)(*arguments, **options)


def _spare_the_writer(failure: threading.ExceptHookArgs) -> None:
    """No traceback of TensorBoard's own thread: what it met is raised again at the next call of its writer."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)
