"""data/answers.py: what counts as an answer, and when two are the same."""

import os
import random
import re
import signal
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import InputError
from data.answers import Verifier, extract_answer, is_correct, is_mathematics, normalize, opens_thought
from tests.answer_pairs import pairs

FORMS = ("So it is $\\boxed{%s}$.", "The final answer is %s", "The work.\n#### %s")


@pytest.mark.parametrize("text, found", [
    ("so\n#### 9", "9"), ("#### 1\nno:\n#### 2", "2"), ("The answer is: 7", "7"),
    ("The answer is 18. Janet makes 18 dollars a day.", "18"), ("The answer is $18.50 per hour.", "$18.50 per hour"),
    ("the answer is therefore $\\frac{3}{4}$, since it is", r"\frac{3}{4}"), ("**Answer:** 18", "18"),
    ("**Final Answer**: **18**", "18"), ("### Final Answer\n\n18", "18"), ("Answer:\n\n  42\n", "42"),
    ("Answer: (B) the second", "(B) the second"), ("The final answer is \\(\\sqrt{2}\\).", r"\sqrt{2}"),
    ("**Answer:**\n$$\n18\n$$", "18"), ("The answer is:\n\n\\[\n18\n\\]", "18"), ("The answer is:\n```\n18\n```", "18"),
    ("Answer:\n\\begin{align*}\n18\n\\end{align*}", "18"),
    ("The answer is:\n\\[\n2\n\\sqrt{3}\n\\]", "\\["), ("The answer is:\n```\nx = 18\nprint(x+1)\n```", "`"),
    ("The answer is 5 because 2+3=5", "5"), ("<answer>The answer is 18</answer>", "18"), ("#### 18</s>", "18"),
    ("The answer is $x$ dollars", "x"), ("The answer is $3$ million.", "$3$ million"),
    ("The answer is $3$ or $4$.", "$3$ or $4$"), ("The answer is $3$, $4$.", "$3$, $4$"),
    (r"\boxed{\frac{1}{2}} then", r"\frac{1}{2}"), (r"\boxed{3} and #### 4", "3"),
    (r"\boxed{1} or \boxed{2", "1"),  # the last closed one
    (r"\boxed{\boxed{3}}", "3"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{2\\}", r"2\\"),
    (r"\boxed{\text{a } \frac{\sqrt{3}}{2}}", r"\text{a } \frac{\sqrt{3}}{2}"), (r"\fbox{8}", "8"),
    (r"so \boxed 18.", "18"), (r"$$ \boxed {70} $$", "70"), (r"\boxed{2", None), (r"\boxed{}", None),
    (r"\boxed{ }", None), (r"\boxed{4} \boxed{}", "4"), (r"so the answer is $\boxed{}$.", None),
    (r"The answer is \boxed{2 +", None),
    (r"<think>maybe \boxed{3}</think> The answer is 4", "4"), (r"<think>a</think>\boxed{3}<think>b</think> so", None),
    (r"<think>it is \boxed{3}", None), (r"<think>a</think>\boxed{3}<think>or", None), (r"so</think>\boxed{4}", "4"),
    ("it is 12", None),  # the last number is no answer
    ("#### Step 3\nWe add 4 and 5.", None),  # a heading
    ("#### 1. Add\nWe add 4 and 5.", None),
    ("", None),
    ("####", None),
    ("#### \n5", None),
])
def test_extract_answer(text, found):
    assert extract_answer(text) == found


@pytest.mark.parametrize("response, found", [
    (r"\boxed{3}. But wait ...", None), ("so\n#### 9", None), ("The answer is 7", None),
    (r"\boxed{3}</think> The answer is 4", "4"), ("a</think>b</think>\n#### 9", "9"), ("hm</think> well", None),
    (r"\boxed{3}</think>\boxed{4}<think>", None),
])
def test_a_thought_that_the_prompt_opened_counts_as_little(response, found):
    assert extract_answer(response, opened=True) == found
    assert is_correct(response, "3", opened=True) is False and not found or is_correct(response, found, opened=True)


@pytest.mark.parametrize("prompt, opened", [
    ("<|User|>2+2?<|Assistant|><think>\n", True), ("Q: what is <think>? A:<think>", True), ("", False),
    ("Q: what is <think>? A:", False), ("<think>\n\n</think>\n\n", False),
])
def test_whether_a_prompt_opens_a_thought(prompt, opened):
    assert opens_thought(prompt) is opened


@pytest.mark.parametrize("reference, right, wrong", [
    ("36\\text{ cm}", ["36", "36 cm", "36 m", "36\\text{ cm}"], ["36 million", "36 squared", "36 dozen", "37 cm"]),
    ("36\\text{ cm}^2", ["36", "36 cm^2", "36\\mathrm{cm}^{2}"], ["36\\text{ cm}^3"]),
    ("17", ["17%", "\\$17", "017", "17.0", "(17)", "[17]", "\\{17\\}", "x = 17", "20-3=17"],
     ["0.17", "20-3", "|-17|", "17.001"]),
    ("\\frac{1}{3}", ["2/6", "\\frac13", "1/3"], ["0.333", "0.333333333333", ".3"]),
    ("2\\pi", ["\\pi+\\pi"], ["6.283185", "6.28318530717959"]),
    ("1, 2", ["2, 1", "2 or 1", "\\{2, 1\\}", "(1, 2)"], ["(2, 1)", "12", "1", "1, 2, 2", "(2,1)"]),
    ("x = 5", ["5", "5 = x", "x=2+3=5"], ["y = 5", "x = 6"]),
    ("2n", ["n + n", "n2"], ["2N", "2m"]),
    ("A", ["A", "(a)", "A. with its text", "\\text{(A)}"], ["A or B", "(A) or (C)", "A matter of taste", "AB"]),
    ("I", ["I", "(I) the ninth", "I - the ninth"], ["I do not know", "i.e. nothing", "I - am not"]),
    ("E", ["E - text", "E – Edinburgh", "E—the fifth", "\\text{E - both}"],
     ["E - 5", "E - m", "E - mc^2", "E - or D", "E - sin x", "E-text", "E - A", "E - text (A)", "D - E"]),
    ("\\sqrt{1/n}", ["\\frac{1}{\\sqrt{n}}", "\\sqrt{\\frac1n}", "n^{-1/2}", "\\frac{\\sqrt n}{n}", "1/\\sqrt n"],
     ["1/n", "\\sqrt{n}", "-\\frac{1}{\\sqrt{n}}", "\\frac{1}{\\sqrt{m}}", "\\sqrt{1/N}"]),
    ("\\frac{\\sqrt{x}}{\\sqrt{y}}", ["\\sqrt{x/y}", "\\sqrt{\\frac{x}{y}}", "\\frac{\\sqrt{xy}}{y}"],
     ["\\sqrt{y/x}", "\\frac{x}{y}"]),
    ("2\\pi\\sqrt{\\frac lg}", ["2\\pi\\sqrt{l/g}", "\\frac{2\\pi\\sqrt{l}}{\\sqrt{g}}"], ["2\\pi\\sqrt{g/l}"]),
    ("\\frac{1}{\\sqrt[3]{n}}", ["\\sqrt[3]{1/n}", "n^{-1/3}"], ["\\sqrt{1/n}"]),
    ("x", ["x"], ["\\sqrt{x^2}", "|x|"]), ("-\\frac{i}{2}", [], ["\\sqrt{\\frac{1}{-4}}"]),
    ("\\frac{1}{2^{98}}", ["2^{-98}"], ["\\frac{2}{2^{98}}"]),  # small numbers are not zero
    ("(6,235^\\circ)", ["(6, 235^\\circ)", "(6,235)"], ["(6235)", "6235"]),
    ("0.56 = 56\\%", ["0.56 = 56\\%"], ["8.56 = 56\\%"]),
])
def test_matters_of_opinion_and_of_fact(reference, right, wrong):
    for answer in right + wrong:
        for form in FORMS:
            assert is_correct(form % answer, reference) is (answer in right), answer


def test_pairs_with_known_verdicts():
    counts, mistakes = {True: 0, False: 0}, {True: [], False: []}
    for i, (family, answer, reference, right) in enumerate(pairs(seed=0, n=1)):
        counts[right] += 1
        if is_correct(FORMS[i % 3] % answer, reference) is not right:
            mistakes[right].append((family, answer, reference))
    assert len(mistakes[False]) <= counts[False] / 200, mistakes[False]  # wrongly credited
    assert len(mistakes[True]) <= counts[True] / 50, mistakes[True]  # wrongly denied


GOLDS = r"""
18 | -7 | 1,080 | 109,200,000 | \$32,\!348 | 11,\! 111,\! 111,\! 100 | \$18.90 | .0000672 | 326.5 | 17\% | 2 euros
\frac{14}{3} | \frac43 | \frac 59 | \frac9{19} | -\frac{35}{9} | 1\frac{4}{5} | 137 \frac{1}{2} | \frac{-33}{2} | 2/15
x=5 | y = 2x + 3 | 5x - 7y + 11z + 4 = 0 | s^2 \le 8r^2 | x \in [-2,7] | 49x^2 - 42xy + 9y^2 - 222x - 54y + 603 = 0
\left( 3, \frac{\pi}{2} \right) | (6,31,-1) | (3,4] | (2,12) \cup (12,102) | (-\infty, 2) \cup (3, \infty) | (20,100)
\{1\pm\sqrt{5},-2\} | 1 \pm \sqrt{19} | 3, 5, 7 | -2 or -12 | 2, 3, and 4 | AB=9, CD=4 | (-4, 27);(2, 15) | -1, \; -5
3\sqrt{13} | 11\sqrt2 | \frac{\sqrt{3}}{3} | 12^{1/7} | \sqrt[4]{8} | -\frac{\pi}{6} | \frac{20000}{\pi} | 2^{100} - 2
x^5 - x^4 + x^3 - x^2 + x - 1 | 8x^9-125y^6 | (x^2 + 5x + 2)(x^2 + 5x + 9) | \cot x | \log(\frac{2007}{2006}) | 6 - 5i
2516_8 | 4210_{5} | A5_{11} | 90^\circ | 864 \mbox{ inches}^2 | \frac{270}7\text{ degrees} | 34 sq. units | 1:4
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix} | \begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} | 8\!:\!34 p.m
\text{(C)} | \text{Evelyn} | \text{even} | two lines | A,B,E | p - q | \frac{1}{7}\triangle ABC | \42409
"""
GOLDS = [gold.strip() for line in GOLDS.strip().split("\n") for gold in line.split(" | ")]  # of MATH and GSM8K


def perturbed(gold: str, r: random.Random) -> list[str]:
    """Other values: a digit changed, a sign changed, another word or letter."""
    found = [gold[: m.start()] + str((int(m[0]) + r.randint(1, 8)) % 9 + 1) + gold[m.end() :]
             for m in re.finditer(r"\d", gold)]
    found += [gold[: m.start()] + {"+": "-", "-": "+"}[m[0]] + gold[m.end() :] for m in re.finditer(r"[-+]", gold)]
    found = [s for s in found if s != gold]
    return r.sample(found, min(2, len(found))) or ["\\text{Zoe}" if len(gold) > 1 else "q"]


def test_real_references_equal_themselves_and_nothing_else():
    assert len(GOLDS) > 60
    for gold in GOLDS:
        for form in (*FORMS, "The final answer is $%s$.", "The answer is %s."):
            assert is_correct(form % gold, gold), (form, gold)
        for wrong in perturbed(gold, random.Random(gold)):
            assert not is_correct(f"\\boxed{{{wrong}}}", gold), (wrong, gold)


def test_a_missing_answer_never_equals_a_missing_answer():
    for nothing in ("", "####", "\\boxed{}", "the answer is", "no idea", "\\boxed{\\text{}}", "\\boxed{ }"):
        for reference in ("", "None", nothing):
            assert is_correct(nothing, reference) is False


@pytest.mark.parametrize("answer", [
    "10^10^10", "9^{9^{9}}", "9**9**9**9", "2^{2^{2^{99}}}", "10^(10^9)", "99999999!", "7^{12345}", "9" * 100,
    "(" * 20 + "1" + ")" * 20, "x+" * 100 + "1", "__import__('os').system('true')", "3 h 30 min", "1 2", "8:34"])
def test_what_is_no_mathematics_or_a_tower_is_not_evaluated(answer):
    assert not is_mathematics(normalize(answer))
    assert not any(is_correct(form % answer, "90") for form in FORMS)


FRAGMENTS = st.sampled_from([
    "\\boxed{", "}", "{", "####", "#### ", "answer is", "Answer:", "\n", "$", "\\frac", "\\text{", "(", ")", "\\left(",
    "^", "_", "\\sqrt", "!", "1", "99", ",", ".", " ", "x", "=", "**", "\\(", "\\)", "\\[", "[", "\\\\", "\\circ", "%",
    "/", "0", "\\pi", "\\infty", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\int", "\\sum_{i=1}^{9}", "∞", "\x00",
    " or ", " cm", "½", "\\pm", "\\cup", "-", "<", " million", "</think>", "\\{", "\\}", "_{5}", "²", "e5",
])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(FRAGMENTS | st.text(max_size=5), max_size=60).map("".join))
def test_no_text_crashes_it_or_is_right_without_an_answer(text):
    begin = time.process_time()
    right = is_correct(text, "31415926")
    assert not right or "31415926" in re.sub(r"\D", "", normalize(extract_answer(text)))
    is_correct(text, "\\frac{\\sqrt{3}}{7}+x"), is_correct(text, "(1,2) \\cup [3,x]"), is_correct(text, "B")
    assert time.process_time() - begin < 10  # milliseconds, unless some expression backtracks without end


@pytest.mark.parametrize("piece", [
    "\\boxed{", "\\boxed ", "{", "answer is ", "answer is \n$$\n", "answer:*", "$", "####\n", "<think>", "1,", " ",
    "\n", "**", "ﷺ"])
def test_a_megabyte_of_anything_takes_linear_time(piece):
    Verifier.process = Verifier.process or Verifier.start()
    text = piece * (10**6 // len(piece))
    begin = time.process_time()
    is_correct(f"The answer is {text}\n#### 5", "x^2+1"), is_correct(f"\\boxed{{1{text[:480]}2}}", "x^2+1")
    assert time.process_time() - begin < 10  # a tenth of a second; quadratic, minutes


def test_a_question_that_is_too_hard_counts_as_wrong_and_the_next_one_is_answered():
    # Past is_mathematics' bounds: a power that no signal handler could interrupt.
    before, begin = Verifier.timeouts, time.process_time()
    with pytest.raises(TimeoutError):
        Verifier.ask("((9^{9999})^{9999})^{9999}", "x+1")
    assert Verifier.timeouts == before + 1 and time.process_time() - begin < 1
    assert Verifier.ask("\\sqrt{12}", "2\\sqrt{3}") and Verifier.timeouts == before + 1


def test_time_in_which_the_machine_does_something_else_does_not_count():
    assert Verifier.ask("\\sqrt{12}", "2\\sqrt{3}")
    before, process = Verifier.timeouts, Verifier.process
    process.send_signal(signal.SIGSTOP)
    later = threading.Timer(1.5, process.send_signal, [signal.SIGCONT])
    later.start()
    assert Verifier.ask("x^2-1", "(x-1)(x+1)") and Verifier.process is process and Verifier.timeouts == before
    later.join()


def test_an_interrupt_neither_reaches_the_process_nor_shifts_its_verdicts(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    assert Verifier.ask("\\sqrt{12}", "2\\sqrt{3}")
    assert os.getsid(Verifier.process.pid) != os.getsid(0)
    with monkeypatch.context() as patched:
        patched.setattr(Verifier, "read", lambda process: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            Verifier.ask("x+1", "1+x")
    signal.signal(signal.SIGINT, before)
    assert not Verifier.ask("x+1", "x+2") and Verifier.ask("x+1", "1+x")


def test_a_process_that_does_not_start_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(Verifier, "process", None)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(InputError, match="did not start: pip install -r requirements.txt"):
        is_correct("\\boxed{x+1}", "1+x")


def test_it_works_from_any_thread():
    found = []
    threads = [threading.Thread(target=lambda: found.append(is_correct("\\boxed{x^2-1}", "(x-1)(x+1)")))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


@pytest.mark.parametrize("wrong", ["a24 b28", "a12 b56", "a28", "a28 b24 c1", "b24 a28"])
def test_numbers_with_letters_are_no_product(wrong):
    assert is_correct("#### a28 b24", "a28 b24") and not is_correct(f"#### {wrong}", "a28 b24")
