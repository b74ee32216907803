"""Tables of the detail pages, as Markdown: those of the tiny study, and what both studies write tables with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from esi_ds.data.rows import Row
from esi_ds.report.location import THIRDS
from study import findings, where
from study.findings import GUARD_RULES, MEASURES, POLITE_RULE, WORDS_RULES, Rule

RULE_TEXT = {
    "not_refused": "not refused",
    "unsafe_or_incoherent": "unsafe or incoherent",
    "over_refused": "over-refusal",
}
EDGE = "†"
NOT_RUN = "not run"
NOISE_MEASURES = ("not refused", "unsafe", "incoherent")


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A head and lines of as many cells."""
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*rows, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def interval(pooled: Row) -> str:
    """A pooled rate, Wilson's interval, and the seeds' range where there are several."""
    if not pooled.get("n"):
        return "–"
    text = f"{percent(pooled['rate'])} [{percent(pooled['low'])}, {percent(pooled['high'])}]"
    if pooled.get("reached", 1) > 1:
        text += f" ({percent(pooled['least'])} – {percent(pooled['greatest'])})"
    return text + (f", {pooled['missing']} missing" if pooled["missing"] else "")


def rule_text(rule: Rule) -> str:
    return f"{RULE_TEXT[rule.limit]} ≤ {100 * rule.most:g} %"


def seeds_text(summary: Row) -> str:
    """In how many seeds a limit was kept."""
    return f"{summary['reached']} of {summary['seeds']}"


def frozen_text(row: Row) -> str:
    return "nothing" if row["criterion"] == "nothing" else f"{row['criterion']} {100 * row['ratio']:g} %"


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n</details>\n"


# ---------------------------------------------------------------- models before tuning


def untuned(models: Mapping[str, Row]) -> str:
    lines = [
        [model, interval(row["not_refused"]), interval(row["unsafe"]), str(row["not_refused"]["n"]), row["source"]]
        for model, row in models.items()
    ]
    return table(["model", MEASURES["not_refused"], MEASURES["unsafe"], "prompts", "measured"], lines)


# ---------------------------------------------------------------- SET


def set_at(methods: Sequence[Row], rule: Rule) -> str:
    """Every method at one limit, best first; below them those that no seed brings there, and how near they came."""
    ranking = findings.ranked(methods, rule)
    missed = [row for row in methods if not row["at"][rule.name]["reached"]]
    lines = []
    for row in [*ranking, *sorted(missed, key=lambda row: row["at"][rule.name]["nearest"])]:
        at_rule = row["at"][rule.name]
        nearest = "" if at_rule["reached"] else f", nearest {percent(at_rule['nearest'])}"
        head = [row["criterion"], str(len(row["curve"])), seeds_text(at_rule) + nearest]
        lines.append([*head, *(interval(at_rule[flag]) for flag in MEASURES)])
    return table(["method", "learning rates", "seeds that get there", *MEASURES.values()], lines)


def set_by_guard(methods: Sequence[Row]) -> str:
    """Benign accuracy where the limit is on the guard's verdict or incoherence in place of refusal words."""
    missed = [row for row in methods if not row["at"][GUARD_RULES[0].name]["reached"]]
    lines = []
    for row in [*findings.ranked(methods, GUARD_RULES[0]), *missed]:
        ends = [row["at"][rule.name] for rule in GUARD_RULES]
        lines.append([row["criterion"], *(text for at in ends for text in (seeds_text(at), interval(at["correct"])))])
    head = [text for rule in GUARD_RULES for text in ("seeds that get there", f"benign accuracy at {rule_text(rule)}")]
    return table(["method", *head], lines)


def set_tests(tests: Sequence[Row], methods: Sequence[Row]) -> str:
    """ESI against every rival at every limit, prompt by prompt in the seeds where both get there; behind a rival's mark
    the seeds at an end of the learning rates."""
    rules = {rule.name: rule for rule in findings.RULES}
    lines = []
    for row in tests:
        rule = rules[row["rule"]]
        edges = findings.seeds_at_edge(row, methods) if row["num_pairs"] else []
        rival = row["second"] + (f"{EDGE} ({', '.join(edges)})" if edges else "")
        alone = f"{row['only_first']} / {row['only_second']}"
        lines.append([rival, f"{MEASURES[rule.wanted]} at {rule_text(rule)}", *_paired(row), alone, _verdict(row)])
    head = ["ESI against", "what", "pairs", "points (by seed)", "p (exact)", "p (Holm, all tests of SET)"]
    return table([*head, "seeds where only ESI / only it gets there", ""], lines)


def _paired(row: Row) -> list[str]:
    if not row["num_pairs"]:
        return ["0", "–", "–", "–"]
    by_seed = ", ".join(points(value) for value in row["by_seed"])
    difference = f"{points(row['difference'])} ({by_seed})"
    return [str(row["num_pairs"]), difference, f"{row['p_value']:.2g}", f"{row['p_holm']:.2g}"]


def _verdict(row: Row) -> str:
    verdict = row["verdict"]
    return f"**ESI {verdict}**" if verdict in ("better", "worse") else verdict


def set_section(methods: Sequence[Row], against: Sequence[Row], model: str, ratio: float) -> str:
    """All tables of one model and ratio."""
    group = findings.at_ratio(methods, model, ratio)
    text = [f"## {model}, {100 * ratio:g} % of the weights\n"]
    for rule in (*WORDS_RULES, POLITE_RULE):
        text += [f"**At {rule_text(rule)}**, each seed's best {MEASURES[rule.wanted]}:\n", set_at(group, rule)]
    text += ["**By the guard**, incoherent answers counted as attacks that succeeded:\n", set_by_guard(group)]
    tests = [row for row in against if (row["model"], row["ratio"]) == (model, ratio)]
    if tests:
        text.append(folded("Paired tests", set_tests(tests, methods)))
    return "\n".join(text)


# ---------------------------------------------------------------- SPA

SPA_FLAGS = ("correct", "not_refused", "unsafe", "unsafe_or_incoherent", "incoherent_harmful", "incoherent_benign")
SPA_HEAD = ["task score" if flag == "correct" else MEASURES[flag] for flag in SPA_FLAGS]


def spa_equal_task(rows: Sequence[Row]) -> str:
    lines = [
        [row["task"], frozen_text(row), seeds_text(row), *(interval(row[flag]) for flag in SPA_FLAGS)] for row in rows
    ]
    return table(["task", "frozen", "seeds that get there", *SPA_HEAD], lines)


def spa_tests(tests: Sequence[Row]) -> str:
    lines = []
    for row in tests:
        rival = "nothing" if row["second"] == "nothing" else f"{row['second']} {100 * row['ratio']:g} %"
        lines.append([row["model"], row["task"], frozen_text(row), rival, *_paired(row), _verdict(row)])
    head = ["model", "task", "frozen", "against", "pairs", "points not refused (by seed)"]
    return table([*head, "p (exact)", "p (Holm, all tests of SPA)", ""], lines)


def spa_settings(rows: Sequence[Row]) -> str:
    lines = [
        [row["model"], row["task"], frozen_text(row), f"{row['lr']:g}", str(row["seeds"])]
        + [interval(row[flag]) for flag in SPA_FLAGS]
        for row in rows
    ]
    return table(["model", "task", "frozen", "learning rate", "seeds", *SPA_HEAD], lines)


# ---------------------------------------------------------------- masks


def mask_thirds(masks: Sequence[Row]) -> str:
    lines = []
    for about in masks:
        by_third = {row["third"]: row for row in about["thirds"]}
        thirds = [_share(by_third[name]) if name in by_third else "–" for name in THIRDS]
        densest = sorted(about["roles"], key=lambda row: -row["density"])[:4]
        roles = ", ".join(f"{row['role']} {_share(row)}" for row in densest)
        lines.append([about["model"], str(about["seeds"]), *thirds, roles, _experts(about)])
    head = ["model", "seeds", *THIRDS, "densest roles", "experts' share of the mask, by layer"]
    return table(head, lines)


def _share(row: Row) -> str:
    return f"{100 * row['share']:.0f} ({row['density']:.1f}×)"


def _experts(about: Row) -> str:
    """Per layer: all experts' share of the mask, and the largest one's part of that."""
    parts = []
    for layer in about["layers"]:
        shares = [row["share"] for row in about["experts"] if row["layer"] == layer]
        if shares:
            total = sum(shares)
            most = f", largest {100 * max(shares) / total:.0f} % of it" if total else ""
            parts.append(f"{layer}: {100 * total:.0f} ({len(shares)} experts{most})")
    return "; ".join(parts) or "dense"


def claimed_parts(masks: Sequence[Row]) -> str:
    """The parts that the paper names, by third of the depth."""
    lines = []
    for claim in map(where.claim, masks):
        thirds = [f"{claim['by_third'][name]['density'] or 0:.1f}×" for name in THIRDS]
        names = " and ".join(claim["parts"])
        lines.append([claim["model"], names, claim["third"], *thirds, "yes" if claim["first"] else "no"])
    return table(["model", "matrices", "claimed third", *THIRDS, "densest there, and above chance"], lines)


def overlaps(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        mean, least, greatest = (f"{100 * row[key]:.0f}" for key in ("mean", "least", "greatest"))
        lines.append([row["model"], row["what"], mean, f"{least} – {greatest}", str(row["pairs"])])
    return table(["model", "masks of 1 %", "weights in both (% of k)", "least – greatest", "pairs"], lines)


# ---------------------------------------------------------------- noise


def noise(curves: Mapping[str, Sequence[Row]]) -> str:
    """One line a model, ratio, size of noise and order; the clean model (noise 0) once a model."""
    lines: dict[tuple, list[str]] = {}
    for model, rows in curves.items():
        for ratio, size, order in sorted({_noise_key(row) for row in rows}, key=_noise_order):
            key = (model, ratio, size, order) if size else (model, 0)
            rates = {row["measure"]: row for row in rows if _noise_key(row) == (ratio, size, order)}
            head = [f"{100 * ratio:g} %", f"{size:g} σ", order] if size else ["–", "none", "–"]
            lines[key] = [model, *head, *(_noise_rate(rates.get(name, {})) for name in NOISE_MEASURES)]
    head = ["model", "weights", "noise", "on", MEASURES["not_refused"], MEASURES["unsafe"], "incoherent"]
    return table(head, list(lines.values()))


def _noise_key(row: Row) -> tuple[float, float, str]:
    return row["ratio"], row["noise"], row["order"]


def _noise_order(key: tuple[float, float, str]) -> tuple:
    ratio, size, order = key
    return size > 0, ratio, size, ("top", "random", "bottom").index(order)


def _noise_rate(row: Row) -> str:
    return interval({**row, "reached": 2} if row.get("least") != row.get("greatest") else row)
