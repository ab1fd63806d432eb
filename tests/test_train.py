"""train.py: a step against its definition, the prefix's schedule, and whole runs: their log, their resumption, their
failures."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import sample
import train
from data import HERE, InputError, load_jsonl, read_json
from data.chains import other_stop
from data.flags import parse_flags
from data.run import checkpoints, read_log
from data.tokenizer import Tokenizer
from eval import Pair, encode_prompts
from model import Transformer, count_flops, count_parameters
from sample import Rollout, generate
from tests.reference import dense_loss
from train import Config

ROOT = Path(train.__file__).parent
STUDENT, TEACHER = HERE / "chains/student", HERE / "chains/teacher"
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # float64 in one_step
TINY = ("--data", "chains", "--device", "cpu", "--steps", "3", "--batch_size", "6", "--micro_tokens", "200",
        "--prefix_len", "20", "--lr_schedule", "constant", "--eval_problems", "8", "--eval_kl", "8",
        "--max_new_tokens", "60")
PAIR = f"--student {STUDENT} --teacher {TEACHER}"
BLIND = ("--eval_problems", "0", "--eval_kl", "0")


@pytest.fixture(autouse=True)
def ctrl_c():
    """A run takes Ctrl-C for itself: give it back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(*flags) -> None:
    train.train(parse_flags(Config, "", [str(f) for f in flags]))


# --- the gradient of a step


def make_pair(student: Transformer, teacher: Transformer) -> Pair:
    tokenizer = Tokenizer(STUDENT)
    student.vocab = teacher.vocab = 644
    return Pair(student, student, teacher.requires_grad_(False), tokenizer, tokenizer, 644, tokenizer.stop_ids,
                tokenizer.stop_ids, student.head.dtype)


@pytest.fixture(scope="module")
def models():
    return [Transformer.from_pretrained(f, dtype=torch.float64) for f in (STUDENT, TEACHER)]


@pytest.fixture(scope="module")
def pair(models):
    return make_pair(*models)


@pytest.fixture(scope="module")
def problems(pair):
    rows = load_jsonl(HERE / "chains/train.jsonl")[:10]
    encode_prompts(rows, pair.tokenizer, 644, "--data")
    return rows


def respond(problems, pair, **flags) -> Rollout:
    config = Config(**{"prefix_len": 40, "max_new_tokens": 40, **flags})
    return train.respond(problems, 0, config.prefix_len, config, pair)


@pytest.fixture
def one_step(pair, monkeypatch, tmp_path):
    """one_step(rollout, ...) -> (gradient by name, statistics by token) of a step of train.train on it, in float64 and
    at a rate that moves no weight."""
    def one_step(rollout: Rollout, pair: Pair = pair, **flags) -> tuple[dict, dict]:
        gradient, log_step, stats = {}, train.log_step, {}

        def clip(parameters, most):
            assert most == 1.0
            gradient.update({name: p.grad.clone() for name, p in pair.student.named_parameters()})
            return torch.tensor(1.0)

        with monkeypatch.context() as m:
            m.setattr(train, "load_pair", lambda *_: pair)
            m.setattr(train, "respond", lambda *_: rollout)
            m.setattr(train, "preflight", lambda *_: [])
            m.setattr(train, "log_step", lambda *args: stats.update(args[3]) or log_step(*args))
            m.setattr(torch.nn.utils, "clip_grad_norm_", clip)
            train.train(Config(**{"data": "chains", "out_dir": str(tmp_path / "step"), "overwrite": True, "steps": 1,
                                  "lr": 1e-30, "warmup": 0, "eval_problems": 0, "eval_kl": 0, **flags}))
        return gradient, stats

    return one_step


@pytest.mark.parametrize("window", ["prefix", "first", "last", "random"])
def test_the_gradient_is_that_of_the_definition(one_step, models, pair, problems, window):
    """One row at a time, no padding, all logits, the divergence from its definition, autograd; however it is split."""
    rollout = respond(problems, pair, window=window, prefix_len=40 if window == "prefix" else 7)
    assert 0 < rollout.finished.sum() < 10  # some are cut, some have ended
    gradient, stats = one_step(rollout)
    for micro_tokens in (1, 300):
        parts, _ = one_step(rollout, micro_tokens=micro_tokens)
        assert all(torch.allclose(g, parts[name], rtol=1e-8, atol=1e-12) for name, g in gradient.items())
    student, total = models[0], 0.0
    student.zero_grad(set_to_none=True)
    for i, (start, n) in enumerate(zip(rollout.prompt_lens.tolist(), rollout.lens.tolist())):
        tokens, (first, last) = rollout.tokens[i : i + 1, : start + n], rollout.supervised[i].tolist()
        assert last - first == min(40 if window == "prefix" else 7, n) and 0 <= first <= last <= n
        assert window == "random" or (last == n if window == "last" else first == 0)
        log_p, log_q = ((m(tokens) @ m.head[: pair.vocab].T).log_softmax(-1)[0, start - 1 :] for m in models)
        total = total + (log_p.exp() * (log_p - log_q.detach())).sum(-1)[first:last].sum()
    assert window != "random" or len(set(rollout.supervised[:, 0].tolist())) > 1
    loss = total / rollout.num_supervised()
    loss.backward()
    assert abs(stats["loss"].mean() - loss) < 1e-9 and len(stats["kl"]) == rollout.num_supervised()
    assert all(torch.allclose(p.grad, gradient[n], rtol=1e-6, atol=1e-10) for n, p in student.named_parameters())
    student.zero_grad(set_to_none=True)
    if window == "prefix":  # positions count from the first response token
        counts = torch.bincount(stats["position"]).tolist()
        assert counts == [int((rollout.lens > i).sum()) for i in range(int(rollout.lens.max()))]


def test_padding_rows_of_either_head_change_nothing(one_step, models, pair, problems):
    """Same tokenizer, heads padded to different sizes, and what is in the padding is wild."""
    rollout, wide = respond(problems, pair), []
    expected, stats = one_step(rollout)
    for model, rows in zip(models, (30, 75)):
        settings = model.config.to_dict() | {"vocab_size": len(model.head) + rows}
        copy, weights = Transformer(model.config.__class__.from_dict(settings)), model.state_dict()
        padding = 100 * torch.randn(rows, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).double()
        weights["model.embed_tokens.weight"] = torch.cat([model.head.detach(), padding])
        copy.double().load_state_dict(weights)
        wide.append(copy)
    wide = make_pair(*wide)
    found, wide_stats = one_step(rollout, wide)
    assert torch.allclose(stats["kl"], wide_stats["kl"], atol=1e-12)
    assert all(torch.allclose(found[n][: len(g)], g, rtol=1e-8, atol=1e-12) for n, g in expected.items())
    assert not found["model.embed_tokens.weight"][len(expected["model.embed_tokens.weight"]) :].any()
    assert torch.equal(respond(problems, wide).tokens, rollout.tokens)


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_hidden_states_that_are_not_finite_are_named(one_step, pair, problems, broken):
    rollout = respond(problems, pair)
    pair = make_pair(*(Transformer.from_pretrained(f, dtype=torch.float64) for f in (STUDENT, TEACHER)))
    with torch.no_grad():
        pair.student.model.norm.weight[3] = math.nan if broken == "student" else 1.0
        pair.teacher.model.norm.weight[3] = math.nan if broken == "teacher" else 1.0
    found = generate(pair.student if broken == "student" else pair.teacher, [[5, 6]], 2, (2,))  # no invented id
    assert 0 <= found.tokens.min() and found.tokens.max() < pair.vocab
    with pytest.raises(InputError, match=r"step 1: the loss is not finite at response positions \[0, 1, 2, 3, 4\], "
                       f"nor is what the {broken} says there; nothing was saved. Lower --lr, .*in another run$"):
        one_step(rollout, pair)


@pytest.mark.parametrize("stop_class", [True, False])
def test_every_flag_reaches_what_it_is_for(stop_class, tmp_path, monkeypatch):
    """A pair with two stops, two templates and wild padding, and few flags at their defaults: one step, by the real
    loading, against the definition."""
    folders, asked = [tmp_path / "student", shutil.copytree(TEACHER, tmp_path / "teacher")], []
    other_stop.main(folders[0], 0.5)
    for folder, text in zip(folders, ("{% if enable_thinking %}Dan=1\n{% else %}Eve=2\n{% endif %}", "Fay=3\n")):
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}" + text)
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"][644:] = 100.0
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def recorded(name: str, inner):
        def call(*args, **options):
            found = inner(*args, **options)
            asked.append((name, args, options, found))
            return found
        return call

    with monkeypatch.context() as m:
        for module, name in ((train, "generate"), (evaluation, "generate"), (train, "score"), (train, "log_step"),
                             (train, "check_rendering")):
            m.setattr(module, name, recorded(name, getattr(module, name)))
        m.setattr(train, "evaluate", recorded("evaluate", train.evaluate))
        run(*TINY, "--student", folders[0], "--teacher", folders[1], "--thinking", "on", "--system", "Ida=4\n",
            "--eval_batch_size", "5", "--steps", "1", "--lr", "1e-30", "--temperature", "0.7", "--loss", "jsd",
            "--beta", "0.3", "--stop_class", stop_class, "--out_dir", tmp_path / "out")
    calls = {name: [call[1:] for call in asked if call[0] == name] for name, *_ in asked}
    _, pair, rollout, stats, *_ = calls["log_step"][0][0]
    ids, student, teacher = rollout.tokens, pair.student, pair.teacher
    prompt = pair.tokenizer.decode(ids[0, : rollout.prompt_lens[0]].tolist())
    assert prompt.startswith("Ida=4\n") and prompt.endswith("?\nDan=1\n")  # to the teacher, too
    assert torch.equal(rollout.for_teacher.tokens, ids)
    assert pair.stop_ids == (0, 2) and pair.vocab == student.vocab == teacher.vocab == 644 and len(student.head) == 704
    assert [args[0] for args, *_ in calls["check_rendering"]] == [pair.tokenizer, pair.teacher_tokenizer]
    for args, options, _ in calls["generate"]:  # training, and evaluations: at the temperature of the loss, uncut
        cut = (*args[5:], options.get("top_k"), options.get("top_p"))
        assert options.get("temperature", args[4] if len(args) > 4 else None) == 0.7 and not any(cut)
    merged = (0, 2) if stop_class else ()

    def by_definition(rollout: Rollout, **how) -> float:
        """The sum of a divergence over a rollout's tokens."""
        total = 0.0
        for i, (start, n) in enumerate(zip(rollout.prompt_lens, rollout.lens)):
            hidden_s, hidden_t = (model(rollout.tokens)[i, start - 1 : start + n - 1] for model in (student, teacher))
            total += dense_loss(hidden_s, student.head, hidden_t, teacher.head, temperature=0.7, vocab=644,
                                stop_ids=merged, token_weights=1, **how).item()
        return total

    assert stats["loss"].sum() == pytest.approx(by_definition(rollout, loss="jsd", beta=0.3), rel=1e-4)
    _, step, record = read_log(tmp_path / "out/log.jsonl")
    assert step["tokens"] == rollout.lens.sum() and step["response_len"] == rollout.lens.double().mean()
    assert step["finish"] == rollout.finished.double().mean() and step["loss"] == stats["loss"].double().mean()
    # an evaluation: the KL of its own responses, and what they would have cost
    (_, _, test), options, (_, answers) = calls["evaluate"][-1]
    (seen, *_), _, found = calls["score"][-1]
    assert options["slots"] == 5 and [seen.response(i) for i in range(8)] == [answer["ids"] for answer in answers]
    assert [seen.tokens[i, :n].tolist() for i, n in enumerate(seen.prompt_lens)] == [row["prompt_ids"] for row in test]
    costs = [k * count_flops(model.config, seen.prompt_lens + seen.lens - 1, int(seen.lens.sum()))
             for k, model in ((4, student), (1, teacher))]  # sampling, forward and backward; scoring
    assert record["flop_per_whole_response"] == pytest.approx(sum(costs) / len(seen.lens), rel=1e-9)
    kl = found["kl"]
    assert record["kl"] == pytest.approx(by_definition(seen, loss="reverse_kl") / int(seen.lens.sum()), rel=1e-4)
    assert record["kl_in_prefix"] == pytest.approx((kl[found["position"] < 20].sum() / kl.sum()).item(), rel=1e-6)


# --- how long the prefix is


def test_the_prefix_of_every_step():
    def schedule(**flags):
        config = Config(prefix_start=10, prefix_len=110, steps=11, **flags)
        return [train.prefix_len_at(step, config, {"prefix_len": 33}) for step in range(13)]

    assert schedule() == [110] * 13 and schedule(schedule="adaptive") == [33] * 13
    assert schedule(schedule="linear") == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 110, 110]
    with pytest.raises(NotImplementedError, match="square"):
        train.prefix_len_at(0, Config(schedule="square"), {})
    assert train.prefix_len_at(0, Config(schedule="linear", steps=1, prefix_start=4, prefix_len=8), {}) == 4
    for length, start in ((1024, 64), (5, 1)):
        train.fill_in(config := Config(data="chains", prefix_len=length))
        assert config.prefix_start == start


def test_the_adaptive_prefix_grows_when_its_edge_is_learnt_and_reached():
    config, position = Config(prefix_start=8, prefix_len=20, schedule="adaptive"), torch.arange(10)

    def follow(edges, reached=25):
        state, seen, lens = {"prefix_len": 8, "smooth": None}, [], torch.tensor([20] * reached + [3] * (100 - reached))
        for edge in edges:
            kl = torch.where((position < 4) | (position >= 8), 100.0, edge)  # nothing but the last half counts
            state = train.grow(state, kl, position, lens, config)
            seen.append(state["prefix_len"])
        return seen

    assert follow([0.8**i for i in range(10)]) == [8] * 10  # still falling
    assert follow([0.5**i for i in range(5)]) == [8, 8, 8, 8, 12]  # down to a tenth
    assert follow([1.0] * 4) == [8, 8, 8, 12]  # three steps without a fall
    assert follow([1.0] * 12, reached=24) == [8] * 12  # responses end before
    assert follow([1.0] * 20)[-1] <= 20
    state = {"prefix_len": 8, "smooth": 1.0, "first": 1.0, "lowest": 1.0, "waited": 2}
    assert train.grow(state, torch.ones(2), torch.tensor([0, 1]), torch.full((4,), 8), config) == state


# --- who writes the responses


def test_mix_takes_a_share_of_the_rows_from_the_teacher(pair, problems):
    rollout = respond(problems, pair, prefix_len=30, mix=0.3, max_new_tokens=200)
    teacher = respond(problems, pair, prefix_len=200, rollout="teacher")
    student = respond(problems, pair, prefix_len=30)
    assert int(teacher.lens[:3].max()) > 30  # whole, where the student's are cut
    assert [rollout.response(i) for i in range(10)] == [(teacher if i < 3 else student).response(i) for i in range(10)]
    assert rollout.supervised.tolist() == [[0, n] for n in rollout.lens]  # the teacher's tokens are learned from too


def test_the_datas_own_solutions_end_where_they_end(pair, problems):
    config, rows = Config(data="chains", rollout="data", prefix_len=50), [dict(row) for row in problems]
    train.prepare_prompts(config, rows, [], pair)
    rollout = train.respond(rows, 0, 50, config, pair)
    whole = [[*pair.tokenizer.encode(row["solution"]), pair.tokenizer.eos_id] for row in rows]
    assert [rollout.response(i) for i in range(10)] == [ids[:50] for ids in whole]
    assert rollout.finished.tolist() == [len(ids) <= 50 for ids in whole] and 0 < rollout.finished.sum() < 10


def test_a_random_window_starts_everywhere(pair, problems):
    config = Config(data="chains", rollout="data", window="random", prefix_len=1, max_new_tokens=3)
    rows = [row | {"solution_ids": [5, 6, 7]} for row in problems] * 100
    starts = train.respond(rows, 0, 1, config, pair).supervised[:, 0]
    assert min(torch.bincount(starts, minlength=3).tolist()) > 250


def test_fresh_weights_come_from_the_seed():
    fresh = [train.load_pair(Config(student=str(STUDENT), init="random", seed=seed, device="cpu"), None).student
             for seed in (3, 3, 4)]
    same = [torch.equal(fresh[0].head, other.head) for other in fresh]
    assert same == [True, True, False]


def test_every_step_and_every_seed_has_noise_of_its_own(pair, problems):
    texts = [train.respond(problems, step, 40, Config(prefix_len=40, seed=seed), pair).tokens.tolist()
             for step, seed in ((0, 3), (0, 3), (1, 3), (0, 4))]
    assert texts[0] == texts[1] and len({str(text) for text in texts}) == 3


def test_the_rate_of_every_step():
    config = Config(steps=10, warmup=2, lr=1.0)
    rates = [train.learning_rate(step, config) for step in (0, 1, 2, 6, 9)]
    assert rates == pytest.approx([0.5, 1, 1, 0.5, 0.0381], abs=1e-4)
    assert train.learning_rate(9, replace(config, lr_schedule="constant")) == 1.0


def test_the_optimizer_is_adamw_at_the_logged_rates(tmp_path, monkeypatch):
    gradients, clip = [], torch.nn.utils.clip_grad_norm_

    def clipped(parameters, most):
        norm = clip(parameters := [*parameters], most)
        gradients.append([p.grad.clone() for p in parameters])
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    run(*TINY, *BLIND, "--out_dir", tmp_path)
    weights, saved = ([*Transformer.from_pretrained(f).parameters()] for f in (STUDENT, tmp_path / "step_000003"))
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0, fused=True)
    for lr, gradient in zip((2.5e-4, 5e-4, 5e-4), gradients, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for w, g in zip(weights, gradient):
            w.grad = g
        optimizer.step()
    assert all(torch.allclose(w, p, rtol=0, atol=1e-7) for w, p in zip(weights, saved, strict=True))


def test_every_epoch_sees_every_row_once():
    rows, config = list(range(10)), Config(batch_size=4, seed=3)
    seen = [r for s in range(5) for r in train.batch_of(rows, s, config)]
    assert sorted(seen[:10]) == rows and sorted(seen[10:20]) == rows and seen[:10] != seen[10:20]
    assert train.batch_of(rows, 2, config) == seen[8:12]
    assert train.batch_of(rows, 2, replace(config, seed=4)) != seen[8:12]


# --- what a step costs


def test_flop_follow_the_tokens(pair, problems):
    whole, part = respond(problems, pair), respond(problems, pair, window="first", prefix_len=7)
    read, expected = [int(p + n) - 1 for p, n in zip(whole.prompt_lens, whole.lens)], 0.0
    for tokens, n in zip(read, whole.lens.tolist()):
        expected += count_flops(pair.teacher.config, torch.tensor([tokens]), n)
    cost, n = train.step_flops(pair, whole, Config()), whole.num_supervised()
    assert cost["flop_teacher"] == pytest.approx(expected, rel=1e-12)
    assert cost["flop_sample"] == pytest.approx(cost["flop_student"] / 3, rel=1e-12)  # one forward
    assert cost["flop_student"] == pytest.approx(3 * count_flops(pair.student.config, torch.tensor(read), n), rel=1e-12)
    # what follows the window costs nothing
    assert torch.equal(whole.tokens, part.tokens)
    widths = [part.part(rows, "cpu")[0].shape[1] for rows in part.micro_batches(300)]
    assert max(widths) == int(part.prompt_lens.max()) + 7 - 1
    less = train.step_flops(pair, part, Config())
    assert less["flop_student"] < cost["flop_student"] and less["flop_teacher"] < cost["flop_teacher"]


def test_plan_needs_nothing_but_two_configurations(tmp_path, capsys):
    for name, folder in (("student", STUDENT), ("teacher", TEACHER)):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "config.json", tmp_path / name)
    flags = ("--plan", "--student", tmp_path / "student", "--teacher", tmp_path / "teacher", "--batch_size", "10",
             "--max_new_tokens", "1000", "--micro_tokens", "20000", "--data", "chains", "--device", "cpu")
    run(*flags, "--prefix_len", "100")
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.endswith("x")]
    table = {int(r[0].replace(",", "")): [float(x.strip("x").replace(",", "")) for x in r[1:]] for r in rows}
    assert {100, 1000, 500, 7} <= set(table) and table[1000][-1] == 1.0
    student, teacher = (Transformer.from_pretrained(f) for f in (STUDENT, TEACHER))
    fed, heads = 163, 100  # tokens that a row feeds to each model, positions scored
    one = [count_flops(m.config, torch.tensor([fed]), heads) for m in (student, teacher, student)]
    assert table[100][:3] == pytest.approx([10 * one[0] / 1e12, 10 * one[1] / 1e12, 30 * one[2] / 1e12], rel=1e-3)
    assert table[100][-1] == pytest.approx(table[1000][3] / table[100][3], abs=0.05)
    assert f"{count_parameters(student.config):,} parameters" in said and "547,936" in said
    run(*flags, "--prefix_len", "3000")  # longer than --max_new_tokens, which does not cut it
    assert re.search(r"^ +3,000 .* 1\.0x$", capsys.readouterr().out, re.MULTILINE)
    itself = ("--plan", "--data", "chains", "--teacher", STUDENT, "--prefix_len", "100", "--batch_size", "10")
    asked = {}  # a student that is its own teacher caches its own prompts, not the longer ones that the teacher reads
    for template in ("", "{prompt}{solution}"):
        run(*itself, "--teacher_prompt", template)
        asked[template] = re.search(r"KV cache +([\d.]+)", capsys.readouterr().out)[1]
    assert len({*asked.values()}) == 1
    with pytest.raises(InputError, match="--lr must be above 0, found 0"):  # also from Python
        train.train(Config(lr=0))

    memory = {m[1].strip(): float(m[2]) for m in re.finditer(r"^  (\D+?) +([\d.]+)$", said, re.MULTILINE)}
    kept, weights = {}, {p.data_ptr() for p in student.parameters()}  # what autograd keeps, by storage
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.update({x.untyped_storage().data_ptr(): x}) or x, lambda x: x):
        student(torch.zeros(4, 100, dtype=torch.long))
    found = sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in weights)
    assert memory["activations kept for backward"] * 1e9 == pytest.approx(found / 400 * 20_000, rel=0.06)
    cache = 10 * (64 + 100) * 4 * 2 * 2 * 32 * 4  # rows, positions, layers, keys and values, heads, size, bytes
    assert memory["KV cache"] * 1e9 == pytest.approx(cache, abs=6e5)
    assert memory["student: AdamW's moments"] * 1e9 == pytest.approx(8 * 547_936, abs=6e5)
    assert memory["in all, while sampling"] < memory["in all, while learning"] < 3


def test_the_plan_of_several_devices(capsys):
    """A shard holds its part of the weights; what a rank samples from, reads and caches stays whole."""
    def plan(*flags) -> dict:
        run("--plan", "--data", "chains", "--batch_size", "64", *flags)
        lines = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        return {line[0].strip(): float(line[1]) for line in lines if line[1][0].isdigit() and "x" not in line[1]}

    one, many = plan(), plan("--shard", "4", "--world", "8", "--shard_teacher")
    assert many["KV cache"] == pytest.approx(one["KV cache"] / 8, abs=1e-3)
    assert many["gradients"] == pytest.approx(one["gradients"] / 4, abs=1e-3)
    assert many["student: copy that samples"] > one["student: copy that samples"] == 0  # a whole student samples itself
    assert many["weights gathered by --shard"] > one["weights gathered by --shard"] == 0
    assert many["in all, while learning"] < one["in all, while learning"]
    assert many["KV cache of evaluation"] == pytest.approx(one["KV cache of evaluation"] * 13 / 100, abs=1e-3)
    none, few = plan("--eval_problems", "0", "--eval_kl", "0"), plan("--eval_problems", "0")  # 32 of --eval_kl
    assert "in all, while evaluating" not in none and few["KV cache of evaluation"] < one["KV cache of evaluation"]


def test_the_plan_of_a_window_counts_what_is_sampled_and_read(capsys):
    found = {}
    for window in ("prefix", "first", "random"):
        run("--plan", "--data", "chains", "--prefix_len", "16", "--max_new_tokens", "256", "--window", window)
        row, = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("          16 "))
        found[window] = [float(x) for x in row[1:4]]
    assert found["prefix"][0] < found["first"][0] == found["random"][0]
    assert found["prefix"][1:] == found["first"][1:] and found["first"][1] < found["random"][1]
    run("--plan", "--data", "chains", "--prefix_len", "1024", "--max_new_tokens", "256", "--window", "last")
    said = capsys.readouterr().out
    assert "whole responses of 256" in said and "windows of prefix_len" in said and "\n       1,024 " not in said


def test_the_plan_of_supervised_training_has_no_teacher_and_no_sampling(capsys):
    run("--plan", "--data", "chains", "--rollout", "data", "--loss", "cross_entropy")
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.endswith("x")]
    assert "teacher" not in said.split("\n")[0] and rows and all(float(row[2]) == 0 for row in rows)
    assert all(float(row[1]) == 0 for row in rows)


# --- whole runs


def records(out: Path) -> list[dict]:
    """The log without what a clock or the operating system says."""
    def clock(key):
        return "second" in key or "per_s" in key or key == "peak_memory"

    return [{k: v for k, v in r.items() if not clock(k)} for r in read_log(out / "log.jsonl")]


def same_weights(a: Path, b: Path) -> bool:
    for name in ("model.safetensors", "optimizer.safetensors"):
        x, y = load_file(a / name), load_file(b / name)
        if x.keys() != y.keys() or not all(torch.equal(x[key], y[key]) for key in x):
            return False
    return True


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run, made as a user makes it, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    command = [sys.executable, "train.py", *TINY, "--out_dir", out]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return out, result.stdout + result.stderr


def test_train_prints_and_logs_what_the_readme_promises(finished):
    out, said = finished
    for text in ("step 0, 8 held-out problems: accuracy", "the first 20 tokens hold", "step 1: loss", "KL to the",
                 "sampled accuracy:", "P(finish):", "seconds: sampling", "TFLOP", "checkpoint", "tok/s", "talk to it"):
        assert text in said, text
    assert "\r" not in said and len(said.splitlines()) < 60  # no bars in a file
    before, *steps, after = read_log(out / "log.jsonl")
    cut = 1 - sum(r["finish"] for r in steps) / 3
    for text in (f"loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}", f"cut {cut:.0%} of the responses",
                 f"{before['accuracy']:.3f} -> {after['accuracy']:.3f}", f"{before['kl']:.3f} -> {after['kl']:.3f}"):
        assert text in said, text
    assert [r["step"] for r in steps] == [1, 2, 3] and [r["lr"] for r in steps] == [2.5e-4, 5e-4, 5e-4]
    assert all(r["kl"] >= 0 and r["response_len"] <= 20 for r in steps)
    evaluations = [r for r in read_log(out / "log.jsonl") if "eval" in r]
    assert [r["step"] for r in evaluations] == [0, 3]
    assert all(0 < r["kl_in_prefix"] <= 1 and r["kl"] > 0 and r["flop_per_whole_response"] > 0 for r in evaluations)


def test_every_number_of_the_log_is_explained(finished):
    glossary = (HERE / "readme.md").read_text()
    records = read_log(finished[0] / "log.jsonl")
    assert not [key for record in records for key in record if f"`{key}`" not in glossary]


@pytest.mark.parametrize("flags", [
    ("--schedule", "linear", "--prefix_start", "4"),
    ("--schedule", "adaptive", "--prefix_start", "4", "--steps", "6", "--lr", "1e-9"),  # grows when nothing falls
    ("--window", "random", "--max_new_tokens", "40"),
    ("--mix", "0.5", "--dtype", "bfloat16"),
    ("--init", "random"),
])
def test_a_resumed_run_equals_one_left_alone(flags, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(*TINY, *BLIND, *flags, "--save_every", "2", "--out_dir", whole)
    shutil.copytree(whole, cut)
    last = checkpoints(whole)[-1].name
    shutil.rmtree(cut / last)
    run("--resume", "--out_dir", cut)  # the other flags are the run's own
    assert records(whole) == records(cut) and same_weights(whole / last, cut / last)
    lengths = [r["prefix_len"] for r in records(whole)]
    assert lengths == ([4, 12, 20] if "linear" in flags else [4, 4, 4, 4, 6, 6] if "adaptive" in flags else [20] * 3)
    assert "--window" not in flags or all(r["tokens"] <= 6 * 20 < r["response_len"] * 6 for r in records(whole))
    weights = load_file(whole / last / "model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())  # bfloat16's 8 bits would not move at small rates
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights.values())
    states = [read_json(out / last / "state.json")["adaptive"] for out in (whole, cut)]
    assert states[0] == states[1] and (states[0]["smooth"] is not None) == ("adaptive" in flags)


def test_what_may_change_when_a_run_is_resumed(finished, tmp_path, capsys, monkeypatch):
    out = tmp_path / "cut"
    shutil.copytree(finished[0], out)
    run("--resume", "--out_dir", out, "--steps", "4", "--eval_problems", "8")
    assert "--steps is 4 and was 3" in capsys.readouterr().out
    assert records(out)[-1]["step"] == 4 and records(out)[: len(records(finished[0]))] == records(finished[0])
    with pytest.raises(InputError, match="--lr is 0.001 and was 0.0005. Only these may change: --"):
        run("--resume", "--out_dir", out, "--lr", "1e-3")
    with monkeypatch.context() as m, pytest.raises(InputError, match="changed since the run began: surroundings of pr"):
        m.setattr(Tokenizer, "surroundings", lambda self: "another template")
        run("--resume", "--out_dir", out)
    state = out / "step_000004/state.json"
    state.write_text(state.read_text().replace('"lr_schedule": "constant"', '"lr_schedule": "cosine"'))
    with pytest.raises(InputError, match="--steps 4 set the pace of --lr_schedule cosine"):
        run("--resume", "--out_dir", out, "--steps", "5")


def test_ctrl_c_finishes_the_step_and_saves(tmp_path, monkeypatch, capfd):
    flags, out, log_step = (*TINY, "--eval_every", "2"), tmp_path / "interrupted", train.log_step
    run(*flags, "--out_dir", tmp_path / "alone")
    assert [r["step"] for r in records(tmp_path / "alone") if "eval" in r] == [0, 2, 3]

    def interrupt(run, *args):
        if run.step == 2:
            signal.raise_signal(signal.SIGINT)
        return log_step(run, *args)

    with monkeypatch.context() as m:
        m.setattr(train, "log_step", interrupt)
        run(*flags, "--out_dir", out)
    said, warned = capfd.readouterr()
    assert "Ctrl-C again ends at once" in warned and "after 2 steps (interrupted; go on with --resume)" in said
    run("--resume", "--out_dir", out)
    assert records(out) == records(tmp_path / "alone")
    assert same_weights(out / "step_000003", tmp_path / "alone/step_000003")


def test_the_cache_of_an_evaluation_has_its_own_rows(tmp_path, monkeypatch):
    shapes, make = [], sample.KVCache.__init__

    def watch(self, config, slots, max_len, *rest):
        shapes.append((slots, max_len))
        make(self, config, slots, max_len, *rest)

    monkeypatch.setattr(sample.KVCache, "__init__", watch)
    run(*TINY, "--eval_batch_size", "1", "--max_new_tokens", "300", "--out_dir", tmp_path)
    rows = int(TINY[TINY.index("--batch_size") + 1])
    lengths = {slots: max(n for s, n in shapes if s == slots) for slots, _ in shapes}
    assert {*lengths} == {1, rows} and lengths[rows] < lengths[1]


def test_a_second_ctrl_c_in_an_evaluation_loses_no_step(tmp_path, monkeypatch):
    def impatient(pair, test, config, run):
        if run.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "examine", impatient)
    with pytest.raises(KeyboardInterrupt):
        run(*TINY, "--eval_every", "1", "--out_dir", tmp_path)
    assert [f.name for f in checkpoints(tmp_path)] == ["step_000002"]


def test_a_terminal_that_closes_ends_the_run_likewise(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as the process below will find it, also under nohup
    command = [sys.executable, "train.py", *TINY, *BLIND, "--steps", "3000", "--out_dir", tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "log.jsonl").is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        process.wait(60)
    saved, = checkpoints(tmp_path)
    assert process.returncode == 0 and read_json(saved / "state.json")["step"] == len(records(tmp_path)) < 3000


def test_a_terminal_that_is_gone_costs_no_step(tmp_path, monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(train, "log_step", gone)
    with pytest.raises(BrokenPipeError):
        run(*TINY, *BLIND, "--out_dir", tmp_path)
    assert [f.name for f in checkpoints(tmp_path)] == ["step_000001"]


def test_a_kill_in_the_last_evaluation_loses_only_that(finished, tmp_path):
    out = tmp_path / "cut"
    shutil.copytree(finished[0], out)
    *lines, last = (out / "log.jsonl").read_text().splitlines(keepends=True)
    assert "eval" in json.loads(last)
    (out / "log.jsonl").write_text("".join(lines) + last[:40])  # torn
    shutil.copytree(out / "step_000003", out / "step_best")  # none of ours: neither read nor deleted
    run(*TINY, "--out_dir", out, "--resume")
    assert records(out) == records(finished[0]) and (out / "step_best").is_dir()


def test_checkpoints_are_told_by_number(tmp_path):
    for name in ("step_000009", "step_1000000", "step_999999", "step_old", "step_000010"):
        (tmp_path / name).mkdir()
        if name != "step_000010":  # which lacks its state
            (tmp_path / name / "state.json").write_text("{}")
    assert [f.name for f in checkpoints(tmp_path)] == ["step_000009", "step_999999", "step_1000000"]


def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_a_state(tmp_path):
    with pytest.raises(InputError, match="step 2: the loss is finite, but the gradient is not; the last state saved"
                                         " is .*step_000001. Lower --lr, .* in another run$"):
        run(*TINY, *BLIND, "--lr", "1e30", "--warmup", "0", "--out_dir", tmp_path)
    assert [f.name for f in checkpoints(tmp_path)] == ["step_000001"]
    assert read_json(tmp_path / "step_000001/state.json")["step"] == 1


@pytest.mark.parametrize("where, flags, expected", [
    ("distill_loss", (), "learning; nothing was saved. Lower --micro_tokens"),
    ("generate", (), "sampling; nothing was saved. Lower --batch_size or --prefix_len in"),
    ("generate", ("--mix", "0.5"), "sampling; nothing was saved. Lower --batch_size or --max_new_tokens in"),
])
def test_where_memory_runs_out_it_is_said_what_to_lower(where, flags, expected, monkeypatch, tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(train, where, full)
    with pytest.raises(InputError, match=f"step 1: out of memory in {expected}"):
        run(*TINY, *BLIND, *flags, "--out_dir", tmp_path)


@pytest.mark.parametrize("flags", [
    "--rollout data --loss cross_entropy",
    "--rollout data --loss forward_kl --init random",
    "--rollout teacher --loss topk_reverse_kl --top_k 8",
    "--rollout teacher --loss cross_entropy",
    "--loss jsd --beta 0.3",
    "--loss sampled_kl",
    "--recompute --lr_schedule cosine --temperature 0.8 --schedule linear",
])
def test_other_sources_and_losses_run(flags, tmp_path, monkeypatch):
    asked, distill_loss, log_step = [], train.distill_loss, train.log_step
    monkeypatch.setattr(train, "distill_loss", lambda *a, **how: asked.append(how) or distill_loss(*a, **how))
    monkeypatch.setattr(train, "log_step", lambda run, pair, *a: asked.append(pair) or log_step(run, pair, *a))
    run(*TINY, *BLIND, "--steps", "2", *flags.split(), "--out_dir", tmp_path)
    assert len(records(tmp_path)) == 2 and all(math.isfinite(r["loss"]) for r in records(tmp_path))
    assert all((r["loss"] == r.get("kl")) == ("--loss" not in flags) for r in records(tmp_path))
    assert asked[0]["top_k"] == (8 if "--top_k" in flags else 64)
    assert asked[-1].student.recompute == ("--recompute" in flags)


def test_the_saved_student_declares_the_stops_it_was_trained_with(tmp_path):
    run(*TINY, *BLIND, "--steps", "1", "--stop_tokens", "65", "--out_dir", tmp_path)
    assert Tokenizer(tmp_path / "step_000001").stop_ids == tuple(sorted({65, *Tokenizer(STUDENT).stop_ids}))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "step_000001")
    assert 65 in saved.generation_config.eos_token_id


def test_the_saved_student_reloads_in_transformers_with_the_same_logits(finished):
    folder = finished[0] / "step_000003"
    model, reference = Transformer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Dan=Hal-8\nHal=5\nDan?\n", return_tensors="pt").input_ids
    expected = reference(ids).logits
    assert ((model(ids) @ model.head.T) - expected).norm() / expected.norm() < 1e-5


def test_sample_shows_both_models_side_by_side(capsys):
    sample.main(parse_flags(sample.Config, "", ["--data", "chains", "--max_new_tokens", "150"]))
    said = capsys.readouterr().out
    assert all(text in said for text in ("chains/teacher\n", "chains/student\n", "#### 14\n", " tok/s]"))


def altered(source: Path, folder: Path, rows: int | None = None, **settings) -> Path:
    """A copy of an embedded checkpoint, with other settings, and with only the first rows of its head."""
    shutil.copytree(source, folder)
    config = read_json(folder / "config.json") | settings | ({"vocab_size": rows} if rows else {})
    (folder / "config.json").write_text(json.dumps(config))
    if rows:
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:rows].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("who", [("student",), ("teacher",), ("student", "teacher")])
def test_a_token_beyond_the_head_is_no_token(tmp_path, who, capsys):
    """`[PAD]`, which somebody added to the tokenizer, and for which the head has no row."""
    flags = []
    for name in ("student", "teacher"):
        folder = altered(HERE / "chains" / name, tmp_path / name, 644)
        if name in who:
            spec = json.loads((folder / "tokenizer.json").read_text())
            switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            spec["added_tokens"].append({"id": 644, "content": "[PAD]", "special": True, **switches})
            (folder / "tokenizer.json").write_text(json.dumps(spec))
        flags += [f"--{name}", folder]
    run(*TINY, "--steps", "1", *flags, "--out_dir", tmp_path / "out")
    assert "vocabulary 644 of 644 rows" in capsys.readouterr().out


def test_a_solution_with_a_token_of_the_students_alone_is_named(tmp_path):
    folder = altered(STUDENT, tmp_path / "student")
    spec = json.loads((folder / "tokenizer.json").read_text())
    switches = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": 644, "content": "<think>", **switches})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Dan?", "solution": "<think>"}\n')
    with pytest.raises(InputError, match="--data, row 1, solution: its token 644 '<think>' lies beyond the 644"):
        run(*TINY, *BLIND, "--student", folder, "--teacher", TEACHER, "--data", tmp_path / "rows.jsonl", "--rollout",
            "data", "--loss", "forward_kl", "--out_dir", tmp_path / "out")


def test_a_cap_that_nobody_typed_is_what_the_model_has_room_for(tmp_path, capsys):
    short = altered(STUDENT, tmp_path / "short", max_position_embeddings=200)
    run(*TINY[:-2], "--student", short, "--steps", "1", "--out_dir", tmp_path / "out")
    assert re.search(r"--max_new_tokens 1\d\d: as much as fits behind the longest prompt", capsys.readouterr().out)
    flags = ["--model", str(short), "--data", "chains"]
    evaluation.main(parse_flags(evaluation.Config, "", [*flags, "--num_problems", "2"]))
    sample.main(parse_flags(sample.Config, "", flags))
    assert capsys.readouterr().out.count("as much as fits") == 2
    with pytest.raises(InputError, match=r"--max_new_tokens 190 and the longest prompt \(.*row \d+, \d+ tokens"):
        run(*TINY, "--max_new_tokens", "190", "--student", short, "--out_dir", tmp_path / "again")


# --- bad input: one line, status 2


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"\n')
    (folder / "empty.jsonl").write_text('{"prompt": ""}\n')
    (folder / "good.jsonl").write_text('{"prompt": "a"}\n')
    for name in ("run/step_000003", "used"):
        (folder / name).mkdir(parents=True)
    for name in ("run/log.jsonl", "used/log.jsonl"):
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize("command, message", [
    ("train --prefix_length 8", "unknown flag --prefix_length; did you mean --prefix_len?"),
    ("train --prefix_len=many", "--prefix_len: invalid int value: 'many'"),
    ("train --resume maybe", "--resume: invalid boolean value: 'maybe'"),
    ("train --prefix_len 0", "--prefix_len must be at least 1, found 0"),
    ("train --lr nan", "--lr must be above 0, found nan"),
    ("train --loss kl", "--loss kl: expected one of reverse_kl"),
    ("train --prefix_start 4", "--prefix_start is for a growing prefix: add --schedule linear or adaptive"),
    ("train --schedule linear --prefix_start 2000", "--prefix_start 2000 lies above --prefix_len 1024"),
    ("train --schedule adaptive --window last", "it needs --window prefix or first, found last"),
    ("train --schedule adaptive --loss cross_entropy --rollout data", "--schedule adaptive follows the KL to the teac"),
    ("train --loss sampled_kl --mix 0.5", "use it with --rollout student and --mix 0"),
    ("train --rollout data --mix 0.5", "--mix is for --rollout student, found --rollout data"),
    ("train --mix 0.5 --window first", "--mix and --window exclude each other"),
    ("train --mix 0.1 --batch_size 4", "--mix 0.1 of --batch_size 4 is less than one row"),
    ("train --plan --shard 3 --world 8", "--shard 3 does not divide the number of ranks, 8: give --world"),
    ("train --plan --world 8 --batch_size 7", "less than one row for each of 8 ranks"),
    ("train --plan --shard_teacher", "--shard_teacher needs --shard"),
    ("train --plan --shard 2 --world 2 --shard_teacher --rollout data --loss cross_entropy", "--shard and a teacher"),
    ("train --loss cross_entropy", "one's own text teaches nothing: --rollout data or teacher"),
    ("train --resume --overwrite", "--resume and --overwrite contradict each other"),
    ("train --data nothing.jsonl", "--data nothing.jsonl has no student of its own"),
    ("train --data nothing.jsonl PAIR", "--data nothing.jsonl: no file nothing.jsonl"),
    ("train --data BAD/text.jsonl PAIR", "text.jsonl, line 2: not JSON"),
    ("train --data BAD/empty.jsonl PAIR", "--data, row 1: its prompt is empty"),
    ("train --data BAD/good.jsonl PAIR --eval_every 5", "has no held-out problems; give some with --eval_data"),
    ("train --eval_data nosuch", "--eval_data nosuch: no file"),
    ("train --student BAD", "no tokenizer.json there"),
    ("train --device cuda:99", "--device cuda:99: cannot be used here"),
    ("train --prefix_len 10000 --mix 0.5", "--prefix_len 10000 and the longest prompt"),
    ("train --prefix_len 10000", "exceed the 8192 positions of the model"),
    ("train --out_dir BAD/used", "already holds a run; discard it with --overwrite"),
    ("train --out_dir BAD/good.jsonl", "is a file, expected a folder"),
    ("train --out_dir BAD/new --resume", "--resume: no complete checkpoint in --out_dir"),
    ("sample --model BAD/run", "is a run's folder; its checkpoints are"),
    ("sample --model HERE/chains/techer", "chains/teacher?"),
    ("sample --index 5000", "--index 5000: the data has rows 0 to 999"),
    ("eval --out BAD/x.jsonl", "expected a .json file"),
    ("eval --num_samples 4", "--num_samples, --top_k and --top_p are for sampling: add --temperature 1"),
    ("eval --max_new_tokens 100000", "positions of the model"),
])
def test_bad_input_is_one_clear_line(bad, command, message, tmp_path, capsys):
    name, *flags = command.replace("BAD", str(bad)).replace("HERE", str(HERE)).replace("PAIR", PAIR).split()
    main, kind = {"train": (train.train, Config), "eval": (evaluation.main, evaluation.Config),
                  "sample": (sample.main, sample.Config)}[name]
    default = ["--data", "chains"] + (["--out_dir", str(tmp_path / "out")] if name == "train" else [])
    with pytest.raises((InputError, SystemExit)) as ended:
        main(parse_flags(kind, "", default + flags))
    said = capsys.readouterr().err if ended.type is SystemExit else str(ended.value)
    assert message in said and len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "out").exists()


def test_a_closed_output_pipe_gives_no_traceback():
    command = [sys.executable, "sample.py", "--model", STUDENT, "--data", "chains", "--max_new_tokens", "2"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # before anything is written
        said = process.stderr.read()
    assert (process.returncode, said) == (1, "sample.py: output pipe closed\n")


def test_help_knows_every_flag(capsys):
    for module in (train, evaluation, sample):
        with pytest.raises(SystemExit) as ended:
            parse_flags(module.Config, module.__doc__, ["--help"])
        said = capsys.readouterr().out
        assert ended.value.code == 0 and all(f"--{f.name} " in said for f in fields(module.Config))
