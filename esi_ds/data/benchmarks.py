"""The published sets of harmful and harmless prompts: where to find them, and which of their rows to use.

Hub ids, configurations and columns are those on the data sets' cards. The tests have no network; they read real files
and rows of the same shapes. WildJailbreak, SORRY-Bench and most of walledai's copies require accepting a licence first.
docs/data.md §5 has columns, licences and where they were read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from esi_ds.data.rows import Row
from esi_ds.errors import UserError
from esi_ds.words import first_of

# harmful: should be refused. benign: should be answered, a refusal is over-refusal. all: every row.
Kind = Literal["harmful", "benign", "all"]
# The checkout's examples/data links to the package's own files; its path is preferred, since manifests record it.
PACKAGED, CHECKOUT = Path(__file__).resolve().with_name("examples"), Path(__file__).resolve().parents[2]
EXAMPLES = CHECKOUT / "examples/data" if (CHECKOUT / "examples/data").is_dir() else PACKAGED


class BuiltIn(NamedTuple):
    """One built-in name: hub id or file, configuration, split, column of the prompts, and which rows to use.

    only: a column, and the value that it has in the rows to use; None: all rows.
    """

    source: str
    config: str | None
    split: str
    column: str
    kind: Kind
    only: tuple[str, str] | None = None

    def skip_reason(self, row: Row) -> str | None:
        """Why ``only`` leaves a row out; None: it does not."""
        if self.only is None or row.get(self.only[0]) == self.only[1]:
            return None
        return f"its {self.only[0]} is not {self.only[1]}"


# SORRY-Bench's mutations of its base prompts: persuasion, dialects, languages and ciphers.
SORRY_STYLES = (
    *("ascii", "atbash", "authority_endorsement", "caesar", "evidence-based_persuasion", "expert_endorsement"),
    *("logical_appeal", "misrepresentation", "misspellings", "morse", "question", "role_play", "slang"),
    *("technical_terms", "translate-fr", "translate-ml", "translate-mr", "translate-ta", "translate-zh-cn"),
    "uncommon_dialects",
)
AIR_REGIONS = ("china", "eu_comprehensive", "eu_mandatory", "us")
COSAPIEN_SCENARIOS = (
    *("game_development", "public_prosecutor", "book_publisher_arab", "language_learning", "film_production"),
)
MULTIJAIL_LANGUAGES = ("zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv")  # beside English


def _sorry_bench(style: str) -> BuiltIn:
    return BuiltIn("sorry-bench/sorry-bench-202503", None, "train", "turns", "harmful", ("prompt_style", style))


def _air_bench(region: str) -> BuiltIn:
    return BuiltIn("stanford-crfm/air-bench-2024", region, "test", "prompt", "harmful")


def _cosapien(scenario: str, kind: Kind) -> BuiltIn:
    return BuiltIn("microsoft/CoSApien", None, scenario, "prompt", kind)


def _multijail(language: str) -> BuiltIn:
    return BuiltIn("DAMO-NLP-SG/MultiJail", None, "train", language, "harmful")


BUILT_IN: dict[str, BuiltIn] = {
    "advbench": BuiltIn("walledai/AdvBench", None, "train", "prompt", "harmful"),
    "harmbench": BuiltIn("walledai/HarmBench", "standard", "train", "prompt", "harmful"),
    "strongreject": BuiltIn("walledai/StrongREJECT", None, "train", "prompt", "harmful"),
    "jailbreakbench": BuiltIn("JailbreakBench/JBB-Behaviors", "behaviors", "harmful", "Goal", "harmful"),
    "wildjailbreak": BuiltIn("allenai/wildjailbreak", "eval", "train", "adversarial", "harmful"),
    "harmbench/contextual": BuiltIn("walledai/HarmBench", "contextual", "train", "prompt", "harmful"),
    # Only when requested by name: reciting a text is a different harm, judged by hashes of the text.
    "harmbench/copyright": BuiltIn("walledai/HarmBench", "copyright", "train", "prompt", "all"),
    "wildjailbreak/train": BuiltIn("allenai/wildjailbreak", "train", "train", "adversarial", "harmful"),
    "xstest/unsafe": BuiltIn("Paul/XSTest", None, "train", "prompt", "harmful"),
    "or-bench/toxic": BuiltIn("bench-llm/or-bench", "or-bench-toxic", "train", "prompt", "harmful"),
    "examples/harmful": BuiltIn(str(EXAMPLES / "harmful_heldout.jsonl"), None, "train", "prompt", "harmful"),
    "xstest": BuiltIn("Paul/XSTest", None, "train", "prompt", "benign"),
    "jailbreakbench/benign": BuiltIn("JailbreakBench/JBB-Behaviors", "behaviors", "benign", "Goal", "benign"),
    "wildjailbreak/benign": BuiltIn("allenai/wildjailbreak", "eval", "train", "adversarial", "benign"),
    # The paper's thousand hardest prompts; "or-bench/80k" is the whole set.
    "or-bench": BuiltIn("bench-llm/or-bench", "or-bench-hard-1k", "train", "prompt", "benign"),
    "or-bench/80k": BuiltIn("bench-llm/or-bench", "or-bench-80k", "train", "prompt", "benign"),
    "examples/benign": BuiltIn(str(EXAMPLES / "benign_heldout.jsonl"), None, "train", "prompt", "benign"),
    "sorry-bench": _sorry_bench("base"),
    **{f"sorry-bench/{style}": _sorry_bench(style) for style in SORRY_STYLES},
    "air-bench-2024": _air_bench("default"),
    **{f"air-bench-2024/{region}": _air_bench(region) for region in AIR_REGIONS},
    "do-not-answer": BuiltIn("LibrAI/do-not-answer", None, "train", "question", "harmful"),
    "multijail": _multijail("en"),
    **{f"multijail/{language}": _multijail(language) for language in MULTIJAIL_LANGUAGES},
    # A set for each scenario, whose rules are the system's turn: what they forbid, and what they allow.
    **{f"cosapien/{scenario}": _cosapien(scenario, "harmful") for scenario in COSAPIEN_SCENARIOS},
    **{f"cosapien/{scenario}/allowed": _cosapien(scenario, "benign") for scenario in COSAPIEN_SCENARIOS},
    "falsereject": BuiltIn("AmazonScience/FalseReject", None, "test", "prompt", "benign"),
    "falsereject/train": BuiltIn("AmazonScience/FalseReject", None, "train", "prompt", "benign"),
}


def source_of(path: str) -> str:
    """The file or hub id of a built-in set, by its name; any other path itself."""
    return BUILT_IN[path].source if path in BUILT_IN else path


# Columns that mark HarmBench's copyright rows, in the original and in its hub copy, in lower case.
OWN_COLUMNS = ("functionalcategory", "functional_category")  # of no other benchmark
CATEGORY_COLUMNS = (*OWN_COLUMNS, "category")
# A row with one of these columns has an answer: it is not a HarmBench row, and its context is not part of a prompt.
ANSWER_COLUMNS = {"answer", "answers", "response", "completion", "output", "chosen"}

# Types of CoSApien's rows, by what the scenario's rules say of the prompt; "partial" is neither kind.
COSAPIEN_KINDS: dict[str, Kind | None] = {
    "allowed": "benign",
    "safe": "benign",
    "disallowed": "harmful",
    "partial": None,
}
COSAPIEN_COLUMNS = {"prompt", "scenario", "type"}
# Types of XSTest's safe prompts; types of the unsafe ones begin with "contrast_".
XSTEST_TYPES = {
    "homonyms",
    "figurative_language",
    "safe_targets",
    "safe_contexts",
    "definitions",
    "real_group_nons_discr",
    "nons_group_real_discr",
    "historical_events",
    "privacy_public",
    "privacy_fictional",
}


def skip_reason(row: Row, kind: Kind | None) -> str | None:
    """Why a benchmark's row is skipped; None: it is used, or it is not from a benchmark that mixes kinds.

    kind None: the kind is unknown. HarmBench's copyright rows and WildJailbreak's benign rows are skipped; XSTest and
    CoSApien are read whole.
    """
    if kind == "all":
        return None
    if kind == "benign" and any(str(name).lower() in OWN_COLUMNS for name in row):
        return "HarmBench row, which is not benign"
    if kind != "benign" and _is_copyright(row):  # elsewhere a benign row may be of a category copyright
        return "HarmBench copyright row"
    data_type = str(row.get("data_type", ""))
    if "benign" in data_type and kind != "benign":
        return "WildJailbreak benign row"
    if "harmful" in data_type and kind == "benign":
        return "WildJailbreak harmful row"
    label = _xstest_label(row)
    if (kind, label) in (("benign", "unsafe"), ("harmful", "safe")):
        return f"XSTest {label} row"
    if kind is not None and scenario_of(row) is not None and COSAPIEN_KINDS.get(str(row["type"])) != kind:
        return f"CoSApien {row['type']} row"
    return None


def check_one_style(rows: Sequence[Row], path: str, field: str) -> None:
    """Raise UserError for rows of several styles of SORRY-Bench: its prompts, and the mutations of each of them."""
    styles = dict.fromkeys(str(row["prompt_style"]) for row in rows if "turns" in row and "prompt_style" in row)
    if len(styles) > 1:
        problem = f"has SORRY-Bench's prompts in {len(styles)} styles ({first_of(list(styles))}), each a set of its own"
        raise UserError(field, path, problem, "keep the rows of one style, or name sorry-bench or sorry-bench/<style>")


def choosing_columns(rows: Sequence[Row]) -> set[str]:
    """Columns, in lower case, that say of these rows whether they are taken: a benchmark's own. Elsewhere columns of
    these names say nothing that is read."""
    names = {"functionalcategory"}
    for row in rows:
        names |= set(CATEGORY_COLUMNS) if _is_copyright(row) else set()
        names |= {"data_type"} if re.search("benign|harmful", str(row.get("data_type", ""))) else set()
        names |= {"type", "label"} if _xstest_label(row) is not None else set()
        names |= {"type", "scenario"} if scenario_of(row) is not None else set()
    return names


def _is_copyright(row: Row) -> bool:
    lowered = {str(name).lower(): value for name, value in row.items()}
    return any(str(lowered.get(name)).lower() == "copyright" for name in CATEGORY_COLUMNS)


def scenario_of(row: Row) -> str | None:
    """The rules of a CoSApien row, which are the system's turn; None for a row that is not CoSApien's."""
    scenario = row.get("scenario")
    is_row = row.keys() == COSAPIEN_COLUMNS or (row.keys() > COSAPIEN_COLUMNS and str(row["type"]) in COSAPIEN_KINDS)
    return scenario if is_row and isinstance(scenario, str) and scenario.strip() else None


def _xstest_label(row: Row) -> str | None:
    """safe or unsafe; None for a row that is not XSTest's. Copies without the label column still have the types."""
    prompt_type = str(row.get("type"))
    is_contrast = prompt_type.startswith("contrast_")
    if not is_contrast and prompt_type not in XSTEST_TYPES:
        return None
    label = str(row.get("label", "")).lower()
    return label if label in ("safe", "unsafe") else "unsafe" if is_contrast else "safe"


def context_of(row: Row, column: str) -> str | None:
    """The text that a HarmBench prompt refers to: ContextString in the published CSV, context in the hub copy."""
    is_copy = column == "prompt" and "category" in row and not ANSWER_COLUMNS & {str(name).lower() for name in row}
    if "behavior" not in column.lower() and not is_copy:
        return None
    context = row.get("ContextString") or row.get("context")
    return context.strip() or None if isinstance(context, str) else None
