"""The prepare.py of every public data set, on small files of the published form."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from data import HERE, InputError, fetch, load_jsonl, resolve
from data.answers import is_correct

SHARED = HERE.parent.parent / "shared/data"
THOUGHT = ("<|begin_of_thought|>\n\nHm.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nBecause.\n\n"
           "<|end_of_solution|>")
PUBLISHED = {
    "gsm8k": {"train.jsonl": [{"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"}],
              "test.jsonl": [{"question": "A thousand?", "answer": "Yes.\n#### 1,000"}]},
    "math": {"train.jsonl": [{"problem": "Half?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1"},
                             {"problem": "Empty?", "solution": "There are $\\boxed{}$ primes.", "answer": ""}],
             "test.jsonl": [{"problem": "Point?", "solution": "So $\\boxed{(3,4)}$.", "answer": "(3,4)"}]},
    "aime": {"aime24.jsonl": [{"id": 60, "problem": "Walk?", "answer": "025"}],
             "aime25.jsonl": [{"id": 1, "problem": "Bases?", "answer": 70}]},
    "mmlu_pro": {"test.jsonl": [{"question": "Which?", "options": ["one", "two", "three"], "answer": "C",
                                 "answer_index": 2, "category": "math"}]},
    "deepmath": {"train.jsonl": [{"question": "Limit?", "final_answer": "0", "difficulty": 5.5, "topic": "Calculus"}]},
    "openthoughts": {"train.jsonl": [
        {"conversations": [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": THOUGHT}]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "It is so."}]},
    ]},
}


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", HERE / name / "prepare.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def prepared(name: str, tmp_path: Path, files: dict) -> dict[str, list[dict]]:
    (tmp_path / "source").mkdir(exist_ok=True)
    (tmp_path / "to").mkdir(exist_ok=True)
    for file, rows in files.items():
        (tmp_path / "source" / file).write_text("".join(json.dumps(r) + "\n" for r in rows))
    fetch.prepare(tmp_path / "to", module(name).SPLITS, str(tmp_path / "source"))
    return {f.name: load_jsonl(f, need=("prompt",)) for f in (tmp_path / "to").glob("*.jsonl")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_become_prompt_and_answer(name, tmp_path, capsys):
    found = prepared(name, tmp_path, PUBLISHED[name])
    assert set(found) == set(PUBLISHED[name])
    for rows in found.values():
        assert len(rows) == 1 and rows[0]["prompt"]
        if "solution" in rows[0] and "answer" in rows[0]:
            assert is_correct(rows[0]["solution"], rows[0]["answer"])
    assert "1 rows" in capsys.readouterr().out
    assert {file: rows[0].get("answer") for file, rows in found.items()} == {
        "gsm8k": {"train.jsonl": "4", "test.jsonl": "1,000"},
        "math": {"train.jsonl": "\\frac{1}{2}", "test.jsonl": "(3,4)"},
        "aime": {"aime24.jsonl": "25", "aime25.jsonl": "70"}, "mmlu_pro": {"test.jsonl": "C"},
        "deepmath": {"train.jsonl": "0"}, "openthoughts": {"train.jsonl": None},
    }[name]
    if name == "gsm8k":
        assert found["train.jsonl"][0]["solution"] == "It is 4.\n\\boxed{4}"
        assert found["train.jsonl"][0]["prompt"].endswith("\\boxed{}.")  # else a gain could be one of form
        with pytest.raises(ValueError, match="unpack"):
            module("gsm8k").convert({"question": "2+2?", "answer": "It is 4."})
    if name == "math":
        assert module("math").convert({"problem": "?", "solution": "Therefore the answer is $\\boxed{}$."}) is None
    if name == "mmlu_pro":
        assert "\nA. one\nB. two\nC. three\n" in found["test.jsonl"][0]["prompt"]
    if name == "openthoughts":
        assert found["train.jsonl"][0] == {"prompt": "Why?", "solution": "<think>\nHm.\n</think>\n\nBecause."}


def test_gpqa_shuffles_its_choices_the_same_way_everywhere(tmp_path):
    wrong = {"Incorrect Answer 1": "x", "Incorrect Answer 2": "y", "Incorrect Answer 3": "z"}
    rows = [{"Question": f"Question {i}?", "Correct Answer": "right", **wrong} for i in range(40)]
    for folder in ("source", "to"):
        (tmp_path / folder).mkdir()
    with open(tmp_path / "source/gpqa_diamond.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    fetch.prepare(tmp_path / "to", module("gpqa").SPLITS, str(tmp_path / "source"))
    found = load_jsonl(tmp_path / "to/test.jsonl")
    assert all(f"\n{r['answer']}. right\n" in r["prompt"] for r in found)
    assert "".join(r["answer"] for r in found[:8]) == "ACDCDDCC" and {r["answer"] for r in found} == set("ABCD")
    assert is_correct("So the answer is (" + found[0]["answer"] + ").", found[0]["answer"])


@pytest.mark.parametrize("rows, message", [
    ([{"problem": "p", "answer": "1000"}], "row 1: not of the published form .*not one of 0 to 999"),
    ([{"question": "p", "answer": "7"}], "row 1: not of the published form .*'problem'"),
    ([], "no rows in it"),
])
def test_what_is_not_of_the_published_form_is_refused_and_nothing_is_written(rows, message, tmp_path):
    with pytest.raises(InputError, match=message):
        prepared("aime", tmp_path, {**PUBLISHED["aime"], "aime25.jsonl": rows})
    assert list((tmp_path / "to").iterdir()) == []


def test_sources_that_cannot_be_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is the folder that is written to"):
        fetch.prepare(tmp_path, module("aime").SPLITS, str(tmp_path))
    with pytest.raises(InputError, match="train.jsonl: cannot be read"):
        fetch.prepare(tmp_path / "to", module("gsm8k").SPLITS, str(tmp_path))
    (tmp_path / "mmlu_pro").mkdir()
    (tmp_path / "mmlu_pro/prepare.py").write_text("")
    monkeypatch.setattr("data.HERE", tmp_path)
    with pytest.raises(InputError, match="run python data/mmlu_pro/prepare.py first"):
        resolve("mmlu_pro", "test")
    with pytest.raises(InputError, match="to test only"):
        resolve("aime24", "train")


@pytest.mark.skipif(not SHARED.is_dir(), reason="public data sets are not committed, only their recipes")
def test_real_files_give_the_expected_counts(tmp_path, capsys):
    sets = {"gsm8k": {"train": "gsm8k/train", "test": "gsm8k/test"},
            "math": {"train": "math/train", "test": "math500/test"},
            "aime": {"aime24": "aime24/test", "aime25": "aime24/test"}}
    for name, files in sets.items():
        source, to = tmp_path / name, tmp_path / f"{name}_to"
        source.mkdir(), to.mkdir()
        for file, real in files.items():
            (source / f"{file}.jsonl").symlink_to(SHARED / f"{real}.jsonl")
        fetch.prepare(to, module(name).SPLITS, str(source))
        for file in files:
            rows = load_jsonl(to / f"{file}.jsonl")
            assert all(r["answer"].strip() for r in rows)
            if "solution" in rows[0]:  # every published solution states its answer
                right = sum(is_correct(r["solution"], r["answer"]) for r in rows[:500])
                assert right >= 0.99 * min(500, len(rows)), (name, file, right)
    assert "expected" not in capsys.readouterr().out
