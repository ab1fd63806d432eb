"""The diagnostics of eval.py against their definitions, and the pictures of data/plots.py."""

import bisect
import itertools
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
from data import HERE, InputError, plots
from data.flags import parse_flags
from model import Transformer
from sample import Rollout

STUDENT, TEACHER = str(HERE / "chains/student"), str(HERE / "chains/teacher")


def config(*flags: str):
    return parse_flags(evaluation.Config, "", [
        "--data", "chains", "--device", "cpu", "--model", STUDENT, "--num_problems", "12", "--max_new_tokens", "60",
        *flags])


def read(folder: str, rollout: Rollout, vocab: int = 644) -> list[torch.Tensor]:
    """Log-probabilities (tokens, vocab) of every response, by reading it whole."""
    model, rows = Transformer.from_pretrained(folder), []
    for tokens, p, n in zip(rollout.tokens, rollout.prompt_lens.tolist(), rollout.lens.tolist()):
        with torch.no_grad():
            rows.append((model(tokens[None, : p + n - 1])[0, p - 1 :] @ model.head[:vocab].T).log_softmax(-1))
    return rows


def sample(c, who: int) -> Rollout:
    students, teacher, _, stop_ids, rows = evaluation.load_students(c)
    writer = (*students.values(), teacher)[who]
    return evaluation.sample_responses(writer, [row["prompt_ids"] for row in rows[: c.num_problems]], c, stop_ids)


def test_a_run_brings_its_data_and_their_teacher(tmp_path):
    run = shutil.copytree(STUDENT, tmp_path / "step_000001")
    (run / "state.json").write_text(json.dumps({"config": {"data": "chains"}}))
    for model in (f"{STUDENT},{run}", f"{run},{STUDENT}"):
        c = parse_flags(evaluation.Config, "", ["--device", "cpu", "--num_problems", "3", "--model", model])
        students, teacher, _, _, rows = evaluation.load_students(c)
        assert c.data == "chains" and Path(c.teacher).samefile(TEACHER) and len(rows) == 3
        assert [*students] == model.split(",") and teacher.config.hidden_size == 128


def test_positions_are_the_definition_by_thirds_of_an_octave(tmp_path):
    c = config("--num_problems", "4")
    found = evaluation.diagnose_positions(c)
    curve, rollout, bins = found["curves"][STUDENT], sample(c, 0), {}
    edges = sorted({round(2 ** (i / 3)) for i in range(20)})
    for log_p, log_q in zip(read(STUDENT, rollout), read(TEACHER, rollout)):
        for j, (p, q) in enumerate(zip(log_p, log_q)):
            values = (p.exp() * (p - q)).sum(), -(q.exp() * q).sum(), p.argmax() == q.argmax(), j + 1
            bins.setdefault(bisect.bisect_right(edges, j + 1), []).append([float(x) for x in values])
    bins = [torch.tensor(bins[b], dtype=torch.double) for b in sorted(bins) if len(bins[b]) >= 4]
    assert curve["tokens"] == list(map(len, bins)) and len(bins) > 10
    for column, name in enumerate(("kl", "teacher_entropy", "agree", "position")):
        assert curve[name] == pytest.approx([x[:, column].mean().item() for x in bins], rel=1e-3, abs=1e-6), name
    expected = [1.96 * x[:, 0].std(correction=0).item() / len(x) ** 0.5 for x in bins]
    assert curve["kl_half_width"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    plots.draw_diagnostic("positions", found, str(tmp_path / "p.png"))
    assert json.loads((tmp_path / "p.json").read_text()) == found and (tmp_path / "p.png").stat().st_size > 10_000


def test_teacher_prefix_gives_what_it_says(tmp_path, capsys):
    found = evaluation.diagnose_teacher_prefix(config("--lens", "0,4,60", "--num_problems", "20"))
    ours = found["curves"][STUDENT]
    assert [p["k"] for p in ours] == [0, 4, 60]
    assert ours[0]["given_whole"] == 0 and ours[-1]["given_whole"] == 1.0
    teachers = sample(config("--num_problems", "20"), 1)
    c = config("--num_problems", "20")
    _, _, tokenizer, _, rows = evaluation.load_models(c)
    assert len(rows) == 20
    right = [evaluation.is_correct(tokenizer.decode(teachers.text_ids(i)), rows[i]["answer"]) for i in range(20)]
    assert ours[-1]["accuracy"] == sum(right) / 20  # who is given everything is as right as the one who wrote it
    assert ours[0]["accuracy"] < ours[1]["accuracy"] and "after 4 tokens of the teacher's" in capsys.readouterr().out
    plots.draw_diagnostic("teacher_prefix", found, str(tmp_path / "p.png"))
    assert json.loads((tmp_path / "p.json").read_text()) == found and (tmp_path / "p.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="--lens many: expected numbers"):
        evaluation.diagnose_teacher_prefix(config("--lens", "many"))


def test_given_tokens_count_towards_the_cap(monkeypatch):
    longest, sample_responses = [], evaluation.sample_responses

    def recorded(*args, given=0):
        rollout = sample_responses(*args, given=given)
        longest.append(given + int(rollout.lens.max()))
        return rollout

    monkeypatch.setattr(evaluation, "sample_responses", recorded)
    evaluation.diagnose_teacher_prefix(config("--lens", "0,20", "--num_problems", "8", "--max_new_tokens", "30"))
    assert longest == [30, 30, 30]  # the teacher's, the student's, and what it writes after 20 of the teacher's


def test_what_follows_the_teachers_tokens_is_drawn_anew():
    """Of a model that finds two tokens equally likely, the student's tokens do not repeat the teacher's."""
    model = Transformer.frozen(STUDENT, torch.device("cpu"), 2)
    model.head.data.zero_()
    c = config("--max_new_tokens", "16", "--temperature", "1")
    given = evaluation.sample_responses(model, [[5]] * 50, c, ()).tokens[:, 1:9]
    rest = evaluation.sample_responses(model, [[5, *row.tolist()] for row in given], c, (), given=8).tokens[:, 9:]
    assert 0.4 < (given == rest).double().mean() < 0.6


def test_the_stop_tokens_of_all_models_end_a_response(tmp_path):
    other = shutil.copytree(STUDENT, tmp_path / "other")
    (other / "generation_config.json").write_text('{"eos_token_id": [2, 201]}')
    for model in (f"{STUDENT},{other}", f"{other},{STUDENT}"):
        assert evaluation.load_students(config("--model", model))[3] == (2, 201)


def test_an_accuracy_is_not_written_over(tmp_path, capsys):
    (tmp_path / "after.json").write_text('{"summary": {}}')
    with pytest.raises(SystemExit):
        evaluation.check_out(str(tmp_path / "after.png"), ".png")
    assert "which holds an accuracy; choose another name" in capsys.readouterr().err
    evaluation.check_out(str(tmp_path / "after.json"), ".json")  # its own


def command(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
    runpy.run_path(evaluation.__file__, run_name="__main__")


def test_tokens_page_says_what_the_teacher_preferred_and_takes_no_text_for_markup(tmp_path, monkeypatch):
    run, data, prompt = tmp_path / "step_000001", tmp_path / "evil.jsonl", "</script><script>alert(1)</script>\nDan?\n"
    shutil.copytree(STUDENT, run)
    (run / "state.json").write_text(json.dumps({"config": {
        "prefix_len": 16, "window": "prefix", "rollout": "student", "schedule": "constant"}}))
    data.write_text(json.dumps({"prompt": prompt}) + "\n")
    flags = ("--data", str(data), "--model", f"{STUDENT},{run}", "--teacher", TEACHER, "--max_new_tokens", "60",
             "--device", "cpu")
    command(monkeypatch, "tokens", *flags, f"--out={tmp_path / 't.html'}")
    page, found = (tmp_path / "t.html").read_text(), json.loads((tmp_path / "t.json").read_text())
    template = (HERE / "tokens.html").read_text()
    before, after = template.split("__NUMBERS__")
    assert page.startswith(before) and page.endswith(after) and page.count("</") == template.count("</")
    assert json.loads(page[len(before) : -len(after)]) == found and found["prompt"] == prompt
    assert found["cuts"] == {STUDENT: None, str(run): 16}

    rollout, response = sample(config(*flags), 0), found["responses"][STUDENT]
    assert len(response) == int(rollout.lens[0])
    log_p, log_q = (read(folder, rollout)[0] for folder in (STUDENT, TEACHER))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    assert [t["kl"] for t in response] == pytest.approx(kl, rel=1e-3, abs=1e-5)
    for who, folder in (("student", STUDENT), ("teacher", TEACHER)):
        p = read(folder, rollout)[0].exp()
        of_token = p.gather(1, torch.tensor(rollout.response(0))[:, None])[:, 0].tolist()
        assert [t[who] for t in response] == pytest.approx(of_token, rel=1e-3)
        assert [[chance for _, chance in t[f"{who}_top"]] for t in response] == [
            pytest.approx(row, abs=2e-6) for row in p.topk(3).values.tolist()]
        decode, best = evaluation.Tokenizer(Path(folder)).decode, p.argmax(-1).tolist()
        assert [t[f"{who}_top"][0][0] for t in response] == [decode([i]) for i in best]


def test_names_stand_at_the_ends_of_lines_without_overlap_or_in_a_legend():
    figure, grid = plots.panels(["left", "right"], "x")
    for panel, y in itertools.product(grid, (1.0, 1.01, 1.02, 5.0)):
        panel.plot([0, 1], [0, y])
    plots.name_lines(figure, grid, ["one", "two", "three", "four"])
    figure.draw_without_rendering()
    for panel in grid:
        names = [text for text in panel.texts if text.get_text()]
        boxes = sorted((text.get_window_extent() for text in names), key=lambda box: box.y0)
        assert len(names) == 4 and all(b.y0 > a.y1 - 1 for a, b in itertools.pairwise(boxes)) and not figure.legends
    plots.name_lines(figure, grid, [f"a name that is much too long, {i}" for i in range(4)])
    assert len(figure.legends) == 1
    figure, (panel,) = plots.panels(["many names"], "x")
    for y in range(15):
        panel.plot([0, 1], [0, y])
    plots.name_lines(figure, [panel], [f"off policy no walls {i}" for i in range(15)])
    figure.draw_without_rendering()
    assert panel.get_window_extent().y0 > figure.legends[0].get_window_extent().y1
    words = [plots.spell(text) for text in ("Be brief", "Be, brief", "Be_brief", "x" * 99, "x" * 98 + "\n")]
    assert len({*words}) == 5 and all(re.fullmatch(r"[^\s,]{1,49}", word) for word in words)
    assert plots.tell_apart(["a 1, b 2", "a 2, b 1"]) == (["a 1", "a 2"], ["b"])
    assert plots.tell_apart(["a 1", "a 1, b 2", "a 2"]) == (["a 1", "a 1, b 2", "a 2"], [])


def fake_run(folder: Path, prefix_len: int, seed: int, accuracies: list[float]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "prefix_len": prefix_len, "seed": seed, "schedule": "constant", "out_dir": "x"}))
    lines = []
    for step, a in enumerate(accuracies):
        if step:
            shares = {"flop_sample": 0.2, "flop_teacher": 0.3, "flop_student": 0.5}
            flops = {name: share * prefix_len * 1e9 for name, share in shares.items()}
            lines.append({"step": step, "loss": 1.0, **flops, "seconds_sample": 0.5, "seconds_learn": 0.5,
                          "tokens": prefix_len})
        lines.append({"step": step, "eval": "sampled", "accuracy": a, "finish": 1.0, "mean_len": 9})
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + '{"torn')
    return str(folder)


def test_runs_are_grouped_by_what_differs(tmp_path, capsys):
    folders = [fake_run(tmp_path / "a1", 10, 1, [0.2, 0.6, 0.8]), fake_run(tmp_path / "a2", 10, 2, [0.2, 0.8, 0.9]),
               fake_run(tmp_path / "b1", 100, 1, [0.2, 0.8, 1.0]), fake_run(tmp_path / "b2", 100, 2, [0.2, 0.6, 0.6])]
    plots.draw_runs(folders, str(tmp_path / "runs.png"), goals=(0.7, 1.1))
    found, said = json.loads((tmp_path / "runs.json").read_text()), capsys.readouterr().out
    assert list(found) == ["prefix_len 10", "prefix_len 100"] and found["prefix_len 10"]["seeds"] == [1, 2]
    needed = [found[f"prefix_len {n}"]["flop_to_reach_accuracy"] for n in (10, 100)]
    assert needed == [{"0.7": [2e10, 1e10], "1.1": []}, {"0.7": [1e11], "1.1": []}]
    assert "prefix_len 10   step 2, FLOP 2e+10 (2e+10 to 2e+10); s 2 (2 to 2); " in said
    assert "accuracy, sampled 0.85 (0.8 to 0.9)" in said
    assert "2e+10 (2 of 2)                 -" in said and "1e+11 (1 of 2)                 -" in said
    assert (tmp_path / "runs.png").stat().st_size > 10_000

    older, newer = tmp_path / "a1/config.json", tmp_path / "a2/config.json"  # one from before there was a flag
    newer.write_text(json.dumps({**json.loads(older.read_text()), "mix": 0.1, "seed": 2}))
    assert list(plots.group_runs(folders[:2])[0]) == ["all runs", "mix 0.1"]
    called = [fake_run(tmp_path / name, length, seed, [0.2, 0.6]) for name, length, seed in (
        ("prefix10_seed1", 10, 1), ("prefix10_seed2", 10, 2), ("a_few_seed1", 9, 1))]
    assert list(plots.group_runs(called)[0]) == ["a few", "prefix 10"]
    called.append(fake_run(tmp_path / "patched_seed1", 10, 1, [0.2, 0.6]))  # the same flags, another code
    assert list(plots.group_runs(called)[0]) == ["a few", "patched", "prefix 10"]
    called.append(fake_run(tmp_path / "patched_seed2", 11, 2, [0.2, 0.6]))  # one name, two settings
    assert list(plots.group_runs(called)[0]) == ["prefix_len 9", "prefix_len 10", "prefix_len 11"]
    dated = [fake_run(tmp_path / f"{name}_seed1", 10, 1, [0.2, 0.6]) for name in ("out", "out_v1.2.3", "2026-11-25")]
    plots.draw_runs(dated, str(tmp_path / "dated.png"))  # names that look like numbers, and like a flag with a value
    assert {*json.loads((tmp_path / "dated.json").read_text())} == {"out", "out v 1.2.3", "2026-11-25"}
    with pytest.raises(InputError, match="never evaluated after the same step"):
        other = Path(fake_run(tmp_path / "a3", 10, 3, [0.2, 0.6])) / "log.jsonl"
        other.write_text(other.read_text().replace('"step": 1,', '"step": 9,'))
        plots.draw_runs([folders[0], str(other.parent)], "")
    (tmp_path / "a1/log.jsonl").write_text("")
    with pytest.raises(InputError, match="no metric was evaluated"):
        plots.draw_runs(folders[:2], "")
    with pytest.raises(InputError, match="no log.jsonl there"):
        plots.draw_runs([str(tmp_path)], "")


@pytest.mark.parametrize("flags, message", [
    ("position", "position: no such command; positions, teacher_prefix, tokens and runs are"),
    ("positions --num_problems -1", "--num_problems must be at least 0, found -1"),
    ("tokens --index 5000 --data chains", "--index 5000: the data has rows 0 to 999"),
    ("runs", "usage: python eval.py runs RUN_FOLDER"),
    ("teacher_prefix --lens=-4,8", "--lens -4,8: expected numbers from 0 on"),
])
def test_the_command_line_says_what_is_wrong(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *flags.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["my $HOME/run", "a$\\frac{$b", "$x_{1$", "_run", "100% ~ {a}"])
def test_a_name_is_drawn_as_it_is(name, tmp_path):
    keys = ("kl", "agree", "student_entropy", "teacher_entropy")
    curve = {"position": [1, 2, 4], **{key: [0.5, 0.2, 0.1] for key in keys},
             **{f"{key}_half_width": [0.1, 0.1, 0.05] for key in keys}}
    for curves in ({name: curve}, {f"{name}{i}": curve for i in range(9)}):  # beside the lines, and in a legend
        figure = plots.draw_positions({"data": name}, curves)
        figure.savefig(tmp_path / "p.png")
        texts = [t.get_text() for axes in figure.axes for t in axes.texts]
        texts += [t.get_text() for legend in figure.legends for t in legend.get_texts()]
        assert {line.split("/")[-1] for line in texts} == {line.split("/")[-1] for line in curves}
        assert name in figure.get_suptitle()
