"""When a run saves, and that a kill at any moment costs work but changes no bit."""

from __future__ import annotations

import math
import signal as signals
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from esi_ds.artifacts import read_metrics
from esi_ds.config import validate
from esi_ds.data.conversations import DataOrder, TokenSequence
from esi_ds.errors import Interrupted, UserError
from esi_ds.stages import interrupt
from esi_ds.stages.esi.score import Objective, ScoringPass
from esi_ds.stages.interrupt import check_stop
from esi_ds.stages.saving import SaveClock
from esi_ds.stages.tune.training import Training
from esi_ds.tracking import Tracker
from esi_ds.zero import checkpoint, runtime

NUM_EXAMPLES, BATCH = 11, 2  # six micro-batches
MINUTE = 60.0


class Watch:
    """A clock that the test turns."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Killed(Exception):
    pass


def test_ctrl_c_saves_and_a_second_one_ends(capfd: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signals.getsignal(number) for number in (signals.SIGTERM, signals.SIGUSR1, signals.SIGINT)}
    awake = signals.set_wakeup_fd(-1)  # a command line of an earlier test ends this process at a signal (cli.py)
    try:
        signals.signal(signals.SIGINT, signals.SIG_IGN)
        interrupt.listen()  # in a shell's background nobody presses Ctrl-C
        assert signals.getsignal(signals.SIGINT) is signals.SIG_IGN
        signals.signal(signals.SIGINT, signals.default_int_handler)
        interrupt.listen()
        saved: list[str] = []
        check_stop("nothing yet", lambda: saved.append("no"))
        signals.raise_signal(signals.SIGINT)
        with pytest.raises(Interrupted, match="stopped by a signal with 3 steps; start again to continue"):
            check_stop("3 steps", lambda: saved.append("yes"))
        assert saved == ["yes"] and "Ctrl-C again ends at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signals.raise_signal(signals.SIGINT)
    finally:
        interrupt._stop_requested.clear()
        interrupt._ctrl_c.clear()
        signals.set_wakeup_fd(awake)
        for number, handler in handlers.items():
            signals.signal(number, handler)


@pytest.fixture
def signal(monkeypatch):
    """Call it to have a signal arrive; none is left for the next test."""
    yield interrupt._stop_requested.set
    interrupt._stop_requested.clear()


@pytest.fixture
def saved(monkeypatch) -> list[str]:
    """Checkpoints in the order in which they were written, as ``<folder>/<position>``."""
    written: list[str] = []
    plain = checkpoint.save

    def save(folder: Path, position: int, *rest) -> None:
        plain(folder, position, *rest)
        written.append(f"{folder.name}/{position}")

    monkeypatch.setattr(checkpoint, "save", save)
    return written


def test_nothing_is_saved_before_the_time_has_passed() -> None:
    watch = Watch()
    saves = SaveClock("auto", 10.0, watch)
    watch.now = 10 * MINUTE - 1
    assert not saves.is_due(10**6)
    watch.now = 10 * MINUTE
    assert saves.is_due(1)
    with saves.saving():
        watch.now += 5
    watch.now += 10 * MINUTE - 1
    assert not saves.is_due(10**6)
    watch.now += 1
    assert saves.is_due(1)


def test_saving_takes_at_most_a_twentieth_of_the_time() -> None:
    watch = Watch()
    saves = SaveClock("auto", 10.0, watch)
    with saves.saving():
        watch.now += 2 * MINUTE
    watch.now += 40 * MINUTE - 1
    assert not saves.is_due(10**6)
    watch.now += 1
    assert saves.is_due(1)


def test_a_number_counts_steps_whatever_the_time() -> None:
    saves = SaveClock(3, 10.0, Watch())
    assert [saves.is_due(steps) for steps in (1, 2, 3, 4)] == [False, False, True, True]


def test_zero_minutes_save_always() -> None:
    watch = Watch()
    saves = SaveClock("auto", 0.0, watch)
    with saves.saving():
        watch.now += 100
    assert saves.is_due(1)


class Gradients:
    """What of ``GradientShards`` a pass uses: one sum of two elements."""

    def __init__(self) -> None:
        self.sum, self.norm = torch.zeros(2), 0.0

    def collecting(self):
        return nullcontext()

    def flush(self) -> None:
        pass

    def take_norm_squared(self) -> float:
        return self.norm

    def saved(self) -> dict[str, list[tuple[int, Tensor]]]:
        return {"weight": [(0, self.sum)]}


class Sums(Objective[int]):
    """Adds 1 / (3 + n) for every example n; ``before`` is called with the examples of each micro-batch."""

    unit = "prompt"
    examples = range(NUM_EXAMPLES)
    batch_size, pad = BATCH, 0

    def __init__(self, name: str, before=lambda examples: None):
        self.name, self.before = name, before
        self.gradients = Gradients()  # type: ignore[assignment]

    def index(self, example: int) -> int:
        return example

    def tokens(self, example: int) -> Sequence[int]:
        return range(10 + example)

    def forward(self, examples: Sequence[int]) -> tuple[Tensor, Tensor | None, list[float]]:
        self.before(examples)
        for example in examples:
            self.gradients.sum += 1 / (3 + example)
        return torch.zeros((), requires_grad=True), None, [float(example) for example in examples]

    def scalars(self, score: float, value: float, norm: float, rate: float) -> dict[str, float]:
        return {"value": value}


def scoring(folder: Path, objective: Sums, saves: SaveClock, earlier: Sequence[ScoringPass] = ()) -> ScoringPass:
    model = SimpleNamespace(release=lambda: None)
    config = SimpleNamespace(esi=SimpleNamespace(on_nonfinite="skip"))
    tracker = Tracker(folder, enabled=False, tensorboard=False, stage="esi")
    return ScoringPass(config, model, objective, folder / objective.name, tracker, saves, earlier)


@pytest.fixture
def expected(tmp_path: Path) -> Tensor:
    """The sums of a pass that nothing happens to."""
    whole = scoring(tmp_path / "whole", Sums("safety"), SaveClock("auto", 10.0, Watch()))
    whole.run()
    return whole.gradients.sum


def test_a_short_pass_saves_nothing(tmp_path: Path, saved: list[str]) -> None:
    finished = scoring(tmp_path, Sums("safety"), SaveClock("auto", 10.0))
    state = finished.run()
    assert saved == [] and not (tmp_path / "safety").exists()
    assert state.scores == {n: float(n) for n in range(NUM_EXAMPLES)}


@pytest.mark.parametrize(("every", "minutes", "count"), [("auto", 0.0, 5), (2, 10.0, 2), (1, 10.0, 5)])
def test_the_end_is_not_saved(tmp_path: Path, saved: list[str], every, minutes: float, count: int) -> None:
    scoring(tmp_path, Sums("safety"), SaveClock(every, minutes)).run()
    step = 2 if count == 5 else 4
    assert saved == [f"safety/{step * number}" for number in range(1, count + 1)]


def test_a_pass_that_goes_back_measures_each_step_once(tmp_path: Path) -> None:
    """A gradient that is not finite in the second pass takes it back to its last save, not to the first pass."""

    def before(examples: Sequence[int]) -> None:
        second.gradients.norm = math.inf if 6 in examples else 0.0

    saves, second = SaveClock(2, 10.0), Sums("tuning", before)
    first = scoring(tmp_path, Sums("safety"), saves)
    going_back = scoring(tmp_path, second, saves, [first])
    with Tracker(tmp_path, enabled=True, tensorboard=False, stage="esi") as tracker:
        first.tracker = going_back.tracker = tracker
        first.run()
        assert set(going_back.run().excluded) == {6, 7}
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert steps == [*range(2, 11, 2), 11, *range(13, 22, 2), 22]


@pytest.mark.parametrize("minutes", [0.0, 3.0, 10.0])
@pytest.mark.parametrize("micro_batch", range(6))
def test_killed_in_any_micro_batch_same_bits(
    tmp_path: Path, expected: Tensor, saved: list[str], minutes: float, micro_batch: int
) -> None:
    """Every micro-batch takes a minute."""
    watch = Watch()

    def before(examples: Sequence[int]) -> None:
        watch.now += MINUTE
        if BATCH * micro_batch in examples and not again:
            raise Killed

    again = False
    with pytest.raises(Killed):
        scoring(tmp_path, Sums("safety", before), SaveClock("auto", minutes, watch)).run()
    kept = {0.0: micro_batch, 3.0: 3 if micro_batch >= 3 else 0, 10.0: 0}[minutes]
    assert saved[-1:] == ([f"safety/{BATCH * kept}"] if kept else [])
    again, resumed = True, scoring(tmp_path, Sums("safety", before), SaveClock("auto", minutes, watch))
    started = watch.now
    state = resumed.run()
    assert (watch.now - started) / MINUTE == 6 - kept
    assert torch.equal(resumed.gradients.sum, expected) and len(state.scores) == NUM_EXAMPLES


def test_the_end_of_a_pass_is_saved_with_the_next(tmp_path: Path, saved: list[str], signal) -> None:
    watch = Watch()
    saves = SaveClock("auto", 10.0, watch)
    first = scoring(tmp_path, Sums("safety"), saves)
    first.run()

    def before(examples: Sequence[int]) -> None:
        watch.now += 11 * MINUTE if 4 in examples else 0
        if 8 in examples:
            signal()

    second = scoring(tmp_path, Sums("tuning", before), saves, [first])
    assert second.first_step == NUM_EXAMPLES
    with pytest.raises(Interrupted):
        second.run()
    assert saved == ["safety/12", "tuning/6", "tuning/10"]
    # Neither pass is run again but for what is left.
    seen: list[int] = []
    again = scoring(tmp_path, Sums("safety", seen.extend), saves)
    assert len(again.run().scores) == NUM_EXAMPLES and torch.equal(again.gradients.sum, first.gradients.sum)
    interrupt._stop_requested.clear()
    scoring(tmp_path, Sums("tuning", seen.extend), saves, [again]).run()
    assert seen == [10]


def test_a_signal_after_the_last_pass_saves_all(tmp_path: Path, saved: list[str], signal) -> None:
    saves = SaveClock("auto", 10.0)
    first = scoring(tmp_path, Sums("safety"), saves)
    first.run()
    second = scoring(tmp_path, Sums("benign"), saves, [first])
    second.run()
    check_stop("everything scored", second.save)
    assert saved == []
    signal()
    with pytest.raises(Interrupted):
        check_stop("everything scored", second.save)
    assert saved == ["safety/12", "benign/12"]


def test_other_ranks_do_not_look_at_their_clocks(tmp_path: Path, saved: list[str], monkeypatch) -> None:
    monkeypatch.setattr(runtime, "is_main", lambda: False)
    scoring(tmp_path, Sums("safety"), SaveClock("auto", 0.0)).run()
    assert saved == []


class CountingTuner:
    """Its weight is what the steps so far make of it."""

    def __init__(self, before=lambda step: None):
        self.weight, self.num_steps, self.before = torch.zeros(3), 0, before

    def running(self):
        return nullcontext()

    def forward(self, inputs: dict[str, Tensor], count: int) -> Tensor:
        rows = inputs["input_ids"].shape[0]
        return torch.zeros(rows, count, 9, requires_grad=True)

    def backward(self, loss: Tensor) -> None:
        self.before(self.num_steps)

    def step(self, lr: float) -> float:
        self.num_steps += 1
        self.weight = self.weight * 0.7 + lr
        return 1.0

    def share_moved(self) -> float:
        return 1.0

    def saved(self) -> dict[str, list[tuple[int, Tensor]]]:
        return {"weight/master": [(0, self.weight)]}

    def restored(self, step: int) -> None:
        self.num_steps = step


ROWS = [TokenSequence(row, [1, 2, 3], [-100, 2, 3]) for row in range(4)]
BENIGN = [TokenSequence(row, [4, 5], [-100, 5]) for row in (5, 9)]


def training(
    folder: Path, tuner: CountingTuner, saves: SaveClock, batch_size: int = 1, fraction: float = 0.0
) -> Training:
    """fraction: of benign rows."""
    data = {"path": "r"} | ({"benign": {"path": "b", "fraction": fraction}} if fraction else {})
    raw = {"run": {"output_dir": "x"}, "model": {"path": "m"}}
    raw["tune"] = {"mask": "k", "data": data, "max_steps": 6, "batch_size": batch_size}
    inputs = SimpleNamespace(
        tune=validate(raw).tune,
        tokenizer=SimpleNamespace(pad_token_id=0),
        rows=SimpleNamespace(sequences=ROWS),
        benign=SimpleNamespace(sequences=BENIGN) if fraction else None,
    )
    tracker = Tracker(folder, enabled=False, tensorboard=False, stage="set")
    return Training(inputs, tuner, 0, folder / "checkpoint", tracker, saves)


@pytest.mark.parametrize("may_get_no_gradient", [True, False])
def test_a_first_step_without_a_gradient_is_told(tmp_path: Path, may_get_no_gradient: bool) -> None:
    tuner = CountingTuner()
    tuner.step, tuner.may_get_no_gradient = lambda lr: 0.0, may_get_no_gradient
    loop = training(tmp_path, tuner, SaveClock("auto", 10.0))
    if may_get_no_gradient:
        loop.run()
        assert loop.tracker.remarks == [
            "tune.mask leaves every trained weight without a gradient in the first step: its rows do not reach what "
            "trains"
        ]
        return
    with pytest.raises(UserError, match="tune.mask = k: leaves every trained weight without a gradient"):
        loop.run()
    assert loop.step == 0


def test_a_short_tuning_saves_nothing_until_asked(tmp_path: Path, saved: list[str]) -> None:
    loop = training(tmp_path, CountingTuner(), SaveClock("auto", 10.0))
    loop.run()
    assert saved == []
    loop.save()
    loop.save()
    assert saved == ["checkpoint/6"]
    again = training(tmp_path, CountingTuner(), SaveClock("auto", 10.0))
    again.run()
    assert again.tuner.num_steps == 6 and torch.equal(again.tuner.weight, loop.tuner.weight)
    again.save()  # nothing that is not saved
    assert saved == ["checkpoint/6"]


@pytest.mark.parametrize(("every", "minutes", "steps"), [("auto", 0.0, [1, 2, 3, 4, 5]), (2, 10.0, [2, 4])])
def test_the_last_step_of_tuning_is_not_saved(tmp_path: Path, saved: list[str], every, minutes, steps) -> None:
    training(tmp_path, CountingTuner(), SaveClock(every, minutes)).run()
    assert saved == [f"checkpoint/{step}" for step in steps]


@pytest.mark.parametrize("kill_at", range(6))
def test_tuning_killed_in_any_step_same_bits(tmp_path: Path, saved: list[str], kill_at: int) -> None:
    """Every step takes a minute."""
    watch, whole = Watch(), training(tmp_path / "whole", CountingTuner(), SaveClock("auto", 10.0))
    whole.run()

    def before(step: int) -> None:
        watch.now += MINUTE
        if step == kill_at and not again:
            raise Killed

    again = False
    with pytest.raises(Killed):
        training(tmp_path, CountingTuner(before), SaveClock("auto", 2.0, watch)).run()
    kept = kill_at // 2 * 2
    assert saved[-1:] == ([f"checkpoint/{kept}"] if kept else [])
    again, loop = True, training(tmp_path, CountingTuner(before), SaveClock("auto", 2.0, watch))
    started = watch.now
    loop.run()
    assert (watch.now - started) / MINUTE == 6 - kept
    assert torch.equal(loop.tuner.weight, whole.tuner.weight)


def test_a_signal_saves_tuning(tmp_path: Path, saved: list[str], signal) -> None:
    tuner = CountingTuner(lambda step: signal() if step == 2 else None)
    with pytest.raises(Interrupted):
        training(tmp_path, tuner, SaveClock("auto", 10.0)).run()
    assert saved == ["checkpoint/3"]


def test_a_step_of_other_ranks_is_remarked(tmp_path: Path, saved: list[str]) -> None:
    """Another batch size stands for another number of ranks. A start after a kill, which writes no manifest, says it
    too."""

    def fail(stop: int, step: int) -> None:
        if step == stop:
            raise Killed

    remarks, positions = [], []
    for batch_size, stop in ((1, 2), (2, 4), (2, 9), (4, 9)):
        loop = training(tmp_path, CountingTuner(partial(fail, stop)), SaveClock(1, 10.0), batch_size)
        with suppress(Killed):
            loop.run()
        remarks.append(loop.tracker.remarks)
        positions.append(loop.position)
        loop.save()
    changed = "from step 3 on, a step read 2 rows; before that it read 1"
    assert remarks == [[], [changed], [changed], [changed]]  # the last start makes no step
    assert positions == [2, 2 + 2 * 2, 2 + 4 * 2, 2 + 4 * 2]  # no row is read twice, none is left out


def test_benign_rows_are_those_of_the_order(tmp_path: Path) -> None:
    """Messages name each by its number in its own file."""
    loop = training(tmp_path, CountingTuner(), SaveClock("auto", 10.0), batch_size=12, fraction=0.25)
    (batch,) = loop.micro_batches()
    order = DataOrder(len(ROWS), len(BENIGN), 0.25, 0)
    placed = [order[position] for position in range(12)]
    assert batch == [(is_benign, (BENIGN if is_benign else ROWS)[number]) for is_benign, number in placed]
    assert sum(is_benign for is_benign, _ in placed) == 3
    with pytest.raises(UserError) as caught:
        loop._refuse("loss", {0}, batch)
    names = [f"{'benign row' if is_benign else 'row'} {sequence.row}" for is_benign, sequence in batch]
    assert f"(rank 0: {', '.join(names)})" in caught.value.problem
