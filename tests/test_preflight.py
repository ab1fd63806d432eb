"""Each warning of the preflight, on a pair built to have the fault: models whose next token is a table of their
last."""

import json
import shutil

import pytest
import torch
from transformers import Qwen3Config

from data import HERE
from data.tokenizer import Tokenizer
from eval import Pair, preflight
from model import Transformer

PROMPT, VOCAB = "Dan=5\nDan?\n", 645
THINK, PAD, START, END = 644, 0, 1, 2


def markov(next_token: dict[int, int]) -> Transformer:
    """next_token[i] is what follows token i with a logit of 25 over the others: a fresh model's blocks add nothing, the
    embedding is the identity, and the head is the table."""
    model = Transformer(Qwen3Config(
        vocab_size=VOCAB, hidden_size=VOCAB, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=False)).initialize(0)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        model.model.norm.weight.fill_(25 / VOCAB**0.5)
        model.head.zero_()[[next_token.get(i, 300) for i in range(VOCAB)], range(VOCAB)] = 1.0
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded tokenizer with one more added token, <think>."""
    folder = tmp_path_factory.mktemp("pair") / "thinker"
    shutil.copytree(HERE / "chains/teacher", folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": THINK, "content": "<think>", **flags})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


@pytest.fixture
def check(tokenizer):
    """check(what the student answers, what the teacher would) -> (lines, warnings)"""
    end_of_prompt = tokenizer.encode_prompt(PROMPT)[-1]

    def check(student, teacher, teacher_tokenizer=tokenizer, stop_ids=(END,), tokenizer=tokenizer, stop_class=True):
        models = [markov(dict(zip((end_of_prompt, *tokens), tokens))) for tokens in (student, teacher)]
        pair = Pair(None, *models, tokenizer, teacher_tokenizer, VOCAB, stop_ids, stop_ids if stop_class else (),
                    torch.float32)
        ids = tokenizer.encode_prompt(PROMPT)
        row = {"prompt": PROMPT, "prompt_ids": ids, "teacher_ids": ids}
        lines = preflight(pair, [row] * 3, prefix_len=20, temperature=1.0, seed=0)
        warnings = [line.removeprefix("WARNING: ") for line in lines if line.startswith("WARNING: ")]
        return lines[: len(lines) - len(warnings)], warnings

    return check


def test_a_sound_pair_gives_no_warning(check):
    lines, warnings = check((300, 301, END), (300, 301, END))
    assert not warnings and "KL 0.00 nats" in lines[1] and "3 of 3 responses ended" in lines[2]


def test_models_that_merely_differ_give_no_warning(check):
    lines, warnings = check((300, 301, END), (302, 301, END))
    assert not warnings and "KL 24.99 nats" in lines[1]


def test_thinking_mode_mismatch_either_way(check):
    thinks, answers = (THINK, 300, END), (300, 301, END)
    assert "thinking-mode mismatch: the teacher opens with '<think>'" in check(answers, thinks)[1][0]
    assert "thinking-mode mismatch: the student opens with '<think>'" in check(thinks, answers)[1][0]


def test_template_mismatch_by_what_the_teacher_expects(check):
    assert check((300, END), (START, 300, END))[1][0].startswith(
        "template mismatch: the teacher expects '<|im_start|>'")


def test_template_mismatch_by_the_files(check, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "chatty")
    (tmp_path / "chatty/chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    other = Tokenizer(tmp_path / "chatty")
    assert "the teacher's own chat template would render" in check((300, END), (300, END), other)[1][0]
    assert not check((300, END), (300, END), other, tokenizer=other)[1]


@pytest.mark.parametrize("stop_class, effect", [(True, "this costs nothing"), (False, "responses will run to the cap")])
def test_stop_mismatch(check, stop_class, effect):
    lines, warnings = check((300, 301, PAD), (300, 301, END), stop_ids=(PAD, END), stop_class=stop_class)
    assert len(warnings) == 1 and effect in warnings[0]
    assert "the student ends with 0 '<|endoftext|>', the teacher with 2 '<|im_end|>'" in warnings[0]
    assert "0 '<|endoftext|>': student 1.0e+00, teacher 1.4e-11" in lines[2]
