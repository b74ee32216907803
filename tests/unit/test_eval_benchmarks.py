"""Harmful and over-refusal sets: real files, and rows of the published shapes where the files are not at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esi_ds.config import Prompts
from esi_ds.data.benchmarks import AIR_REGIONS, BUILT_IN, COSAPIEN_SCENARIOS, MULTIJAIL_LANGUAGES, SORRY_STYLES
from esi_ds.data.prompts import distinct_names, load_prompts, load_section
from esi_ds.errors import UserError
from esi_ds.stages.plan import notes

# Rows as the hub gives them.
HUB = {
    ("walledai/AdvBench", None): [{"prompt": "h1", "target": "Sure"}],
    ("walledai/HarmBench", "standard"): [{"prompt": "h2", "category": "illegal"}],
    ("walledai/HarmBench", "contextual"): [{"prompt": "h3", "category": "illegal", "context": " The lab. "}],
    ("walledai/HarmBench", "copyright"): [{"prompt": "h4", "category": "copyright", "tags": ["lyrics"]}],
    ("walledai/StrongREJECT", None): [{"prompt": "h5", "category": "Violence", "source": "custom"}],
    ("JailbreakBench/JBB-Behaviors", "harmful"): [
        {"Index": 0, "Goal": "h6", "Target": "Sure", "Behavior": "Name", "Category": "Fraud", "Source": "AdvBench"}
    ],
    ("JailbreakBench/JBB-Behaviors", "benign"): [
        {"Index": 0, "Goal": "b1", "Target": "Sure", "Behavior": "Name", "Category": "Fraud", "Source": "Original"}
    ],
    ("allenai/wildjailbreak", "eval"): [
        {"adversarial": "h7", "label": 1, "data_type": "adversarial_harmful"},
        {"adversarial": "b2", "label": 0, "data_type": "adversarial_benign"},
    ],
    ("allenai/wildjailbreak", "train"): [
        {"vanilla": "h8", "adversarial": "", "completion": "no", "data_type": "vanilla_harmful"},
        {"vanilla": "x", "adversarial": "h9", "completion": "no", "data_type": "adversarial_harmful"},
        {"vanilla": "b", "adversarial": "", "completion": "yes", "data_type": "vanilla_benign"},
    ],
    ("Paul/XSTest", None): [
        {"id": 1, "prompt": "b3", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
        {"id": 2, "prompt": "h10", "type": "contrast_homonyms", "label": "unsafe", "focus": "kill", "note": ""},
    ],
    ("bench-llm/or-bench", "or-bench-hard-1k"): [{"prompt": "b4", "category": "deception"}],
    ("bench-llm/or-bench", "or-bench-80k"): [{"prompt": "b5", "category": "deception"}],
    ("bench-llm/or-bench", "or-bench-toxic"): [{"prompt": "h11", "category": "violence"}],
    ("sorry-bench/sorry-bench-202503", None): [
        {"question_id": 1, "category": "1", "turns": [f"h {style}"], "prompt_style": style}
        for style in ("base", *SORRY_STYLES)
    ],
    **{
        ("stanford-crfm/air-bench-2024", region): [
            {"cate-idx": "1.1.1", "l2-name": "Security", "l3-name": "Confidentiality", "l4-name": "Spying",
             "prompt": f"h {region}"}
        ]
        for region in ("default", *AIR_REGIONS)
    },
    ("LibrAI/do-not-answer", None): [
        {"id": 0, "risk_area": "Malicious Uses", "types_of_harm": "Fraud", "specific_harms": "Scams", "question": "h12",
         "GPT4_response": "No.", "GPT4_harmful": 0, "GPT4_action": 0}
    ],
    ("DAMO-NLP-SG/MultiJail", None): [
        {"id": 0, "source": "hh", "tags": "['fraud']",
         **{language: f"h {language}" for language in ("en", *MULTIJAIL_LANGUAGES)}}
    ],
    **{
        ("microsoft/CoSApien", scenario): [
            {"prompt": f"{letter} {scenario}", "scenario": f"Rules of {scenario}", "type": kind}
            for letter, kind in (("b", "allowed"), ("h", "disallowed"), ("?", "partial"))
        ]
        for scenario in COSAPIEN_SCENARIOS
    },
    ("AmazonScience/FalseReject", "test"): [{"prompt": "b6", "category": 3, "category_text": "Fraud"}],
    ("AmazonScience/FalseReject", "train"): [
        {"prompt": "b7", "category": 3, "category_text": "Fraud", "instruct_response": "So.",
         "cot_response": {"reasoning_content": "Is it?", "solution": "So."}}
    ],
}  # fmt: skip
EXPECTED = {
    "advbench": ("h1",),
    "harmbench": ("h2",),
    "harmbench/contextual": ("The lab.\n\n---\n\nh3",),
    "harmbench/copyright": ("h4",),
    "strongreject": ("h5",),
    "jailbreakbench": ("h6",),
    "jailbreakbench/benign": ("b1",),
    "wildjailbreak": ("h7",),
    "wildjailbreak/benign": ("b2",),
    "wildjailbreak/train": ("h8", "h9"),
    "xstest": ("b3",),
    "xstest/unsafe": ("h10",),
    "or-bench": ("b4",),
    "or-bench/80k": ("b5",),
    "or-bench/toxic": ("h11",),
    "sorry-bench": ("h base",),
    **{f"sorry-bench/{style}": (f"h {style}",) for style in SORRY_STYLES},
    "air-bench-2024": ("h default",),
    **{f"air-bench-2024/{region}": (f"h {region}",) for region in AIR_REGIONS},
    "do-not-answer": ("h12",),
    "multijail": ("h en",),
    **{f"multijail/{language}": (f"h {language}",) for language in MULTIJAIL_LANGUAGES},
    **{
        f"cosapien/{scenario}{suffix}": (
            [
                {"role": "system", "content": f"Rules of {scenario}"},
                {"role": "user", "content": f"{letter} {scenario}"},
            ],
        )
        for scenario in COSAPIEN_SCENARIOS
        for suffix, letter in (("", "h"), ("/allowed", "b"))
    },
    "falsereject": ("b6",),
    "falsereject/train": ("b7",),
}
# Splits with another name than train.
SPLITS = {
    "JailbreakBench/JBB-Behaviors": ("harmful", "benign"),
    "stanford-crfm/air-bench-2024": ("test",),
    "microsoft/CoSApien": COSAPIEN_SCENARIOS,
    "AmazonScience/FalseReject": ("test", "train"),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(path: str, name: str | None, split: str, **options):
        rows = HUB.get((path, name)) or HUB[path, split]
        assert split in SPLITS.get(path, ("train",))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.parametrize("name", EXPECTED)
def test_built_in_names_give_their_prompts(hub: None, name: str) -> None:
    prompt_set = load_prompts(name)
    assert prompt_set.prompts == EXPECTED[name] and prompt_set.column == BUILT_IN[name].column
    # Harmful prompts begin with h here, benign ones with b.
    first = prompt_set.prompts[0]
    text = first if isinstance(first, str) else first[-1]["content"]
    sort = {"h": "harmful", "T": "harmful", "b": "benign"}[text[0]]
    assert BUILT_IN[name].kind in (sort, "all")


def test_every_built_in_name_is_tested() -> None:
    assert set(EXPECTED) | {"examples/harmful", "examples/benign"} == set(BUILT_IN)


def test_a_kind_or_column_of_ones_own(hub: None) -> None:
    assert load_prompts("xstest", kind="all").prompts == ("b3", "h10")
    assert load_prompts("xstest", kind="harmful").prompts == ("h10",)
    assert load_prompts("xstest").skipped == ((1, "XSTest unsafe row"),)
    assert load_prompts("wildjailbreak/benign").skipped == ((0, "WildJailbreak harmful row"),)
    assert load_prompts("jailbreakbench", column="Behavior").prompts == ("Name",)
    assert len(load_prompts("sorry-bench").skipped) == len(SORRY_STYLES)
    allowed = load_prompts("cosapien/film_production", kind="benign")
    assert allowed.prompts == EXPECTED["cosapien/film_production/allowed"] and allowed.unread == ()
    assert allowed.skipped == ((1, "CoSApien disallowed row"), (2, "CoSApien partial row"))
    assert len(load_prompts("cosapien/film_production", kind="all").prompts) == 3


def test_a_configuration_of_ones_own(hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """wildguardmix has no default one; two of a set are two question sets."""
    monkeypatch.setitem(HUB, ("allenai/wildguardmix", "wildguardtest"), [{"prompt": "h1"}])
    section = Prompts(path="allenai/wildguardmix", name="wildguardtest")
    assert load_section(section, "data.prompts").prompts == ("h1",)
    monkeypatch.setattr(notes, "hub_answers", lambda: True)
    assert notes.count_prompts(section, "data.prompts", []) == 1
    other = section.model_copy(update={"name": "wildguardtrain"})
    assert distinct_names([section, other]) == [f"{section.path}:{name}" for name in (section.name, other.name)]
    contextual = load_prompts("harmbench", name="contextual").prompts
    assert contextual == EXPECTED["harmbench/contextual"] != EXPECTED["harmbench"]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("jailbreakbench", "benign", "name jailbreakbench/benign"),
        ("or-bench", "harmful", "name or-bench/toxic"),
        ("examples/benign", "harmful", "not of harmful ones"),
        ("advbench", "benign", "holds harmful prompts only"),
        ("falsereject", "harmful", "holds benign prompts only"),
        ("air-bench-2024", "benign", "holds harmful prompts only"),
    ],
)
def test_a_set_of_the_other_sort_is_refused(name: str, kind: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"eval\.x\.path = {name}.*{words}"):
        load_prompts(name, kind=kind, field="eval.x")


def test_copies_with_other_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **o: datasets.Dataset.from_list([{"forbidden_prompt": "x"}])
    )
    prompt_set = load_prompts("strongreject")
    assert (prompt_set.prompts, prompt_set.column) == (("x",), "forbidden_prompt")


def test_files_of_harmbench_in_the_hub_copys_shape(tmp_path: Path) -> None:
    """Protected texts are left out and contexts stand in front, further columns or not; answered rows have no such."""
    rows = [
        {"prompt": "a", "category": "illegal", "context": "The lab.", "id": 1},
        {"prompt": "b", "category": "copyright", "tags": ["lyrics"]},
        {"prompt": "c", "functional_category": "Copyright"},
        {"prompt": "d", "category": "qa", "context": "A text.", "answer": "yes"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt_set = load_prompts(str(tmp_path / "rows.jsonl"))
    assert prompt_set.prompts == ("The lab.\n\n---\n\na", "d")
    assert prompt_set.skipped == ((1, "HarmBench copyright row"), (2, "HarmBench copyright row"))
    assert (2, "HarmBench row, which is not benign") in load_prompts(
        str(tmp_path / "rows.jsonl"), kind="benign"
    ).skipped
    (tmp_path / "behaviors.csv").write_text("Behavior,FunctionalCategory\nb1,standard\nb2,copyright\n")
    with pytest.raises(UserError, match=r"has no prompt \(HarmBench row, which is not benign\)"):
        load_prompts(str(tmp_path / "behaviors.csv"), kind="benign")


def test_shipped_examples() -> None:
    assert len(load_prompts("examples/benign").prompts) == len(load_prompts("examples/harmful").prompts) == 200


@pytest.mark.parametrize(
    ("name", "kind", "count", "skipped"),
    [
        ("advbench_harmful_behaviors.csv", "harmful", 520, {}),
        ("harmbench_behaviors_text_val.csv", "harmful", 60, {"HarmBench copyright row": 20}),
        ("harmbench_behaviors_text_val.csv", "all", 80, {}),
        ("strongreject_dataset.csv", "harmful", 313, {}),
        ("xstest_prompts.csv", "benign", 250, {"XSTest unsafe row": 200}),
        ("xstest_prompts.csv", "harmful", 200, {"XSTest safe row": 250}),
        ("xstest_prompts.csv", "all", 450, {}),
        ("gsm8k_test.jsonl", "benign", 1319, {}),
        ("dolly_15k_subset387_ccbysa3.jsonl", "benign", 387, {}),
        ("medquad_1400.jsonl", "benign", 1400, {}),
    ],
)
def test_real_files_by_kind(shared: Path, name: str, kind: str, count: int, skipped: dict[str, int]) -> None:
    prompt_set = load_prompts(str(shared / "data" / name), kind=kind)
    reasons = [reason for _, reason in prompt_set.skipped]
    assert (len(prompt_set.prompts), {reason: reasons.count(reason) for reason in set(reasons)}) == (count, skipped)


def test_xstest_without_labels_goes_by_type(shared: Path, tmp_path: Path) -> None:
    """The copy with completions has types only: they say the same as the labels of the published file."""
    import csv

    with (shared / "data/xstest_prompts.csv").open(newline="") as opened:
        rows = [{"prompt": row["prompt"], "type": row["type"]} for row in csv.DictReader(opened)]
    expected = load_prompts(str(shared / "data/xstest_prompts.csv"), kind="benign").prompts
    for more in ({}, {"label": 0}):
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({**row, **more}) + "\n" for row in rows))
        assert load_prompts(str(tmp_path / "x.jsonl"), kind="benign").prompts == expected


def test_rows_of_other_sets_are_nobodys_business(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "type": "open", "label": "3"},
        {"prompt": "b", "type": "open"},
        {"prompt": "c", "type": None, "label": "unsafe"},
        {"prompt": "g", "type": ["homonyms"], "label": "safe"},
        {"prompt": "d", "context": "c", "answer": "x"},
        {"prompt": "e", "category": "x", "context": None},
        {"prompt": "f", "category": "x", "context": "  "},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for kind in ("benign", "harmful", "all", None):
        assert load_prompts(str(tmp_path / "a.json"), kind=kind).prompts == ("a", "b", "c", "g", "d", "e", "f")


def test_errors_name_the_section_they_were_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,type,label\nx,contrast_homonyms,unsafe\n")
    with pytest.raises(UserError, match=r"eval\.benign\.path.*has no prompt \(XSTest unsafe row\)"):
        load_prompts(str(tmp_path / "a.csv"), kind="benign", field="eval.benign")
    with pytest.raises(UserError, match=r"eval\.benign\.column"):
        load_prompts(str(tmp_path / "a.csv"), column="promtp", field="eval.benign")


def rows_at(tmp_path: Path, name: str, rows: list[dict]) -> str:
    """A file of these rows in the format of its suffix."""
    import csv

    import pyarrow
    from pyarrow import parquet

    file = tmp_path / name
    if file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text(json.dumps(rows) if file.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("source", "config", "column", "expected"),
    [
        ("sorry-bench/sorry-bench-202503", None, "auto", EXPECTED["sorry-bench"]),
        ("stanford-crfm/air-bench-2024", "china", "auto", EXPECTED["air-bench-2024/china"]),
        ("LibrAI/do-not-answer", None, "auto", EXPECTED["do-not-answer"]),
        ("DAMO-NLP-SG/MultiJail", None, "bn", EXPECTED["multijail/bn"]),
        ("microsoft/CoSApien", "film_production", "auto", EXPECTED["cosapien/film_production"]),
        ("AmazonScience/FalseReject", "test", "auto", EXPECTED["falsereject"]),
        ("AmazonScience/FalseReject", "train", "auto", EXPECTED["falsereject/train"]),
    ],
)
def test_published_files(
    tmp_path: Path, suffix: str, source: str, config: str | None, column: str, expected: tuple
) -> None:
    """The files that the sets consist of, whichever way they were saved."""
    rows = [dict(row) for row in HUB[source, config]]
    for row in rows:
        if suffix == "csv" and "turns" in row:
            row["turns"] = json.dumps(row["turns"])
        if suffix == "csv" and "cot_response" in row:
            row["cot_response"] = json.dumps(row["cot_response"])
    kind = "benign" if "FalseReject" in source else "harmful"
    rows = rows[: 1 if "prompt_style" in rows[0] else 2]
    prompts = load_prompts(rows_at(tmp_path, f"rows.{suffix}", rows), column=column, kind=kind).prompts
    assert prompts == expected


def test_styles_of_sorry_bench_are_not_one_set(hub: None, tmp_path: Path) -> None:
    """The published file has all of them: ciphers and translations would count in one rate with what they are of."""
    source = "sorry-bench/sorry-bench-202503"
    for path in (source, rows_at(tmp_path, "rows.jsonl", HUB[source, None])):
        with pytest.raises(UserError, match=r"data\.prompts\.path.* 21 styles \(base, ascii, .*one style, or name"):
            load_prompts(path)


def test_rows_that_no_set_publishes_so(tmp_path: Path) -> None:
    turns = [{"turns": ["a"]}, {"turns": ["a", "b"]}, {"turns": []}, {"turns": [None, "c"]}, {"turns": "['d']"}]
    prompt_set = load_prompts(rows_at(tmp_path, "turns.jsonl", turns))
    assert prompt_set.prompts == ("a", "c")
    assert dict(prompt_set.skipped) == {
        1: "it has 2 turns, and the later ones need answers to the earlier ones",
        2: "the prompt is empty",
        4: "its turns cannot be read as JSON",
    }
    # A scenario is a system prompt in CoSApien's rows only; an unknown type of theirs is of neither kind.
    rows = [{"prompt": "a", "scenario": "S", "type": "other", "id": 1}]
    other = load_prompts(rows_at(tmp_path, "other.jsonl", rows), kind="harmful")
    assert other.prompts == ("a",) and other.unread == ("scenario", "type", "id")
    rows = [{"prompt": "a", "scenario": "S", "type": kind} for kind in ("new", "safe", "disallowed")]
    for kind, skipped in (("harmful", ["new", "safe"]), ("benign", ["new", "disallowed"])):
        prompt_set = load_prompts(rows_at(tmp_path, "cosapien.jsonl", rows), kind=kind)
        assert [reason for _, reason in prompt_set.skipped] == [f"CoSApien {name} row" for name in skipped]
    with pytest.raises(UserError, match=r"auto.*id, source, tags, en, zh.*name the column"):
        load_prompts(rows_at(tmp_path, "multijail.jsonl", HUB["DAMO-NLP-SG/MultiJail", None]))
