"""docs/architectures.md from the results of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from checks import CHECKS

HEAD = """# Which architectures are right

`make sweep` writes this page (tests/sweep/). It builds a tiny random model of every architecture that transformers'
`AutoModelForCausalLM` takes, in float32 on one CPU, and compares what `esi_ds` does with the plain way:

- **units**: every weight of a scored parameter lies in exactly one logical matrix, the same on the meta device;
  embeddings, tied heads and routers are not scored; rows called queries, keys and values, and matrices called gate and
  up, work as such when the layer is run.
- **rows**: logits of a row alone, without a mask, against the same row right-padded beside another one, or by itself
  where a probe says that rows depend on one another. Models that are not causal are refused.
- **loading**: weights and logits of the model loaded under ZeRO-3 against plain `from_pretrained`, and the names of its
  export against those of the folder.
- **answers**: generated answers of a batch, where a probe allows one, against greedy decoding of each row alone
  without a cache.
- **scores**: ESI of the shipped stage, batches of two, against the slow oracle's gradient times the matrix's σ.

| verdict | meaning |
| --- | --- |
| right | both ways agree |
| unknown | `esi_ds` warns that it does not know some parameters, or transformers alone cannot run the tiny model |
| refused | `esi_ds` stops with a message on what to do, also before what would be wrong |
| fails | something else stops the run |
| wrong | the run goes on, with wrong numbers or names |

A tiny model shows what an architecture's code does, not what a checkpoint holds: other settings of the same
architecture may take other paths.
"""


def page(rows: Mapping[tuple[str, int], Mapping[str, str]]) -> str:
    """The page in Markdown, from {(architecture, ranks): row}."""
    single = {name: row for (name, ranks), row in sorted(rows.items()) if ranks == 1}
    several = {name: row for (name, ranks), row in sorted(rows.items()) if ranks > 1}
    all_right = sum(words(row) == {"right"} for row in single.values())
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "deepspeed"))
    counts = [sum(word(row[check]) == "right" for row in single.values()) for check in CHECKS]
    lines = [
        HEAD,
        f"{len(single)} architectures, {all_right} right in every column ({versions}). {on_two_ranks(several)}\n",
        table_line("architecture", *CHECKS),
        table_line(*["---"] * (len(CHECKS) + 1)),
        *(table_line(name, *(word(row[check]) for check in CHECKS)) for name, row in single.items()),
        table_line("**right**", *map(str, counts)),
        "\n## Wrong, refused or failing\n",
        *(f"- **{name}**: {reasons(row)}" for name, row in single.items() if words(row) - {"right", "unknown"}),
        "\n## Unknown\n",
        *(f"- **{name}**: {reasons(row)}" for name, row in single.items() if words(row) in KNOWN_GAPS),
    ]
    return "\n".join(lines) + "\n"


KNOWN_GAPS = ({"unknown"}, {"right", "unknown"})


def table_line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def word(verdict: str) -> str:
    return verdict.partition(":")[0]


def words(row: Mapping[str, str]) -> set[str]:
    return {word(row[check]) for check in CHECKS}


def on_two_ranks(rows: Mapping[str, Mapping[str, str]]) -> str:
    """A sentence on the architectures that were loaded and scored on several ranks."""
    collective = ("loading", "answers", "scores")
    right = [name for name, row in rows.items() if all(word(row[check]) == "right" for check in collective)]
    others = [f"{name} ({reasons(row)})" for name, row in rows.items() if name not in right]
    sentence = f"Loading, answers and scores are also right on two ranks for {', '.join(right) or 'none'}."
    return sentence + (f" They are not for {'; '.join(others)}." if others else "")


def reasons(row: Mapping[str, str]) -> str:
    """The verdicts that are not "right", each reason once, with the checks that it stands for."""
    checks_of: dict[str, list[str]] = {}
    for check in CHECKS:
        if word(row[check]) != "right":
            checks_of.setdefault(row[check], []).append(check)
    return "; ".join(f"*{', '.join(names)}* {escaped(verdict)}" for verdict, names in checks_of.items())


def escaped(verdict: str) -> str:
    """Markdown would take underscores and stars in names for emphasis."""
    for character in "\\_*|<[":
        verdict = verdict.replace(character, f"\\{character}")
    return verdict
