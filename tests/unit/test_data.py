"""Published shapes of the benchmarks, usual files, and texts that must not change on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esi_ds.data.prompts import BUILT_IN, load_prompts, load_responses, recorded_scores
from esi_ds.errors import UserError


@pytest.mark.parametrize(
    ("name", "count", "column", "skipped"),
    [
        ("advbench_harmful_behaviors.csv", 520, "goal", 0),
        ("harmbench_behaviors_text_val.csv", 60, "Behavior", 20),  # 20 of the 80 are copyright rows
        ("strongreject_dataset.csv", 313, "forbidden_prompt", 0),
        ("xstest_prompts.csv", 450, "prompt", 0),
        ("circuit_breakers_train.json", 4994, "instruction", 0),
        ("gsm8k_test.jsonl", 1319, "question", 0),
        ("pubmedqa_ori_pqal.json", 1000, "QUESTION", 0),
    ],
)
def test_real_files(shared: Path, name: str, count: int, column: str, skipped: int) -> None:
    prompt_set = load_prompts(str(shared / "data" / name))
    assert (len(prompt_set.prompts), prompt_set.column, len(prompt_set.skipped)) == (count, column, skipped)


def test_harmbench_context_stands_in_front(shared: Path) -> None:
    prompt_set = load_prompts(str(shared / "data" / "harmbench_behaviors_text_val.csv"))
    assert sum("\n\n---\n\n" in prompt for prompt in prompt_set.prompts) == 19  # as many contextual rows


def rows(tmp_path: Path, name: str, content: list[dict]) -> str:
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(file)


def test_jailbreakbench_and_wildjailbreak_shapes(tmp_path: Path) -> None:
    jbb = rows(
        tmp_path, "jbb.jsonl", [{"Index": 0, "Goal": "do it", "Target": "Sure", "Behavior": "Name", "Category": "x"}]
    )
    assert load_prompts(jbb).prompts == ("do it",)
    wild = tmp_path / "wild.tsv"
    wild.write_text(
        "vanilla\tadversarial\tcompletion\tdata_type\nplain\t\tno\tvanilla_harmful\n"
        "base\twrapped NA\tno\tadversarial_harmful\nfine\t\tyes\tvanilla_benign\n"
    )
    prompt_set = load_prompts(str(wild))
    assert prompt_set.prompts == ("plain", "wrapped NA") and prompt_set.skipped == ((2, "WildJailbreak benign row"),)


def test_every_format_gives_the_same_prompts(tmp_path: Path) -> None:
    from datasets import Dataset

    prompts = ["null", "None", 'a, "quoted"\nline', "café 😀"]
    content = [{"prompt": prompt, "id": str(i)} for i, prompt in enumerate(prompts)]
    Dataset.from_list(content).to_parquet(tmp_path / "a.parquet")
    rows(tmp_path, "a.jsonl", content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": content}))
    import csv

    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"a.{suffix}").open("w", newline="") as opened:
            writer = csv.DictWriter(opened, ["prompt", "id"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(content)
    names = ("a.parquet", "a.jsonl", "a.json", "wrapped.json", "a.csv", "a.tsv")
    assert {load_prompts(str(tmp_path / name)).prompts for name in names} == {tuple(prompts)}
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert load_prompts(str(tmp_path / "a.txt")).prompts == ("one", "two")


def test_columns_limits_chats_and_empty_rows(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "last"},
    ]
    file = rows(tmp_path, "chat.jsonl", [{"messages": chat}, {"messages": []}, {"messages": chat}])
    assert load_prompts(file, limit=1).prompts == (chat,)
    assert load_prompts(file).skipped == ((1, "the prompt is empty"),)
    other = rows(tmp_path, "other.jsonl", [{"Prompt": "a", "secret": "b"}])
    assert load_prompts(other).prompts == ("a",) and load_prompts(other, column="secret").prompts == ("b",)


def test_responses_must_be_text(tmp_path: Path) -> None:
    assert load_responses(rows(tmp_path, "r.jsonl", [{"prompt": "a", "response": ""}])) == [
        {"prompt": "a", "response": ""}
    ]
    with pytest.raises(UserError, match="row 2.*response"):
        load_responses(rows(tmp_path, "bad.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a"}]))


def test_an_instruction_is_asked_with_its_input(tmp_path: Path) -> None:
    alpaca_rows = [
        {"instruction": "Shorten it.", "input": " A long text. ", "output": "x"},
        {"instruction": "What is HiFi?", "context": "HiFi is sound.", "response": "x"},
        {"instruction": "Rewrite it.", "instances": [{"input": "If you have", "output": "x"}]},
        {"instruction": "Say hello.", "input": "", "context": None, "instances": []},
        {"instruction": "Half \ud83d"},
    ]
    prompt_set = load_prompts(rows(tmp_path, "i.jsonl", alpaca_rows))
    assert prompt_set.prompts == (
        "Shorten it.\n\nA long text.",
        "What is HiFi?\n\nHiFi is sound.",
        "Rewrite it.\n\nIf you have",
        "Say hello.",
    )
    assert prompt_set.skipped == ((4, "the prompt holds half of a surrogate pair"),)
    with pytest.raises(UserError, match="row 1 has no text under 'response'"):
        load_responses(rows(tmp_path, "half.jsonl", [{"prompt": "a", "response": "\ud83d"}]))


def test_scores_come_with_responses(tmp_path: Path) -> None:
    said = [{"prompt": "a", "response": "b", "judge_score": score} for score in (1, -0.5, None)]
    assert str(recorded_scores(load_responses(rows(tmp_path, "j.jsonl", said)), "j.jsonl")) == "[1.0, -0.5, nan]"
    for wrong in ({"judge_score": "safe"}, {"judge_score": True}, {}):
        bad = rows(tmp_path, "bad.jsonl", [said[0], {"prompt": "a", "response": "b", **wrong}])
        with pytest.raises(UserError, match="row 2 .*judge_score.*judge.path"):
            recorded_scores(load_responses(bad), bad)


def test_a_hub_set_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def refuse(*arguments, **options):
        asked.append((arguments, options))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for name in ("advbench", "harmbench", "strongreject", "jailbreakbench", "wildjailbreak", "someone/something"):
        with pytest.raises(UserError, match="data.prompts.path.*no network"):
            load_prompts(name)
    assert [arguments[0] for arguments, _ in asked] == [
        *(BUILT_IN[n][0] for n in list(BUILT_IN)[:5]),
        "someone/something",
    ]
    assert asked[4][1]["delimiter"] == "\t" and asked[3][1]["split"] == "harmful"


def test_a_hub_set_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **o: datasets.Dataset.from_list([{"prompt": "x", "target": "y"}])
    )
    prompt_set = load_prompts("advbench")
    assert prompt_set.prompts == ("x",) and prompt_set.source == "hub:walledai/AdvBench"
