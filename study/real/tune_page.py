"""The sections of real.md on SET, SPA and noise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from esi_ds.data.rows import Row
from study.real import plots
from study.real.grid import REFERENCE
from study.real.tune_cells import CHOOSE, REPORT, TASKS
from study.real.tune_results import MEASURES, best_rate, is_at_end, is_open
from study.real.tune_tests import TASK_SHARE
from study.tables import NOT_RUN, points, table

CELL = re.compile(r"(.+?)-([\d.]+(?:e[-+]?\d+)?)-s(\d+)")  # of a tuned model: what is tuned how, rate, seed
CHOOSING = ("not refused", "over-refused", "incoherent, benign")  # what a learning rate is chosen by


def interval(values: Sequence[float] | None) -> str:
    """A rate in per cent with its interval."""
    if values is None:
        return NOT_RUN
    rate, low, high = values[:3]
    return f"{100 * rate:.1f}" if low is None else f"{100 * rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def measures_of(row: Row, part: str = REPORT) -> list[str]:
    """A row's cells of the columns of ``MEASURES``; KL in nats a token."""
    cells = []
    for column in MEASURES:
        values = row.get(part, {}).get(column)
        is_nats = column == "KL" and values is not None
        cells.append(f"{values[0]:.3f}" if is_nats else interval(values))
    return cells


def sizes(data: Mapping[str, Any]) -> str:
    """How many prompts and answers the rates are of."""
    settings = data["settings"]
    return (
        f"Rates in per cent with 95 % intervals (Wilson), on the {settings['report']} harmful prompts of StrongREJECT "
        "and as many safe ones of XSTest's second half that are reported (KL: nats a token). Learning rates are chosen "
        f"on up to {settings['choose']} prompts each of HarmBench and of XSTest's first half: the best is the one at "
        "which the larger of two shares is smallest, harmful requests not refused and benign ones lost (over-refused "
        "or incoherent). Answers are greedy, of at most "
        f"{settings['answer_tokens']} tokens. Loss: nats a token of right answers to held-out questions.\n"
    )


def unfinished(data: Mapping[str, Any], part: str) -> list[str]:
    """Names, without the part, of its cells that have not finished; not of those that finished ones may never ask
    for."""
    return [
        row["cell"].removeprefix(f"{part}/")
        for row in data["cells"]
        if row["cell"].startswith(f"{part}/") and row["state"] != "done" and "only_if" not in row
    ]


def rates_not_run(data: Mapping[str, Any], part: str) -> dict[str, str]:
    """What is tuned how → the learning rates of ``unfinished`` cells, rising, with seeds besides the first."""
    rates: dict[str, list[tuple[float, str]]] = {}
    for cell in unfinished(data, part):
        match = CELL.fullmatch(cell)
        assert match is not None, cell
        name, rate, seed = match.groups()
        further = "" if int(seed) == data["settings"]["seeds"][0] else f" (seed {seed})"
        rates.setdefault(name, []).append((float(rate), rate + further))
    return {name: ", ".join(text for _, text in sorted(several)) for name, several in rates.items()}


def losses(row: Row, tasks: Sequence[str]) -> list[str]:
    """A row's cells of losses."""
    return [f"{row['loss'][task]:.3f}" if task in row.get("loss", {}) else NOT_RUN for task in tasks]


def base_of(data: Mapping[str, Any], number: int) -> Row:
    """The aligned (0) or the untouched (1) model as it is; empty where it was not measured."""
    return next((row for row in data["base"] if row["model"] == data["models"][number]), {})


def mark_of(data: Mapping[str, Any], method: str, rate: float) -> str:
    """What is to be said of a rate at which a method is shown: that its range does not bracket it, or not yet."""
    rates = data["rates"][method]
    if is_at_end(rate, rates):
        return " (end)"
    return " (open)" if is_open(data["set"], method, data["settings"]["seeds"][0], rate, rates) else ""


def open_rates(data: Mapping[str, Any]) -> str:
    """Which of the compared rates are not bracketed; empty where all are."""
    tests = data["set_tests"]
    compared = {(test["method"], test["rates"][0]) for test in tests} | {
        (test["against"], test["rates"][1]) for test in tests
    }
    marked = [
        f"{method} {rate:g}{mark}"
        for method in data["rates"]
        for rate in data["rates"][method]
        if (method, rate) in compared and (mark := mark_of(data, method, rate))
    ]
    return f"Compared at rates that their range does not bracket: {', '.join(marked)}.\n" if marked else ""


def agreement_section(data: Mapping[str, Any]) -> list[str]:
    """Least and greatest kappa of every pair of judges over the evaluations; of figures that were collected without
    them, that they are not there."""
    title = "## Do the judges of tuned models agree?\n"
    if "agreements" not in data:
        return [title, "Not kept.\n"]
    pairs: dict[tuple[str, str], list[Row]] = {}
    for row in data["agreements"]:
        pairs.setdefault((row["first"], row["second"]), []).append(row)
    lines = []
    for judges, rows in pairs.items():
        kappas = [row["kappa"] for row in rows if row["kappa"] is not None]
        ends = [f"{end(kappas):.2f}" if kappas else "undefined" for end in (min, max)]
        answers = sorted({row["num_pairs"] for row in rows})
        lines.append([" and ".join(judges), *ends, str(len(rows)), " or ".join(map(str, answers))])
    head = ["judges", "least κ", "greatest κ", "evaluations", "answers each"]
    about = "Cohen's kappa over the answers to harmful requests, of the model as it is and of the tuned one.\n"
    return [title, about, table(head, lines)] if lines else [title, f"{NOT_RUN}\n"]


def set_section(data: Mapping[str, Any]) -> list[str]:
    """Every method at its best rate, then all rates."""
    tasks = ("gsm8k", "medquad")
    head = [*MEASURES, *(f"loss, {task}" for task in tasks)]
    base = base_of(data, 1)
    lines = [["as it comes", "–", "–", *measures_of(base), *losses(base, tasks)]]
    seeds = data["settings"]["seeds"]
    for method in data["rates"]:
        best = best_rate(data["set"], method, seeds[0])
        chosen = [row for row in data["set"] if row["method"] == method and row["lr"] == best]
        for row in sorted(chosen, key=lambda row: row["seed"]):
            rate = f"{row['lr']:g}{mark_of(data, method, row['lr'])}"
            lines.append([method, str(row["seed"]), rate, *measures_of(row), *losses(row, tasks)])
        if not chosen:
            lines.append([method, "–", "–", *[NOT_RUN] * len(head)])
    rows = sorted(data["set"], key=lambda row: (list(data["rates"]).index(row["method"]), row["lr"], row["seed"]))
    every = []
    for row in rows:
        choosing = [interval(row[CHOOSE].get(column)) for column in CHOOSING]
        facts = [row["method"], f"{row['lr']:g}", str(row["seed"])]
        every.append([*facts, *choosing, *measures_of(row), f"{row['seconds']:.0f}"])
    missing = [NOT_RUN] * (len(CHOOSING) + len(MEASURES))
    every += [[method, rates, str(seeds[0]), *missing, "–"] for method, rates in rates_not_run(data, "set").items()]
    choose = [f"{column}, choosing" for column in CHOOSING]
    return [
        "## SET: learning to refuse\n",
        sizes(data) + "\nEvery method at its best learning rate; `(end)`: the best is an end of its range; "
        "`(open)`: a rate beside it has not been run, and may be better.\n",
        table(["method", "seed", "rate", *head], lines),
        "![SET](real-set.png)\n" if rows else "",
        "Each method is compared with ESI, or with the method that is named, prompt by prompt: both at their best "
        "rates, and both at the rate that refuses most within a limit of benign requests lost. Rates are chosen on the "
        "prompts for choosing. Points: the method's rate less the other's on the reported prompts. A prompt counts "
        "once, whatever the number of seeds (sign test); p by Holm over the rows with two seeds or more. Within one "
        "limit over-refusal may differ, so read both measures.\n",
        set_tests(data["set_tests"]),
        open_rates(data),
        "All learning rates.\n",
        table(["method", "rate", "seed", *choose, *MEASURES, "seconds"], every) if every else f"{NOT_RUN}\n",
    ]


def outcome(test: Row) -> list[str]:
    """A paired test's last cells: seeds, prompts, the difference in points, Holm's p and the verdict."""
    p = "–" if test["p_holm"] is None else "< 0.001" if test["p_holm"] < 0.001 else f"{test['p_holm']:.3f}"
    difference = points(test["difference"]) if test["num_pairs"] else "–"
    return [str(test["seeds"]), str(test["num_pairs"]), difference, p, test["verdict"]]


OUTCOME = ["seeds", "prompts", "points", "p", "verdict"]


def set_tests(tests: Sequence[Row]) -> str:
    """Every method against ESI, or the one that is named, under every rule, a line each."""
    lines = []
    for test in tests:
        rates = " / ".join("none" if rate is None else f"{rate:g}" for rate in test["rates"])
        other = "" if test["against"] == REFERENCE else f" against {test['against']}"
        lines.append([f"{test['method']}{other}", ", ".join(test["rules"]), rates, test["measure"], *outcome(test)])
    head = ["method", "chosen by", "rates, method / other", "measure", *OUTCOME]
    return table(head, lines) if lines else f"{NOT_RUN}\n"


def spa_tests(tests: Sequence[Row]) -> str:
    """Every frozen mask against what it is compared with, a line each."""
    lines = [[test["task"], test["method"], test["rival"], test["measure"], *outcome(test)] for test in tests]
    return table(["task", "frozen", "against", "measure", *OUTCOME], lines) if lines else f"{NOT_RUN}\n"


def spa_section(data: Mapping[str, Any]) -> list[str]:
    """Every task, frozen mask and rate."""
    head = ["task", "frozen", "rate", "right, %", "loss", *MEASURES, "seconds"]
    base = base_of(data, 0)
    lines = [[task, "not tuned", "–", "–", *losses(base, (task,)), *measures_of(base), "–"] for task in TASKS]
    for row in data["spa"]:
        loss = f"{next(iter(row['loss'].values())):.3f}"
        first = [row["task"], row["frozen"], f"{row['lr']:g}", interval(row["accuracy"]), loss]
        lines.append([*first, *measures_of(row), f"{row['seconds']:.0f}"])
    missing = [NOT_RUN] * (2 + len(MEASURES))
    lines += [[*name.split("/"), rates, *missing, "–"] for name, rates in rates_not_run(data, "spa").items()]
    return [
        "## SPA: keeping safety\n",
        "Tuning of the aligned twin with a mask frozen. kinds: which kind of question one of MedQuAD is; gsm8k; "
        "medical: PubMedQA's question and conclusion, yes, no or maybe; poisoned: kinds with a tenth of harmful "
        "requests that are complied with. Right and loss: held-out questions; the other columns as for SET.\n",
        table(head, lines),
        "![SPA](real-spa.png)\n" if spa_points(data) else "",
        f"At equal task score: only rates count at which the held-out loss falls by at least {100 * TASK_SHARE:g} % "
        "of the most that it falls with nothing frozen (this is the reported loss: no rows are kept for this choice "
        "alone). Of these, each mask has the rate that keeps most refusals of the prompts for choosing; prompt by "
        "prompt, as for SET.\n",
        spa_tests(data["spa_tests"]),
    ]


def noise_section(data: Mapping[str, Any]) -> list[str]:
    """Every point of the curves."""
    keys = ("sampling", "mask", "measure", "judge", "set", "order", "noise")
    rows = sorted(data["noise"], key=lambda row: [row[key] for key in keys])
    lines = [
        [*(str(row[key]) for key in keys), interval([row["rate"], row["low"], row["high"]]), str(row["n"])]
        for row in rows
        if row["rate"] is not None
    ]
    drawn = bool(lines)
    for cell in unfinished(data, "noise"):
        sampling, _, mask = cell.partition("-")
        mask = mask.replace("-", " ").replace(" more", ", more noise") or "esi"
        lines.append([sampling, mask, *["–"] * (len(keys) - 2), NOT_RUN, "–"])
    return [
        "## Noise on the weights\n",
        "Noise N(0, (c·σ)²) is put on as many weights as the mask has: those with the highest scores, random ones, "
        "those with the lowest scores, or those of a control's mask. The column noise has c; 0 is the twin as it is.\n",
        table([*keys, "%", "n"], lines) if lines else f"{NOT_RUN}\n",
        "![noise](real-noise.png)\n" if drawn else "",
    ]


def spa_points(data: Mapping[str, Any]) -> list[Row]:
    """Rows of SPA with a task score; tasks whose answers were not asked for have a loss alone."""
    return [row for row in data["spa"] if row["accuracy"] is not None and "not refused" in row[REPORT]]


def figures(data: Mapping[str, Any]) -> dict[str, Figure]:
    """File name → figure of these sections."""
    drawn = {}
    first = data["settings"]["seeds"][0]
    rows = [row for row in data["set"] if row["seed"] == first]
    if rows:
        curves = {name: sorted((row for row in rows if row["method"] == name), key=lambda row: row["lr"])
                  for name in data["rates"]}  # fmt: skip
        drawn["real-set.png"] = plots.frontier({name: part for name, part in curves.items() if part})
    if kept := spa_points(data):
        drawn["real-spa.png"] = plots.spa(kept, base_of(data, 0).get(REPORT, {}).get("not refused"))
    points = [row for row in data["noise"] if row["measure"] == "attack_success" and row["judge"] == "words"]
    if points:
        drawn["real-noise.png"] = plots.noise(points)
    return drawn
