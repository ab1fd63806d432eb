"""Each warning of the preflight, on a pair built to have the fault: models whose next token is a table of their
last."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from data import HERE
from data.diagnose import preflight
from data.tokenizer import Tokenizer

TEACHER = HERE / "chains/teacher"
THINK, PAD, START, END = 644, 0, 1, 2


class Markov:
    """next_token[i] is what follows token i with probability near 1; quacks like a Transformer."""

    def __init__(self, next_token: dict[int, int], vocab: int = 645):
        self.head = torch.eye(vocab)
        self.table = torch.zeros(vocab, vocab)
        for i in range(vocab):
            self.table[i, next_token.get(i, 300)] = 25.0
        self.config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=1)

    def __call__(self, tokens, positions=None, cache=None, slots=None):
        return self.table[tokens]


@pytest.fixture(autouse=True)
def no_copies(monkeypatch):
    """A table has no weights to lay out anew."""
    monkeypatch.setattr("sample.room_for_a_copy", lambda model: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded tokenizer with one more special token, <think>, and a chat template with the switch for it."""
    folder = tmp_path_factory.mktemp("pair") / "thinker"
    shutil.copytree(TEACHER, folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append({
        "id": THINK, "content": "<think>", "special": False, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False,
    })
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def with_template(folder, name: str, text: str):
    other = folder.parent / name
    shutil.copytree(folder, other, dirs_exist_ok=True)
    (other / "chat_template.jinja").write_text(text)
    return Tokenizer(other)


def look(student, teacher, tokenizer, teacher_tokenizer=None, stop_ids=(END,), stop_class=True):
    return preflight(
        student,
        teacher,
        tokenizer,
        teacher_tokenizer or tokenizer,
        ["Dan=5\nDan?\n"] * 3,
        stop_ids=stop_ids,
        vocab=645,
        stop_class=stop_class,
        max_new_tokens=20,
        seed=0,
    )


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


def chain(tokenizer, *tokens):
    """A model that answers the prompt with these tokens one after the other."""
    prompt_end = tokenizer.encode_prompt("Dan=5\nDan?\n")[-1]
    return Markov(dict(zip((prompt_end, *tokens), tokens)))


def test_a_sound_pair_gives_no_warning(tokenizer):
    lines, warnings = look(chain(tokenizer, 300, 301, END), chain(tokenizer, 300, 301, END), tokenizer)
    assert not warnings
    assert "KL 0.00 nats" in lines[1] and "3 of 3 rollouts ended" in lines[2]


def test_models_that_merely_differ_give_no_warning(tokenizer):
    lines, warnings = look(chain(tokenizer, 300, 301, END), chain(tokenizer, 302, 301, END), tokenizer)
    assert not warnings and "KL 2" in lines[1]


def test_thinking_mode_mismatch_either_way(tokenizer):
    thinks, answers = chain(tokenizer, THINK, 300, END), chain(tokenizer, 300, 301, END)
    assert "thinking-mode mismatch: the teacher opens with '<think>'" in look(answers, thinks, tokenizer)[1][0]
    assert "thinking-mode mismatch: the student opens with '<think>'" in look(thinks, answers, tokenizer)[1][0]


def test_template_mismatch_by_what_the_teacher_expects(tokenizer):
    warnings = look(chain(tokenizer, 300, END), chain(tokenizer, START, 300, END), tokenizer)[1]
    assert warnings[0].startswith("template mismatch: the teacher expects '<|im_start|>' next")


def test_template_mismatch_by_the_files(folder, tokenizer):
    theirs = with_template(folder, "chatty", "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    model = chain(tokenizer, 300, END)
    assert "the teacher's own chat template would render" in look(model, model, tokenizer, theirs)[1][0]
    assert not look(model, model, theirs, theirs)[1]


@pytest.mark.parametrize("stop_class, effect", [(True, "this costs nothing"), (False, "responses will run to the cap")])
def test_stop_mismatch(tokenizer, stop_class, effect):
    student, teacher = chain(tokenizer, 300, 301, PAD), chain(tokenizer, 300, 301, END)
    lines, warnings = look(student, teacher, tokenizer, stop_ids=(PAD, END), stop_class=stop_class)
    assert len(warnings) == 1 and effect in warnings[0]
    assert "the student ends with 0 '<|endoftext|>', the teacher with 2 '<|im_end|>'" in warnings[0]
    assert "0 '<|endoftext|>': student 1.0e+00, teacher 1.4e-11" in lines[2]
