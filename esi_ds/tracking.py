"""What a run shows while it runs: progress bar, metrics.jsonl, TensorBoard, DeepSpeed's monitors, log.txt.

Only rank 0 writes. Tags are the same in every stage: ``progress/<phase>`` and ``speed/<phase>`` for every progress bar,
``tokens_per_second/<phase>`` where it counts tokens, then the stage's measurements. What tells a stage's story comes
first, under ``Overview/`` (``Tracker.overview``).
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from esi_ds.artifacts import append_jsonl, jsonl, read_metrics, write_text_atomic, writing
from esi_ds.event_files import last_steps, withdraw
from esi_ds.status import StatusWriter
from esi_ds.terminal import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

POINT_S = 1.0  # seconds between two points of a progress curve
# TensorBoard opens with its charts in the order of their groups' names, capitals first, and unfolds the first two.
OVERVIEW = "Overview"
# Curves that are drawn with the measurements in metrics.jsonl and are not in it.
BESIDE_METRICS = (f"{OVERVIEW}/", "noise/")
BAR_GROUPS = ("progress", "speed", "tokens_per_second")  # a curve of each for every phase
MAX_LINE_NAME = 60  # characters of a line's folder
MAX_BAR_NAME = 32  # characters of a model's or a judge's name in a bar
FLUSH_S = 10  # seconds until TensorBoard shows a point, at most


def literal(text: str) -> str:
    """Markdown that shows a text as it stands: indented lines are not rendered."""
    return textwrap.indent(text, "    ", lambda line: True)


class Monitor(Protocol):
    """Another destination of a run's curves (``zero/monitor.py``)."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One point per curve."""

    def resume_at(self, step: int, names: Collection[str]) -> None:
        """Drop the points of these curves after ``step``."""

    def close(self) -> None:
        """Write what is buffered."""


class Bar(tqdm):
    """A progress bar with a listener, which may also show how many tokens a second pass.

    Its time ends where it is full or closed: a phase's rate does not fall while the stage goes on without a bar.
    """

    on_update: Callable[[Bar], None] | None = None
    num_tokens = 0
    drawn = -1  # the last step of its curves, perhaps of an earlier process
    _seconds: float | None = None  # until it was full or closed

    @property
    def format_dict(self) -> dict[str, Any]:
        numbers: dict[str, Any] = super().format_dict
        return numbers if self._seconds is None else {**numbers, "elapsed": self._seconds}

    @property
    def tokens_per_second(self) -> float:
        """Since the bar began; 0 where no tokens are counted."""
        return self.num_tokens / max(self.format_dict["elapsed"] or 0.0, 1e-9)

    def advance(self, n: int, num_tokens: int) -> None:
        """``update`` by ``n`` units that had ``num_tokens`` tokens together, over all ranks."""
        self.num_tokens += num_tokens
        if not self.disable:
            self.set_postfix_str(f"{self.tokens_per_second:,.0f} tokens/s", refresh=False)
        self.update(n)

    def update(self, n: float | None = 1) -> bool | None:
        was_drawn = super().update(n)
        if self.n >= self.total:
            self._seconds = self.format_dict["elapsed"]
        if n and self.on_update is not None:  # where nothing was done there is no new point
            self.on_update(self)
        return was_drawn

    def close(self) -> None:
        if not self.disable:
            self._seconds = self.format_dict["elapsed"]
        super().close()


class Tracker:
    """A context manager; if not ``enabled`` it writes and shows nothing. It closes ``monitor`` at its end."""

    def __init__(self, folder: Path, enabled: bool, tensorboard: bool, stage: str, monitor: Monitor | None = None):
        self.folder, self.enabled, self.stage = folder, enabled, stage
        self.remarks: list[str] = []
        self._monitor = monitor if enabled else None
        self._last_point = -math.inf
        self._status = StatusWriter(folder, stage) if enabled else None
        self._writer: SummaryWriter | None = None
        self._line_writers: dict[str, SummaryWriter] = {}
        self._tensorboard = tensorboard and enabled
        self._drawn_before: dict[str, int] = {}  # the last step of each curve of progress that an earlier process drew

    def __enter__(self) -> Tracker:
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # imports all of TensorBoard: only if it is wanted

            threading.excepthook = _ignore_writer_thread
            folder = self.folder / "tensorboard"
            with writing(folder):
                self._drawn_before = last_steps(folder, "progress")
            self._writer = SummaryWriter(str(folder), flush_secs=FLUSH_S)
        if self._status is not None:
            self._status.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._status is not None:
            self._status.__exit__(*error)
        with suppress(OSError) if error[0] else nullcontext():  # report the error that ended the run, no later one
            self._draw_all(lambda writer: writer.close())
        if self._monitor is not None:
            self._monitor.close()

    def progress(self, *, total: int, initial: int, unit: str, description: str) -> Bar:
        """A bar with rate and time left; if stderr is not a terminal, a line every half minute at most.

        description: the phase, or "<phase>: <which>" if a stage has several phases of a kind; the bar shows the end of
        <which>, its curves all of it.
        """
        description = printable(description)
        phase, colon, which = description.partition(": ")
        interval = 0.5 if sys.stderr.isatty() else 30.0
        bar = Bar(
            total=total,
            initial=initial,
            unit=unit,
            desc=f"{phase}{colon}{which[-MAX_BAR_NAME:]}",
            disable=not self.enabled,
            mininterval=interval,
            maxinterval=interval,
            dynamic_ncols=True,
        )
        if self.enabled:
            phase = description.replace(": ", "/")
            bar.on_update = partial(self._progress_points, phase)
            bar.drawn = self._drawn_before.pop(f"progress/{phase}", -1)
            self._last_point = -math.inf
        if self._status is not None:
            self._status.watch(bar)
        self._draw_all(lambda writer: writer.flush())  # completes the previous phase
        return bar

    def _progress_points(self, phase: str, bar: Bar) -> None:
        """Points for the share done in per cent and for the speed, at the number done. Where that is repeated, after a
        restart or a gradient that is not finite, the earlier points are dropped."""
        now = time.monotonic()
        if bar.n < bar.total and now - self._last_point < POINT_S:
            return
        self._last_point = now
        seconds = bar.format_dict["elapsed"]
        values = {f"progress/{phase}": 100 * bar.n / max(bar.total, 1)}
        if seconds > 0:
            values[f"speed/{phase}"] = (bar.n - bar.initial) / seconds
            if bar.num_tokens:
                values[f"tokens_per_second/{phase}"] = bar.tokens_per_second
        step = int(bar.n)
        if step <= bar.drawn:
            self._withdraw(max(step - 1, 0), [f"{group}/{phase}" for group in BAR_GROUPS])
        bar.drawn = step
        self.points(step, values)

    def log(self, line: str) -> None:
        """One message to stdout and log.txt."""
        if self.enabled:
            line = printable(line)
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
            file = self.folder / "log.txt"
            with writing(file), file.open("a", encoding="utf-8") as opened:
                opened.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def remark(self, line: str) -> None:
        """A message that the manifest and the report repeat, once however often it is given."""
        # An earlier start's remarks are one joined string.
        if not any(f"; {line};" in f"; {earlier};" for earlier in self.remarks):
            self.remarks.append(line)
            self.log(line)

    def resume_at(self, step: int) -> None:
        """Drop what was measured after ``step``, by an earlier process or this one: these steps are repeated."""
        file = self.folder / "metrics.jsonl"
        if not self.enabled or not file.exists():
            return
        rows = read_metrics(self.folder)
        write_text_atomic(file, jsonl([row for row in rows if row["step"] <= step]))
        measured = {name for row in rows if row["step"] > step for name in row}
        if measured:
            self._withdraw(step, measured, BESIDE_METRICS)

    def _withdraw(self, step: int, names: Collection[str], beside: tuple[str, ...] = ()) -> None:
        """Drop the points of these curves after ``step``, and in TensorBoard those of the groups ``beside``."""
        self._draw(lambda writer: withdraw(writer, step, lambda tag: tag in names or tag.startswith(beside)))
        if self._monitor is not None:
            self._monitor.resume_at(step, names)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and a point in each curve. A value that is not finite becomes null."""
        if not self.enabled:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        append_jsonl(self.folder / "metrics.jsonl", [{"step": step, "time": time.time(), **finite}])
        self.points(step, {name: value for name, value in finite.items() if value is not None})

    def points(self, step: int, values: Mapping[str, float]) -> None:
        """A point in each curve of TensorBoard and of DeepSpeed's monitors; nothing in metrics.jsonl."""

        def draw(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._draw(draw)
        if self._monitor is not None:
            self._monitor.write(step, values)

    def overview(self, step: int, values: Mapping[str, float], line: str | None = None) -> None:
        """A point in each of TensorBoard's first charts; nothing in metrics.jsonl or DeepSpeed's monitors.

        values: by the chart's title. line: its name in charts of several lines (models, sets of prompts), which
        TensorBoard shows as runs within this one; None: the run's own line.
        """

        def draw(writer: SummaryWriter) -> None:
            writer = writer if line is None else self._writer_of(line)
            for title, value in values.items():
                if math.isfinite(value):
                    writer.add_scalar(f"{OVERVIEW}/{title}", value, step)

        self._draw(draw)

    def _writer_of(self, line: str) -> SummaryWriter:
        """The writer of a line's folder below TensorBoard's."""
        if line not in self._line_writers:
            from torch.utils.tensorboard import SummaryWriter

            # A model may be called a/b; the end of a path tells more than its beginning.
            name = re.sub(r"[^\w ,.+=-]", "_", line)[-MAX_LINE_NAME:].strip(". ") or "_"
            taken = sum(Path(writer.log_dir).name.partition(" #")[0] == name for writer in self._line_writers.values())
            folder = self.folder / "tensorboard" / (f"{name} #{taken + 1}" if taken else name)
            self._line_writers[line] = SummaryWriter(str(folder), flush_secs=FLUSH_S)
        return self._line_writers[line]

    def histogram(self, tag: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """A TensorBoard histogram from bins: the values themselves are spread over the ranks.

        edges [bins + 1], counts [bins].
        """
        if not any(counts):
            return
        centres = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        self._draw(
            lambda writer: writer.add_histogram_raw(
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
        )

    def figure(self, tag: str, figure: Figure) -> None:
        """A matplotlib figure as a TensorBoard image."""
        self._draw(lambda writer: writer.add_figure(tag, figure, global_step=0, close=False))

    def text(self, tag: str, text: str) -> None:
        """A text in TensorBoard."""
        self._draw(lambda writer: writer.add_text(tag, text, global_step=0))

    def _draw(self, draw: Callable[[SummaryWriter], object]) -> None:
        """Call ``draw`` with TensorBoard's writer, if there is one; an OSError names TensorBoard's folder."""
        if self._writer is not None:
            with writing(self.folder / "tensorboard"):
                draw(self._writer)

    def _draw_all(self, draw: Callable[[SummaryWriter], object]) -> None:
        """``_draw`` with the writer of the run, then with that of each line."""
        self._draw(draw)
        for line_writer in self._line_writers.values():
            with writing(self.folder / "tensorboard"):
                draw(line_writer)


def _ignore_writer_thread(failure: threading.ExceptHookArgs) -> None:
    """No traceback for TensorBoard's thread: the next call of its writer raises the error again."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)
