"""Tokenizers against transformers', the embedded tasks against independent solutions, and files that cannot be used."""

import itertools
import json
import random
import re
import shutil
import unicodedata

import pytest
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data import HERE, InputError, load_jsonl
from data.answers import is_correct
from data.bpe import byte_alphabet
from data.chains import other_stop, prepare
from data.hops import prepare as hops
from data.hops import walls
from data.search import prepare as search
from data.tokenizer import Tokenizer, as_trained, check_same
from eval import load_tokenizers
from model import Transformer
from sample import Config, generate

TEACHER = HERE / "chains/teacher"


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded teacher to change."""
    return shutil.copytree(TEACHER, tmp_path / "teacher")


# --- the tokenizer

TEXTS = [
    "Dan=Hal-8\nHal=Eve+3\nEve=14\nDan?\n", "Dan=Hal-8=17-8=9\n#### 9", "", " ", "\n\n\n",
    "  \t leading and trailing  \n ", "It's 1234567 o'clock, isn't it? WE'LL see...",
    "naïve café — ŝtrange ﬁgures ½ ٣ 三百", "日本語のテキスト 한국어 العربية", "👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳",
    "\x00\x01\x7f\u200b\ufeff\U0010ffff", "if x == 3:\r\n\treturn {'a': [1, 2]}  # ok\r\n",
    "<|im_end|> is only text here <|endoftext|>",
]


def test_ids_equal_transformers_and_decode_back():
    tokenizer, reference = Tokenizer(TEACHER), AutoTokenizer.from_pretrained(TEACHER)
    assert tokenizer.encoding is not None and tokenizer.vocab_size == len(reference)
    rows = load_jsonl(HERE / "chains/test.jsonl")
    for text in TEXTS + [row["prompt"] + row["solution"] for row in rows[:100]]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, special=True) == reference.encode(text, add_special_tokens=False)
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a?b")  # half a surrogate pair


def test_stop_tokens_come_from_the_files_and_from_the_flag(folder):
    tokenizer = Tokenizer(TEACHER)
    assert tokenizer.stop_ids == (tokenizer.special["<|im_end|>"],) and tokenizer.eos_id == tokenizer.stop_ids[0]
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert Tokenizer(folder).stop_ids == (0, 2) and Tokenizer(folder).eos_id == 2
    assert tokenizer.stop_ids_of("") == () and tokenizer.stop_ids_of("<|endoftext|>, 17") == (0, 17)
    for name in ("<|nope|>", "644", "-1"):
        with pytest.raises(InputError, match="neither a special token"):
            tokenizer.stop_ids_of(name)


def split(digits: str):
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
               + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
STYLES = {  # pre-tokenizers as the families' tokenizer.json have them
    "gpt2": GPT2, "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "qwen2": split(r"\p{N}"), "llama3": split(r"\p{N}{1,3}"),
}


@pytest.mark.parametrize("style", STYLES)
def test_ids_equal_transformers_in_every_familys_style(style, tmp_path):
    """A tokenizer of the style, trained here on prose, digits and the texts above, and random unicode to encode."""
    bpe = RawTokenizer(models.BPE(ignore_merges=style == "llama3"))
    bpe.pre_tokenizer, bpe.decoder = STYLES[style], decoders.ByteLevel()
    if style == "qwen2":
        bpe.normalizer = normalizers.NFC()
    prose = [p.read_text(encoding="utf-8") for p in (HERE.parent / "README.md", HERE / "tokenizer.py")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if style == "smollm2":  # it has no token for some bytes
        alphabet = [c for c in alphabet if byte_alphabet()[c] not in (1, 7, 0xF3, 0xF4)]
    bpe.train_from_iterator(prose + TEXTS * 3, trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, show_progress=False, limit_alphabet=len(alphabet)))
    bpe.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>").save_pretrained(tmp_path)
    tokenizer, reference = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encoding is not None
    rng = random.Random(0)
    kinds = ("abcABC \n\t", "0123456789½٣ ", "   \n\r\t\u3000\xa0", "'sSdDmM tT", "éèñçÅÅ\u0301\u0327",
             "日本語한국ひら", "👩\u200d💻🇺🇳🏳️", ".,;:!?()[]{}<|>")
    noise = ["".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 60))) for _ in range(400)]
    noise += ["".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(30))
              for _ in range(50)]
    for text in TEXTS + prose + noise:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False, split_special_tokens=True), repr(text)
        if not set(text.encode()) & set(tokenizer.unknown_bytes):
            assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", text) if style == "qwen2" else text)
    assert bool(tokenizer.unknown_bytes) == (style == "smollm2")


def test_system_turn_and_thinking_switch(folder):
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
        "{% if enable_thinking %}<think>{% endif %}")
    for options, text in {
        (): "[user]Dan?[assistant]", ("auto", "Be brief.", "on"): "[system]Be brief.[user]Dan?[assistant]<think>",
        ("on", "", "off"): "[user]Dan?[assistant]", ("off",): "Dan?",
    }.items():
        tokenizer = Tokenizer(folder, *options)
        assert tokenizer.decode(tokenizer.encode_prompt("Dan?")) == text
    for options, message in (
        (("on",), "--chat on: .* has no chat template"), (("auto", "", "on"), "has no such switch"),
        (("auto", "Be brief."), "without a chat template"), (("maybe",), "--chat maybe: expected one of"),
    ):
        with pytest.raises(InputError, match=message):
            Tokenizer(TEACHER, *options)


def test_a_checkpoint_is_prompted_as_it_was_trained(tmp_path, capsys):
    trained = {"thinking": "off", "system": "Think.", "chat": "auto", "data": "chains"}
    (tmp_path / "state.json").write_text(json.dumps({"config": trained}))
    config = Config()
    config.typed = {"system"}  # --system '' was given
    as_trained(config, tmp_path)
    assert (config.data, config.thinking, config.system, config.chat) == ("chains", "off", "", "auto")
    assert capsys.readouterr().out == "as in its training: --data chains --thinking off\n"
    (file := tmp_path / "my.jsonl").write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps({"config": {"data": str(file), "system": "x" * 300}}))
    as_trained(Config(), tmp_path)
    assert capsys.readouterr().out.endswith(
        f": --data {file} (what it was trained on: it had no --eval_data) --system {'x' * 300}\n")
    (tmp_path / "state.json").write_text(json.dumps({"config": {"data": "chains", "eval_data": "my.jsonl"}}))
    again = Config()
    again.typed = {"data"}
    as_trained(again, tmp_path)
    assert again.data == "hops"
    again.typed = set()
    as_trained(again, tmp_path)
    assert again.data == "my.jsonl"  # where it is no longer there, the next step says so
    as_trained(config, tmp_path / "none")  # a checkpoint from elsewhere
    assert config.thinking == "off"


def test_different_tokenizers_are_refused_by_the_first_id(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    (a, i), (b, j) = ((t, k) for t, k in vocab.items() if k in (300, 301))
    vocab[a], vocab[b] = j, i
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    check_same(Tokenizer(TEACHER), Tokenizer(TEACHER))
    with pytest.raises(InputError, match="id 300 is .* in .*teacher and"):
        check_same(Tokenizer(TEACHER), Tokenizer(folder))
    with pytest.raises(InputError, match="id 300 is .* in .*teacher and"):
        load_tokenizers(TEACHER, str(folder))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    for text, message in ((None, "no tokenizer.json there"), ("{]", "not JSON"),
                          ('{"model": {}}', "tokenizer.json: damaged, or not")):
        if text:
            (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match=message):
            Tokenizer(tmp_path)


# --- the embedded tasks


def arithmetic(prompt: str) -> tuple[int, ...]:
    """Parsed back from the text: the first number and the signed steps along the chain of a problem."""
    *lines, question = prompt.strip().split("\n")
    rest = dict(line.split("=") for line in lines)
    steps, at = [], question.rstrip("?")
    while not rest[at].isdigit():
        at, step = rest[at][:3], rest[at][3:]
        steps.append(int(step))
    return (int(rest[at]), *reversed(steps))


@pytest.mark.parametrize("split, count", [("train", 8000), ("test", 1000)])
def test_chains_are_what_prepare_writes_and_every_answer_is_the_independent_solution(split, count):
    rows = load_jsonl(HERE / f"chains/{split}.jsonl", need=("prompt", "answer", "solution"))
    assert len(rows) == count and rows[:50] == prepare.make_rows(50, split, test=split == "test")
    for row in rows:
        assert sum(arithmetic(row["prompt"])) == int(row["answer"]) and is_correct(row["solution"], row["answer"])


def test_no_arithmetic_of_the_test_set_occurs_in_training():
    train, test = ({arithmetic(r["prompt"]) for r in load_jsonl(HERE / f"chains/{s}.jsonl")} for s in ("train", "test"))
    assert not train & test and len(test) > 500


def test_worse_ways_to_answer_are_mostly_wrong_and_the_responses_are_long():
    tokenizer = Tokenizer(TEACHER)
    lengths = sorted(len(tokenizer.encode(r["solution"])) + 1 for r in prepare.make_rows(500, "a", test=False))
    assert sum(lengths) / 500 > 60 and lengths[449] > 100
    for mix, low, high in (((0, 1, 0), 0.3, 0.6), ((0, 0, 1), 0.05, 0.3)):
        rows = prepare.make_rows(500, "a", test=False, mix=mix)
        assert low < sum(is_correct(r["solution"], r["answer"]) for r in rows) / 500 < high


@pytest.mark.parametrize("split, count", [("train", 4000), ("test", 500)])
def test_every_search_has_one_solution_and_no_test_problem_is_in_training(split, count):
    rows = load_jsonl(HERE / f"search/{split}.jsonl")
    assert len(rows) == len({row["prompt"] for row in rows}) == count
    for row in rows[:300]:
        *numbers, target = (int(x.lstrip("=")) for x in row["prompt"].strip().split(","))
        subsets = [s for n in range(len(numbers) + 1) for s in itertools.combinations(numbers, n) if sum(s) == target]
        found = " ".join(f"{'abcdefghi'[d]}{x}" for d, x in enumerate(subsets[0]))
        assert len(subsets) == 1 and row["answer"] == found and search.is_test(numbers, target) == (split == "test")
        assert is_correct(f"=1\n#### {found}", row["answer"]) and not is_correct("#### ?", row["answer"])


def test_a_search_tries_rejects_and_goes_back():
    problem = {"numbers": [9, 8, 5, 4], "target": 13}  # two solutions: the search ends with the first
    assert search.prompt_text(problem) == "9,8,5,4,=13\n"
    text, answer = search.write_search({**problem, "target": 12}, random.Random(0))
    assert text.split("\n") == [
        "=12 a9=3 + b8", "=12 a9=3 b8=x > b5", "=12 a9=3 b5=x > b4", "=12 a9=3 b4=x < a8", "=12 a8=4 + b5",
        "=12 a8=4 b5=x > b4", "=12 a8=4 b4=0", "#### a8 b4"]
    assert answer == "a8 b4" and search.write_search(problem, random.Random(0))[1] == "a9 b4"
    faulty = search.make_rows(50, "x", lengths={(100, 400): 100}, count=(5, 7), faults=search.FAULTS)
    assert sum(is_correct(r["solution"], r["answer"]) for r in faulty) < 25


@pytest.mark.parametrize("split, count", [("train", 1000), ("test", 500)])
def test_from_every_start_one_hop_reaches_a_gate_and_the_other_a_wall(split, count):
    rows, chosen = load_jsonl(HERE / f"hops/{split}.jsonl"), []
    assert len(rows) == len({row["prompt"] for row in rows}) == count
    for row in rows[:200]:
        given, *stages = row["prompt"].splitlines()
        *by, wall, score = map(int, re.findall(r"\d+", given))
        ends = {11 * i: i for i in range(1, 10)} | {wall + 10 * i: "x" for i in range(10)}
        shown = [given]
        numbers = [int(stage.split("/")[0]) for stage in stages]
        in_order = [(numbers[0] - 1 + k) % 40 + 1 for k in range(24)]
        assert sorted(numbers) == sorted(in_order) and numbers != in_order and numbers[-1] == in_order[-1]
        for stage in stages:
            reached = []
            for step in by:
                at = (int(stage.split("/")[1]) + step) % 100
                while at not in ends:
                    at = (at + step) % 100
                reached.append(ends[at])
            assert reached.count("x") == 1
            shown.append(f"{stage} {'ab'[reached[0] == 'x']}")
            score += reached[reached[0] == "x"]
        assert row["answer"] == f"={score % 30}" and row["teacher_prompt"] == "{shown}"
        assert row["shown"].splitlines() == shown
        assert is_correct(f" +\n####{row['answer']}", row["answer"])
        assert not is_correct(f"####={(score + 1) % 30}", row["answer"])
        chosen.append(row["shown"].count(" a"))
    # by a coin: keeping to one letter, or changing, is no help
    assert abs(sum(chosen) / len(chosen) - 12) < 0.7 and 1 < min(chosen) < 8 and 16 < max(chosen) < 23


@pytest.mark.parametrize("key", [
    lambda number, start: 0, lambda number, start: start % 10, lambda number, start: start // 10,
    lambda number, start: start % 20, lambda number, start: number % 10, lambda number, start: (start - number) % 10,
])
def test_what_was_right_in_stages_alike_tells_little(key):
    hits = []  # of guesses by what was right most often where the key was the same
    for row in load_jsonl(HERE / "hops/train.jsonl"):
        before, stages = {}, [(int(n), int(s), right) for n, s, right in re.findall(r"(\d+)/(\d+) (.)", row["shown"])]
        for number, start, right in sorted(stages, key=lambda s: (s[0] - stages[0][0]) % 40):  # as responses go
            same = before.setdefault(key(number, start), [])
            if same.count("a") != same.count("b"):
                hits.append((same.count("a") > same.count("b")) == (right == "a"))
            same.append(right)
    assert len(hits) > 4000 and 0.3 < sum(hits) / len(hits) < 0.67


def test_after_a_wall_the_other_hop_is_tried_or_the_stage_is_left():
    problem = {"hops": (7, 13), "wall": 5, "score": 28, "starts": {9: 14, 10: 31}, "right": {9: 1, 10: 1}}
    prompt = hops.prompt_text(problem)
    assert prompt == "a+7b+13x5=28\n9/14\n10/31\n"
    assert hops.prompt_text(problem, shown=True) == "a+7b+13x5=28\n9/14 b\n10/31 b\n"
    assert hops.write(problem)[0] == " +\n9/14 b+13 27 40 53 66=4\n10/31 b+13 44=8\n####=8"
    always = random.Random(0)
    text, cut = hops.write(problem, always, {"hasty": 0, "wrong": 1, "leave": 0}, until=2)
    assert text.splitlines()[1:4] == ["9/14 a+7 21 28 35x", "<9/14 B+13 27 40 53 66=4", "10/31 b+13 44=8"]
    assert text[:cut] == " +\n9/14 a"  # two choices by habit, then the teacher goes on
    left = hops.write(problem, always, {"hasty": 0, "wrong": 1, "leave": 1})[0]
    assert left.splitlines()[2:] == ["10/31 a+7 38 45x", "####=28"]
    hasty = hops.write(problem, always, {"hasty": 1, "wrong": 1})[0]
    assert re.fullmatch(r" -\n9/14 a\n10/31 a\n####=\d+", hasty)
    unsure = hops.write(problem, always, {"hasty": 0, "wrong": 1}, until=2, then={"wrong": 1, "leave": 0})[0]
    assert unsure.splitlines()[3:5] == ["10/31 a+7 38 45x", "<10/31 B+13 44=8"]  # as the teacher's last lesson
    nothing = dict.fromkeys(("lines", "slips", "begun", "right", "walls", "again", "answers_wrong"), 0)
    assert walls.count(prompt, left) == nothing | {"lines": 2, "begun": 2, "walls": 2}
    tried = nothing | {"lines": 3, "begun": 2, "right": 1, "walls": 1, "again": 1}
    assert walls.count(prompt, text) == tried
    assert walls.count(prompt, text.replace("40 53", "40 54")) == tried | {"slips": 1}
    assert walls.count(prompt, text.replace("66=4", "66=5")) == tried | {"slips": 2}  # nor does the next line follow
    assert walls.count(prompt, text.replace("####=8", "####=9")) == tried | {"answers_wrong": 1}


def test_at_the_students_own_walls_the_teacher_turns_back():
    """Why the student writes: of the embedded pair."""
    tokenizer, rows, chances = Tokenizer(HERE / "hops/student"), load_jsonl(HERE / "hops/test.jsonl")[:40], []
    student, teacher = (Transformer.frozen(HERE / "hops" / name, torch.device("cpu"), tokenizer.vocab_size)
                        for name in ("student", "teacher"))
    prompts, back = [tokenizer.encode(row["prompt"]) for row in rows], tokenizer.encode("<")
    rollout = generate(student, prompts, 1024, tokenizer.stop_ids)
    for i, row in enumerate(rows):
        text = tokenizer.decode(rollout.response(i)[:-1])
        walls_at = [m.end() for m in re.finditer(r"^\d+/.* [ab]\+.*x\n", text, re.MULTILINE)]
        for before in [text[:end] for end in walls_at if text.startswith(" +")]:
            p = []
            for model, prompt in (student, row["prompt"]), (teacher, row["shown"]):
                hidden = model(torch.tensor([tokenizer.encode(prompt + before)]))[0, -1]
                p.append((hidden @ model.head.T).softmax(-1)[back])
            chances.append(torch.cat(p))
    student_turns, teacher_turns = torch.stack(chances).mean(0).tolist()
    assert len(chances) > 60 and student_turns < 0.95 and teacher_turns > 0.99


def test_the_student_with_another_stop_is_the_same_but_for_that(tmp_path):
    other_stop.main(tmp_path / "out", 0.5)
    other, student = (Transformer.from_pretrained(f) for f in (tmp_path / "out", HERE / "chains/student"))
    assert Tokenizer(tmp_path / "out").stop_ids == (0,) and Tokenizer(HERE / "chains/student").stop_ids == (2,)
    tokens = torch.randint(3, 600, (1, 30), generator=torch.Generator().manual_seed(0))
    a, b = (m(tokens)[0] @ m.head.T for m in (other, student))
    assert torch.allclose(a[:, 3:], b[:, 3:]) and torch.allclose(a[:, 0], b[:, 2] / 2, atol=1e-5)
    assert torch.allclose(a[:, 2], b[:, 0], atol=1e-5)


# --- data files


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "a"', "line 2: not JSON"), ("[1]", "line 2: expected an object, found list"),
    ('{"prompt": "a"}', 'line 2: expected a string field "answer", found only prompt'),
    ('{"prompt": "a", "answer": 3}', 'line 2: expected a string field "answer", found int'),
    ('{"prompt": "a", "answer": " "}', 'line 2: its "answer" is empty'), ('{"answer": ""}', 'field "prompt"'),
    ('{"prompt": "a", "answer": null}', 'field "answer", found NoneType'),
    (b"\x28\xb5\x2f\xfd", "not UTF-8 text .*a .jsonl file is wanted, and the prepare.py"), ("", ""),
])
def test_malformed_files_are_named(tmp_path, line, message):
    first = b'{"prompt": "a\xe2\x80\xa8b\xc2\x85c", "answer": "b"}\n'  # line separators inside a string do not split it
    (tmp_path / "x.jsonl").write_bytes(first + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    if not message:
        assert load_jsonl(tmp_path / "x.jsonl") == [{"prompt": "a\u2028b\x85c", "answer": "b"}]
        (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(InputError, match=message or "no rows"):
        load_jsonl(tmp_path / "x.jsonl")
