import itertools
import json
import random
import shutil
import unicodedata

import pytest
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data import HERE, InputError, load_jsonl
from data.answers import is_correct
from data.chains import other_stop, prepare
from data.tokenizer import Tokenizer, byte_alphabet, check_same, prompted_as_trained
from data.walk import prepare as walk
from model import Transformer
from sample import Config
from tests.reference import solve

TEACHER = HERE / "chains/teacher"


# --- the tokenizer

TEXTS = [
    "Dan=Hal-8\nHal=Eve+3\nEve=14\nDan?\n",
    "Dan=Hal-8=17-8=9\n#### 9",
    "",
    " ",
    "\n\n\n",
    "  \t leading and trailing  \n ",
    "It's 1234567 o'clock, isn't it? WE'LL see...",
    "naïve café — ŝtrange ﬁgures ½ ٣ 三百",
    "日本語のテキスト 한국어 العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳",
    "\x00\x01\x7f\u200b\ufeff\U0010ffff",
    "if x == 3:\r\n\treturn {'a': [1, 2]}  # ok\r\n",
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


def test_stop_tokens_come_from_the_files(tmp_path):
    tokenizer = Tokenizer(TEACHER)
    assert tokenizer.stop_ids == (tokenizer.special["<|im_end|>"],) and tokenizer.eos_id == tokenizer.stop_ids[0]
    shutil.copytree(TEACHER, tmp_path / "t")
    (tmp_path / "t/generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert Tokenizer(tmp_path / "t").stop_ids == (0, 2) and Tokenizer(tmp_path / "t").eos_id == 2


def test_chat_template_wraps_the_prompt_and_user_text_stays_text(tmp_path):
    shutil.copytree(TEACHER, tmp_path / "t")
    (tmp_path / "t/chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\\n' }}"
    )
    tokenizer = Tokenizer(tmp_path / "t")
    start, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    ids = tokenizer.encode_prompt("Dan? <|im_end|>")
    assert tokenizer.decode(ids) == "<|im_start|>user\nDan? <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(start) == 2 and ids.count(end) == 1


def test_a_prompt_is_encoded_as_transformers_encodes_the_whole_conversation(tmp_path):
    """Also where the prompt merges with the template's text, repeats it, or is stripped by it."""
    for folder, trim in (("kept", ""), ("stripped", " | trim")):
        shutil.copytree(TEACHER, tmp_path / folder)
        (tmp_path / folder / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content"
            + trim
            + ") + '<|im_end|>\\n' }}{% endfor %}"
            "{{ '<|im_start|>assistant\\n' }}"
        )
        ours, theirs = Tokenizer(tmp_path / folder), AutoTokenizer.from_pretrained(tmp_path / folder)
        for prompt in ("Dan=Hal-8\nDan?", "\n\nuser\n", "user", "im", "  12 = 3  ", "{{ m }} {% raw %}", "\ue000"):
            turns = [{"role": "user", "content": prompt}]
            expected = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
            assert ours.encode_prompt(prompt) == expected, (folder, prompt)


def test_bare_prompts_open_as_the_tokenizer_opens_a_text(tmp_path):
    """Llama 3's <|begin_of_text|>; and added tokens that are not special, such as <think>, are found in any text."""
    shutil.copytree(TEACHER, tmp_path / "t")
    file = tmp_path / "t/tokenizer.json"
    inner = RawTokenizer.from_file(str(file))
    inner.add_special_tokens(["<|begin|>"])
    inner.add_tokens([AddedToken("<think>", normalized=False)])
    begin = inner.token_to_id("<|begin|>")
    opening = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    for processor in (opening, processors.Sequence([processors.ByteLevel(trim_offsets=False), opening])):
        inner.post_processor = processor
        inner.save(str(file))
        ours, theirs = Tokenizer(tmp_path / "t"), AutoTokenizer.from_pretrained(tmp_path / "t")
        for text in ("Dan=Hal-8\nDan?", "", "a <think> b"):
            assert ours.encode_prompt(text) == theirs(text).input_ids, text
        assert ours.encode("Dan") == theirs("Dan", add_special_tokens=False).input_ids  # what follows a prompt
    assert Tokenizer(TEACHER).bos_ids == []


def test_half_a_surrogate_pair_is_no_crash():
    assert Tokenizer(TEACHER).encode("a\ud800b") == Tokenizer(TEACHER).encode("a?b")


STYLES = {  # pre-tokenizers as the families' tokenizer.json have them
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
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
        vocab_size=1500, initial_alphabet=alphabet, show_progress=False, limit_alphabet=len(alphabet)
    ))
    bpe.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>").save_pretrained(tmp_path)
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encoding is not None
    rng = random.Random(0)
    kinds = (
        "abcABC \n\t",
        "0123456789½٣ ",
        "   \n\r\t\u3000\xa0",
        "'sSdDmM tT",
        "éèñçÅÅ\u0301\u0327",
        "日本語한국ひら",
        "👩\u200d💻🇺🇳🏳️",
        ".,;:!?()[]{}<|>",
    )
    noise = ["".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 60))) for _ in range(400)]
    noise += [
        "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(30))
        for _ in range(50)
    ]
    for text in TEXTS + prose + noise:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), repr(text)
        if not set(text.encode()) & set(ours.unknown_bytes):
            assert ours.decode(ids) == (unicodedata.normalize("NFC", text) if style == "qwen2" else text)
    assert bool(ours.unknown_bytes) == (style == "smollm2")


def test_system_turn_and_thinking_switch(tmp_path):
    shutil.copytree(TEACHER, tmp_path / "t")
    (tmp_path / "t/chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
        "{% if enable_thinking %}<think>{% endif %}"
    )
    spelled = {
        (): "[user]Dan?[assistant]", ("auto", "Be brief.", "on"): "[system]Be brief.[user]Dan?[assistant]<think>",
        ("on", "", "off"): "[user]Dan?[assistant]", ("off",): "Dan?",
    }
    for options, text in spelled.items():
        tokenizer = Tokenizer(tmp_path / "t", *options)
        assert tokenizer.decode(tokenizer.encode_prompt("Dan?")) == text
    for options, message in (
        (("on",), "--chat on: .* has no chat template"), (("auto", "", "on"), "has no such switch"),
        (("auto", "Be brief."), "without a chat template"), (("maybe",), "--chat maybe: expected one of"),
    ):
        with pytest.raises(InputError, match=message):
            Tokenizer(TEACHER, *options)


def test_further_stop_tokens_by_name_or_id():
    tokenizer = Tokenizer(TEACHER)
    assert tokenizer.stop_ids_of("") == () and tokenizer.stop_ids_of("<|endoftext|>, 17") == (0, 17)
    for name in ("<|nope|>", "644", "-1"):
        with pytest.raises(InputError, match="neither a special token"):
            tokenizer.stop_ids_of(name)


def test_a_tokenizer_of_another_kind_is_served_by_transformers(tmp_path, capsys):
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("▁Dan", -2.0), ("a", -3.0), ("n", -3.0)]
    other = RawTokenizer(models.Unigram(pieces, unk_id=0))
    other.pre_tokenizer, other.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    other.add_special_tokens(["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert "transformers encodes" in capsys.readouterr().out
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("Dan an</s>")
    assert ids == reference.encode("Dan an</s>", add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(tokenizer.encode("Dan an")) == "Dan an" and tokenizer.stop_ids == (5,)


def test_different_tokenizers_are_refused_by_the_first_id(tmp_path):
    shutil.copytree(TEACHER, tmp_path / "t")
    file = tmp_path / "t/tokenizer.json"
    spec = json.loads(file.read_text())
    vocab = spec["model"]["vocab"]
    (a, i), (b, j) = ((t, k) for t, k in vocab.items() if k in (300, 301))
    vocab[a], vocab[b] = j, i
    file.write_text(json.dumps(spec))
    check_same(Tokenizer(TEACHER), Tokenizer(TEACHER))
    with pytest.raises(InputError, match="id 300 is .* in .*teacher and"):
        check_same(Tokenizer(TEACHER), Tokenizer(tmp_path / "t"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="no tokenizer.json there"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{]")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(InputError, match="not a tokenizer this can read"):
        Tokenizer(tmp_path)


# --- the embedded task


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_of_the_embedded_task_is_the_independent_solution(split):
    for row in load_jsonl(HERE / f"chains/{split}.jsonl", need=("prompt", "answer", "solution")):
        assert solve(row["prompt"]) == int(row["answer"])
        assert is_correct(row["solution"], row["answer"])


def test_the_committed_data_is_what_prepare_writes():
    for split, count in (("train", 8000), ("test", 1000)):
        rows = load_jsonl(HERE / f"chains/{split}.jsonl")
        assert len(rows) == count and rows[:50] == prepare.make_rows(50, split, test=split == "test")


def test_no_arithmetic_of_the_test_set_occurs_in_training():
    """Parsed back from the text: the first number and the signed steps along the chain of each problem."""
    def arithmetic(prompt: str) -> tuple[int, ...]:
        *lines, question = prompt.strip().split("\n")
        rest = dict(line.split("=") for line in lines)
        steps, at = [], question.rstrip("?")
        while not rest[at].isdigit():
            at, step = rest[at][:3], rest[at][3:]
            steps.append(int(step))
        return (int(rest[at]), *reversed(steps))

    train, test = ({arithmetic(r["prompt"]) for r in load_jsonl(HERE / f"chains/{s}.jsonl")} for s in ("train", "test"))
    assert not train & test and len(test) > 500


def test_worse_manners_are_mostly_wrong_and_the_responses_are_long():
    tokenizer = Tokenizer(TEACHER)
    careful = prepare.make_rows(500, "a", test=False)
    lengths = sorted(len(tokenizer.encode(r["solution"])) + 1 for r in careful)
    assert sum(lengths) / 500 > 60 and lengths[449] > 100
    for mix, low, high in (((0, 1, 0), 0.3, 0.6), ((0, 0, 1), 0.05, 0.3)):
        rows = prepare.make_rows(500, "a", test=False, mix=mix)
        assert low < sum(is_correct(r["solution"], r["answer"]) for r in rows) / 500 < high


# --- walks, the second task


def follow(prompt: str) -> list[str]:
    """The lines of a walk, from the prompt's text alone."""
    *rules, start = prompt.strip().split("\n")
    rules = dict(line.split("=") for line in rules)
    name, rest = start.rstrip("?").split("=")
    value, limit = map(int, rest.split())
    lines = []
    while value < limit:
        after = value + int(rules[name][3:])
        lines.append(f"{name}={rules[name]}={value}{rules[name][3:]}={after}")
        name, value = rules[name][:3], after
    return [*lines, f"#### {value}"]


def test_a_walk_is_what_its_prompt_says():
    rows = walk.make_rows(300, "x", False, (1.0, 0.0, 0.0), slip=0.0)
    for row in rows:
        assert row["solution"].split("\n") == follow(row["prompt"])
        assert is_correct(row["solution"], row["answer"])
    lines = [len(follow(row["prompt"])) - 1 for row in rows]
    assert {4, 24} <= set(lines) <= set(range(4, 25)) and 12 < sum(lines) / 300 < 16
    test = walk.make_rows(300, "x", True, (1.0, 0.0, 0.0), slip=0.0)

    def arithmetic(row: dict) -> tuple:
        lines = follow(row["prompt"])[:-1]
        return row["prompt"].split()[-1], lines[0].split("=")[2][:-2], *(line.split("=")[1][3:] for line in lines)

    more = walk.make_rows(4000, "y", False, (1.0, 0.0, 0.0), slip=0.0)  # short walks come again under other names
    assert not set(map(arithmetic, more)) & set(map(arithmetic, test)) and len(set(map(arithmetic, more))) < 4000
    assert rows[:20] == walk.make_rows(20, "x", False, (1.0, 0.0, 0.0), slip=0.0)


def test_a_careful_walker_mends_every_slip_and_the_others_none():
    def wrong(line: str) -> bool:
        total, result = line.split("=")[-2:]
        at = max(total.rfind("+"), total.rfind("-"))
        return int(total[:at]) + int(total[at:]) != int(result)

    careful = walk.make_rows(300, "y", False, (1.0, 0.0, 0.0), slip=0.1)
    slips = 0
    for row in careful:
        lines = row["solution"].split("\n")
        for line, after in itertools.pairwise(lines[:-1]):
            if wrong(line):
                slips += 1
                assert line.rsplit("=", 1)[0] == after.rsplit("=", 1)[0] and not wrong(after)
        assert not wrong(lines[-2]) and is_correct(row["solution"], row["answer"])
    assert 0.06 < slips / sum(len(follow(r["prompt"])) for r in careful) < 0.12
    hasty = walk.make_rows(300, "y", False, (0.0, 0.0, 1.0))
    first = [r["solution"].split("\n")[0] for r in hasty]
    assert all(wrong(line) for line in first if line.split("=")[1][3] == "-" and not line.endswith("=0"))
    assert sum(is_correct(r["solution"], r["answer"]) for r in hasty) < 100


def test_a_template_that_refuses_is_reported(tmp_path):
    shutil.copytree(HERE / "chains/student", tmp_path / "c")
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    (tmp_path / "c/chat_template.jinja").write_text(template + "{{ messages[0]['content'] }}")
    assert Tokenizer(tmp_path / "c").encode_prompt("Dan?\n")
    with pytest.raises(InputError, match="its chat template cannot be used here .no system turns here"):
        Tokenizer(tmp_path / "c", system="Be brief.").encode_prompt("Dan?\n")


# --- data files and answers


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "a"', "line 2: not JSON"), ("[1]", "line 2: expected an object, found list"),
    ('{"prompt": "a"}', 'line 2: expected a string field "answer", found only prompt'),
    ('{"prompt": "a", "answer": 3}', 'line 2: expected a string field "answer", found int'),
])
def test_malformed_lines_are_named(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        load_jsonl(tmp_path / "x.jsonl")


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text"):
        load_jsonl(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no rows"):
        load_jsonl(tmp_path / "x.jsonl")


def test_line_separators_inside_a_string_do_not_split_it(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"prompt": "a\u2028b\x85c", "answer": ""}, ensure_ascii=False), encoding="utf-8"
    )
    assert load_jsonl(tmp_path / "x.jsonl")[0]["prompt"] == "a\u2028b\x85c"


def test_a_checkpoint_is_asked_as_it_was_taught(tmp_path, capsys):
    trained = {"thinking": "off", "system": "Think.", "chat": "auto"}
    (tmp_path / "state.json").write_text(json.dumps({"config": trained}))
    config = Config()
    config.typed = {"system"}  # --system '' was said
    prompted_as_trained(config, tmp_path)
    assert (config.thinking, config.system, config.chat) == ("off", "", "auto")
    assert capsys.readouterr().out == "prompts as in its training: --thinking off\n"
    prompted_as_trained(config, tmp_path / "none")  # a checkpoint from elsewhere
    assert config.thinking == "off"


def test_the_student_with_another_stop_is_the_same_but_for_that(tmp_path):
    other_stop.main(tmp_path / "out", 0.5)
    mine, theirs = (Transformer.from_pretrained(f) for f in (tmp_path / "out", HERE / "chains/student"))
    assert Tokenizer(tmp_path / "out").stop_ids == (0,) and Tokenizer(HERE / "chains/student").stop_ids == (2,)
    tokens = torch.randint(3, 600, (1, 30), generator=torch.Generator().manual_seed(0))
    a, b = (m(tokens)[0] @ m.head.T for m in (mine, theirs))
    assert torch.allclose(a[:, 3:], b[:, 3:]) and torch.allclose(a[:, 0], b[:, 2] / 2, atol=1e-5)
    assert torch.allclose(a[:, 2], b[:, 0], atol=1e-5)
