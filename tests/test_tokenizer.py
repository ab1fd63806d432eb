"""Tokenizers and chat templates of the kinds that go wrong without a word: ids must be transformers' own.

The tokenizers are trained here on this repository's own texts; no real model's is committed.
"""

import json
import os
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data import HERE, InputError
from data.tokenizer import Clock, Tokenizer, as_trained, check_rendering, resume_clock
from tests.test_data import STYLES

REAL = Path(os.environ.get("SMOLLM2", HERE.parent.parent / "smollm2"))  # made by ../shared/models/get_smollm2.sh
QUESTIONS = HERE.parent.parent / "shared/data/gsm8k/test.jsonl"
PROSE = [p.read_text(encoding="utf-8") for p in (HERE.parent / "README.md", HERE / "answers.py")] + [
    "zqx helloworld zzq zq azqx"]
TEXTS = [
    "hello", "  hello\n    world  ", "\tif x:\n\t\treturn x  \n", "", " ", "\n\n", "What is 12+34?", "naïve — ﬁ ½ 三百",
    "a\u0338b \u0338c", "<b>tags</b> & 'quotes' \"too\"", "{{ m }} {% raw %}", "[INST] x [/INST]", "user\nassistant",
    "\ue000 \ue001", "👩‍👩‍👧‍👦 🏳️‍🌈", "x ?  y !", "\u0338", "a" * 300,
]


def byte_level() -> RawTokenizer:
    """A byte-level BPE in Llama 3's and Qwen's style."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = STYLES["llama3"], decoders.ByteLevel()
    raw.train_from_iterator(PROSE, trainers.BpeTrainer(
        vocab_size=800, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return raw


def metaspace(scheme: str) -> RawTokenizer:
    """A BPE of words in SentencePiece's style, with its bytes for other characters."""
    raw = RawTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    words = [space + word for text in PROSE for word in text.split() for space in ("", " ")]
    raw.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=["<unk>", *(f"<0x{b:02X}>" for b in range(256))]))
    return raw


def unigram() -> RawTokenizer:
    raw = RawTokenizer(models.Unigram())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.train_from_iterator(PROSE, trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", show_progress=False,
                                                           special_tokens=["<unk>"]))
    return raw


def every_way(raw: RawTokenizer) -> None:
    """All ways to make a token of two others become merges, in the order of the tokens, as in Llama 3's file."""
    spec = json.loads(raw.to_str())
    vocab = spec["model"]["vocab"]
    ways = [(vocab[t[:k] + t[k:]], vocab[t[:k]], vocab[t[k:]], [t[:k], t[k:]]) for t in vocab for k in range(1, len(t))
            if t[:k] in vocab and t[k:] in vocab]
    spec["model"] |= {"merges": [way for *_, way in sorted(ways)], "ignore_merges": True}
    return RawTokenizer.from_str(json.dumps(spec))


RAW = {
    "bytes": byte_level, "llama3": lambda: every_way(byte_level()),
    "first": lambda: metaspace("first"), "always": lambda: metaspace("always"), "never": lambda: metaspace("never"),
    "unigram": unigram,
}


def folder_of(folder: Path, raw: RawTokenizer, template: str = "", **config) -> Path:
    raw.add_special_tokens(["<s>", "</s>", "<|user|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", bos_token="<s>", **config)
    if template:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from a kind of tokenizer to its folder, trained once."""
    top, done = tmp_path_factory.mktemp("kinds"), {}

    def made(kind: str) -> Path:
        if kind not in done:
            done[kind] = folder_of(top / kind, RAW[kind]())
        return done[kind]

    return made


def theirs(reference, prompt: str, system: str = "") -> list[int]:
    turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}]
    return reference.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)


TEMPLATES = {
    "llama2": "{% for m in messages %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}{% endfor %}",
    "bos": "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endfor %}",
    "after special": "{% for m in messages %}{{ '<|user|>' + m.content + '</s>' }}{% endfor %}{{ '<|user|>' }}",
    "rstrip": "{% for m in messages %}{{ '<|user|>\\n' + m.content.rstrip() + '</s>\\n' }}{% endfor %}",
    "lstrip": "{% for m in messages %}{{ '<|user|> ' + m.content.lstrip() + ' </s>' }}{% endfor %}",
    "replace": "{% for m in messages %}{{ m.content.replace('\\n\\n', '\\n').replace('&', 'and') }}{% endfor %}",
    "lines": "{% for m in messages %}{% for l in m.content.split('\\n') %}> {{ l | trim }}\n{% endfor %}{% endfor %}",
    "cut": "{% for m in messages %}{{ m.content[:8] | upper }}|{% endfor %}",
    "condition": "{% for m in messages %}{% if 'world' in m.content %}W {% endif %}{{ m.content }}{% endfor %}",
    "twice": "{% for m in messages %}{{ m.content }} again: {{ m.content | title }}{% endfor %}",
    "json": "{{ messages | tojson }}",
}


@pytest.mark.parametrize("kind", RAW)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_rendered_as_transformers_renders_them(made, tmp_path, kind, template):
    folder = shutil.copytree(made(kind), tmp_path / "tokenizer")
    (folder / "chat_template.jinja").write_text(TEMPLATES[template])
    tokenizer, reference = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in TEXTS:
        assert tokenizer.encode_prompt(prompt) == theirs(reference, prompt), prompt
    check_rendering(tokenizer, TEXTS)


@pytest.mark.parametrize("kind", RAW)
def test_bare_prompts_are_encoded_as_transformers_encodes_them(made, tmp_path, kind):
    for opening in ("", "<s>"):
        folder = changed(made(kind), tmp_path / f"it{opening}", lambda spec, opening=opening: spec.update(
            post_processor=opening and json.loads(processors.TemplateProcessing(
                single=f"{opening} $A </s>", special_tokens=[(t["content"], t["id"]) for t in spec["added_tokens"]]
            ).__getstate__()) or None))
        tokenizer, reference = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        for prompt in TEXTS:
            assert tokenizer.encode_prompt(prompt) + [tokenizer.eos_id] * bool(opening) == reference(prompt).input_ids


@pytest.mark.parametrize("kind", [kind for kind in RAW if kind != "unigram"])  # which has no token for other characters
def test_special_tokens_in_a_prompt_stay_text(made, tmp_path, kind):
    folder = shutil.copytree(made(kind), tmp_path / "tokenizer")
    (folder / "chat_template.jinja").write_text(TEMPLATES["after special"])
    tokenizer = Tokenizer(folder)
    for prompt in ("a </s> b", "<|user|>", "</s></s> <s>\ue000", "<|user|>a<|user|>\ue000\ue001"):
        ids = tokenizer.encode_prompt(prompt)
        assert [ids.count(tokenizer.special[s]) for s in ("<|user|>", "</s>", "<s>")] == [2, 1, 0]
        text = tokenizer.decode(ids[1:-2]).strip()
        assert text == prompt, (text, prompt)
        assert ids[:1] + ids[-2:] == [tokenizer.special[s] for s in ("<|user|>", "</s>", "<|user|>")]


def test_a_difference_from_transformers_is_told_before_anything_is_trained(made):
    tokenizer = Tokenizer(made("bytes"))
    check_rendering(tokenizer, ["hello", "a </s> b"])
    tokenizer.hf.backend_tokenizer.normalizer = normalizers.Lowercase()  # as a faulty version might
    check_rendering(tokenizer, ["hello"])
    with pytest.raises(InputError, match="from token 0 on, 'Hello world' has ids .* transformers 5"):
        check_rendering(tokenizer, ["hello", "Hello world"])


@pytest.mark.skipif(not (REAL / "tokenizer.json").is_file(), reason="no real model's tokenizer is committed")
@pytest.mark.parametrize("template", [None, "after special", "rstrip", "lines"])
def test_a_real_tokenizer_agrees_with_transformers(tmp_path, template):
    for file in REAL.glob("*.json"):
        shutil.copy(file, tmp_path)
    if template:
        text = TEMPLATES[template].replace("<|user|>", "<|im_start|>user").replace("</s>", "<|im_end|>")
        (tmp_path / "chat_template.jinja").write_text(text)
    tokenizer, reference = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    questions = [json.loads(line)["question"] for line in QUESTIONS.open()][:300] if QUESTIONS.is_file() else []
    assert tokenizer.encoding is not None and tokenizer.chats()
    for text in TEXTS + PROSE + questions:
        assert tokenizer.encode_prompt(text) == theirs(reference, text), text
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)


# --- tiktoken or not


def changed(folder: Path, to: Path, change) -> Path:
    """A copy of a folder whose tokenizer.json `change` has been applied to."""
    shutil.copytree(folder, to)
    spec = json.loads((to / "tokenizer.json").read_text())
    change(spec)
    (to / "tokenizer.json").write_text(json.dumps(spec))
    return to


def agrees(folder: Path, tiktoken: bool) -> None:
    """Whether tiktoken serves it; ids and text are those of tokenizer.json in any case."""
    tokenizer, raw = Tokenizer(folder), RawTokenizer.from_file(str(folder / "tokenizer.json"))
    raw.encode_special_tokens = True
    raw.no_truncation()
    assert (tokenizer.encoding is not None) == tiktoken
    for text in TEXTS + PROSE + " ".join(PROSE).split():
        ids = raw.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == raw.decode(ids, skip_special_tokens=False)


def orphan(token: str):
    """Adds an entry that no merge makes."""
    def change(spec: dict) -> None:
        for t in spec["added_tokens"]:
            t["id"] += 1
        spec["model"]["vocab"][token] = len(spec["model"]["vocab"])
    return change


def unreachable(spec: dict) -> None:
    """Adds an entry whose one merge never comes about, since its characters merge otherwise before."""
    orphan("zqx")(spec)
    vocab, model = spec["model"]["vocab"], spec["model"]
    for t in spec["added_tokens"]:
        t["id"] += 2
    vocab["zqx"] += 2
    vocab |= {"qx": vocab["zqx"] - 2, "zq": vocab["zqx"] - 1}
    model["vocab"], model["merges"] = vocab, [*model["merges"], ["q", "x"], ["z", "q"], ["zq", "x"]]


def out_of_order(spec: dict) -> None:
    merges = spec["model"]["merges"]
    merges[10], merges[400] = merges[400], merges[10]


@pytest.mark.parametrize("kind, change, tiktoken", [
    ("bytes", lambda spec: None, True), ("llama3", lambda spec: None, True),
    ("bytes", orphan("Ġhelloworld"), False), ("bytes", orphan("zzq"), False), ("bytes", unreachable, False),
    ("llama3", orphan("Ġhelloworld"), True),  # found whole or not at all, by both
    ("llama3", orphan("zq"), False), ("llama3", unreachable, False), ("bytes", out_of_order, False),
    ("bytes", lambda spec: spec["model"].update(ignore_merges=True), True),
    ("bytes", lambda spec: spec.update(normalizer={"type": "NFC"}), True),
    ("bytes", lambda spec: spec.update(normalizer={"type": "NFKC"}), False),
    ("bytes", lambda spec: spec.update(truncation={
        "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}), True),
    ("bytes", lambda spec: spec["added_tokens"][2].update(rstrip=True), False),
    ("bytes", lambda spec: spec["added_tokens"][2].update(content="</s>\n"), False),
    ("first", lambda spec: None, False), ("always", lambda spec: None, False),
])
def test_tiktoken_serves_where_it_gives_the_same_ids(made, tmp_path, kind, change, tiktoken):
    agrees(changed(made(kind), tmp_path / "it", change), tiktoken)


def test_why_tiktoken_does_not_serve_is_said_once_for_a_folder(made, tmp_path, capsys):
    folder = changed(made("bytes"), tmp_path / "it", out_of_order)
    for chat in ("auto", "off"):
        Tokenizer(folder, chat)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "its merges are not in the order of its ids" in said


# --- what the files beside tokenizer.json add


def without(folder: Path, to: Path, *tokens: str) -> dict[str, int]:
    """A copy of a folder whose tokenizer.json has lost some of its added tokens; their ids."""
    found = {}

    def change(spec: dict) -> None:
        found.update({t["content"]: t["id"] for t in spec["added_tokens"] if t["content"] in tokens})
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in tokens]

    changed(folder, to, change)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (to / name).is_file():
            (to / name).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return found


def write(folder: Path, **files) -> None:
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))


FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("kind", ["bytes", "llama3", "first"])
@pytest.mark.parametrize("where", ["added_tokens", "decoder", "decoder, plain", "both", "extra"])
def test_added_tokens_that_only_other_files_declare_are_read(made, tmp_path, kind, where):
    folder = tmp_path / "it"
    ids = without(made(kind), folder, "</s>", "<|user|>")
    decoder = {str(i): {"content": t, "special": where != "decoder, plain", **FLAGS} for t, i in ids.items()}
    config = FAST | {"eos_token": "</s>"}
    write(folder, **{
        "added_tokens": {"tokenizer_config": config, "added_tokens": ids},
        "decoder": {"tokenizer_config": config | {"added_tokens_decoder": decoder}},
        "decoder, plain": {"tokenizer_config": config | {"added_tokens_decoder": decoder}},
        "both": {"tokenizer_config": config | {"added_tokens_decoder": decoder}, "added_tokens": ids},
        "extra": {"tokenizer_config": config | {"extra_special_tokens": ["<|user|>"]}},
    }[where])
    (folder / "chat_template.jinja").write_text(TEMPLATES["after special"])
    tokenizer, reference = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ids.items() <= tokenizer.special.items() and tokenizer.special == reference.added_tokens_encoder
    assert (tokenizer.stop_ids, tokenizer.eos_id) == ((ids["</s>"],), ids["</s>"])
    for prompt in [*TEXTS, "a plain <|user|> token"] if tokenizer.plain else TEXTS:
        assert tokenizer.encode_prompt(prompt) == theirs(reference, prompt), prompt
    tokenizer.save(tmp_path)
    assert Tokenizer(tmp_path).special == tokenizer.special


def test_an_added_token_with_an_id_of_its_own_is_refused_by_name(made, tmp_path):
    folder = tmp_path / "it"
    ids = without(made("bytes"), folder, "<|user|>")
    for files in ({"added_tokens": {"<|user|>": ids["<|user|>"] + 7}, "tokenizer_config": FAST},
                  {"tokenizer_config": FAST | {"added_tokens_decoder": {"2000": {"content": "<|user|>", **FLAGS}}}}):
        write(folder, **files)
        with pytest.raises(InputError, match=r"added token '<\|user\|>' is declared with the id"):
            Tokenizer(folder)


@pytest.mark.parametrize("files", [
    {"special_tokens_map": {"eos_token": "</s>"}},
    {"special_tokens_map": {"eos_token": {"content": "</s>", **FLAGS}}},
    {"special_tokens_map": {"eos_token": "</s>"}, "tokenizer_config": FAST | {"added_tokens_decoder": {}}},
    {"tokenizer_config": FAST | {"eos_token": {"content": "</s>", "__type": "AddedToken", **FLAGS}}},
])
def test_an_eos_is_read_from_wherever_it_is_declared(made, tmp_path, files):
    folder = shutil.copytree(made("bytes"), tmp_path / "it")
    write(folder, tokenizer_config=FAST)
    with pytest.raises(InputError, match="none of its files declares an end-of-sequence token"):
        Tokenizer(folder)
    write(folder, **files)
    tokenizer = Tokenizer(folder)
    assert tokenizer.stop_ids == (tokenizer.special["</s>"],) and tokenizer.eos_id == tokenizer.special["</s>"]


# --- the clock


DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}{% for m in messages %}{{ '<|user|>' + m.content }}{% endfor %}"


def test_a_run_renders_its_prompts_at_one_moment_whenever_it_goes_on(made, tmp_path, monkeypatch):
    folder = shutil.copytree(made("bytes"), tmp_path / "it")
    (folder / "chat_template.jinja").write_text(DATED)
    monkeypatch.setattr(Clock, "moment", datetime(2024, 12, 31, 23, 59, 59))
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode_prompt("hi")) == "31 Dec 2024 23:59:59<|user|>hi"
    assert tokenizer.encode_prompt("hi") == theirs(tokenizer.hf, "hi")  # at the same moment
    state = json.loads(json.dumps({"config": {}, "inputs": {"surroundings of prompts": tokenizer.surroundings()}}))
    monkeypatch.setattr(Clock, "moment", datetime(2025, 6, 1))  # another day
    assert tokenizer.surroundings() != state["inputs"]["surroundings of prompts"]
    resume_clock(state)
    assert tokenizer.surroundings() == state["inputs"]["surroundings of prompts"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr(Clock, "moment", datetime(2025, 6, 1))
    as_trained(type("Config", (), {"typed": set()})(), tmp_path)
    assert tokenizer.decode(tokenizer.encode_prompt("hi")).startswith("31 Dec 2024")
    resume_clock({})  # a run from before there was a clock


@pytest.mark.parametrize("change", [
    lambda folder: (folder / "chat_template.jinja").write_text(TEMPLATES["llama2"]),
    lambda folder: out_of_place(folder),
])
def test_the_surroundings_of_a_prompt_change_with_the_template_and_the_tokenizer(made, tmp_path, change):
    folder = shutil.copytree(made("bytes"), tmp_path / "it")
    (folder / "chat_template.jinja").write_text(TEMPLATES["after special"])
    before = Tokenizer(folder).surroundings()
    assert Tokenizer(folder).surroundings() == before
    assert Tokenizer(folder, chat="off").surroundings() != before
    change(folder)
    assert Tokenizer(folder).surroundings() != before


def out_of_place(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"][1]["content"], spec["added_tokens"][2]["content"] = "<|user|>", "</s>"
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@pytest.mark.parametrize("template, message", [
    ("{{ 1/0 }}", "ZeroDivisionError"), ("{{ 'a'+5 }}", "TypeError"), ("{{ strftime_now(5) }}", "TypeError"),
    ("{{ raise_exception('no such turn') }}", "no such turn"), ("{% include 'x' %}", "TypeError"),
    ("{% if 1 %}", "TemplateSyntaxError"), ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"), ("{{ nothing.at.all }}", "UndefinedError"),
])
def test_a_template_that_fails_is_one_line(made, tmp_path, template, message):
    folder = shutil.copytree(made("bytes"), tmp_path / "it")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=f"its chat template fails .*{message}"):
        Tokenizer(folder).encode_prompt("hi")
