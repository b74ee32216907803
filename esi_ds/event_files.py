"""TensorBoard's event files: points that a run has drawn, and takes back where it goes on from an earlier step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter


def last_steps(folder: Path, group: str) -> dict[str, int]:
    """The last step of each curve of a group that a folder holds: tag → step; nothing where there is no such folder."""
    if not folder.is_dir():
        return {}
    drawn = _read(str(folder))
    return {tag: drawn.Scalars(tag)[-1].step for tag in drawn.Tags()["scalars"] if tag.startswith(f"{group}/")}


def withdraw(writer: SummaryWriter, step: int, is_withdrawn: Callable[[str], bool]) -> None:
    """Drop the points after ``step`` of those curves in the writer's folder whose tag ``is_withdrawn``.

    Event files only grow. TensorBoard's mark of a restart hides all that was drawn from a step on, of every curve: the
    points of the others are drawn again.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer.flush()
    drawn = _read(writer.log_dir)
    mark = Event(session_log=SessionLog(status=SessionLog.START))
    writer._get_file_writer().add_event(mark, step + 1)
    for tag in drawn.Tags()["scalars"]:
        if not is_withdrawn(tag):
            points = {(point.step, point.wall_time): point.value for point in drawn.Scalars(tag) if point.step > step}
            for (number, when), value in points.items():
                writer.add_scalar(tag, value, number, when)


def _read(folder: str) -> EventAccumulator:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = logging.getLogger("tensorboard")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of what earlier marks hide, which is not to come back
    drawn = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    logger.setLevel(level)
    return drawn
