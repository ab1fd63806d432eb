"""Pull the final answer out of a response, and compare it with the reference.

`is_correct` is exact first, then by value (fractions and decimals, without rounding), and asks math-verify only about
what is still LaTeX. Nothing that a model wrote is evaluated as code; what goes to math-verify is short, shallow, and
parsed in a process of its own that is stopped when it takes too long, so this works from any thread.
"""

import atexit
import json
import re
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path
from queue import Empty, Queue

LONGEST = 500  # characters of an answer; what is longer is none
SECONDS = 0.7  # that math-verify may take for one comparison, once it is up


def extract_answer(text: str) -> str | None:
    """The answer a response states: the last closed \\boxed{...} (braces matched); else what follows the last `####`,
    `answer is` or `Answer:`, on its line or the next one that is not empty.

    None when there is neither: the last number of a text is not an answer. A `####` with text below it is a heading.
    """
    open_braces, boxes = [], []  # one pass: a text of nothing but \boxed{ must not take quadratic time
    for m in re.finditer(r"\\[{}]|\\(?:boxed|fbox)\s*\{|[{}]", text):
        if m[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and text[start : m.start()].strip():
                boxes.append((start, m.start()))
        elif m[0] not in ("}", "\\{", "\\}"):
            open_braces.append(m.end() if m[0] != "{" else None)
    if boxes:
        start, end = max(boxes)
        return text[start:end].strip()
    if bare := re.findall(r"\\boxed +([^\s{}$]+)", text):  # \boxed 18
        return bare[-1].rstrip(".,$")
    mark = r"(?:^|\n)[ \t]*####(?!#)|\banswer(?:\s+is|[\s*_]*[:=])[\s*_]*:?|\banswer\b[\s*_]*\n"
    marks = re.finditer(mark, text, re.IGNORECASE)
    for mark in reversed(list(marks)):
        line, _, below = text[mark.end() :].lstrip(" \t*_:\n").partition("\n")
        if "####" in mark[0] and (below.strip() or "\n" in re.split(r"\S", text[mark.end() :])[0]):
            continue  # a heading
        if found := first_statement(line):
            return found
    return None


def first_statement(line: str) -> str | None:
    """What a line says first: the mathematics it starts with, else its first sentence."""
    line = re.sub(r"\*\*|__|</?\w{1,20}>", "", line)  # bold, and tags such as </answer>
    lead = r"^(?:that|is|equal(?:s| to)|therefore|thus|simply|just|about)\s+"
    line = re.sub(lead, "", line.strip(), flags=re.IGNORECASE)
    for opener, closer in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`")):
        end = line.find(closer, len(opener))
        if line.startswith(opener) and end > 0 and not (opener == "$" and re.match(r"\$\d[\d,.]*(\s|$)", line)):
            return line[len(opener) : end].strip() or None
    return re.split(r"[.;](?=\s|$)|,?\s+(?:because|since|which|so)\s", line)[0].strip() or None


def normalize(answer: str) -> str:
    """Take away what does not change the value: delimiters, \\text, spacing, units, separators, a name in front."""
    s = answer.strip().replace("\\$", "").replace("−", "-").replace("\u2009", "").replace("\u202f", "")
    s = re.sub(r"\\(?:left|right|displaystyle|big|Big|bigg)(?![a-zA-Z])", "", s)
    s = re.sub(r"\\[,;:!> ]|~|\\quad|\\qquad", " ", s)
    s = re.sub(r"\\[()\[\]]|\$|\*\*|__", "", s)
    s = re.sub(r"\\[dtc]frac", r"\\frac", s)
    s = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", s)
    s = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", s)
    s = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\\?%", "", s)
    s = re.sub(r"(?<=\d)(?:,|\{,\}|\s)(?=\d{3}(?!\d))", "", s)
    s = re.sub(r"^\s*\\(?:text|textbf|mathrm|mbox|textit|mathbf)\s*\{([^{}]*)\}\s*$", r"\1", s)
    s = re.sub(r"(?<=[\d})])\s*\\(?:text|textbf|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?", "", s)  # \text{ dollars}
    s = re.sub(r"\\(?:text|textbf|mathrm|mbox|textit|mathbf)\s*\{([^{}]*)\}", r"\1", s)
    s = re.sub(r"^\s*[a-zA-Z](?:\([a-zA-Z]\))?\s*=\s*(?=\S)", "", s)  # x = 18
    s = s.strip().rstrip(".,;:").strip()
    s = re.sub(r"^(-?[\d.,/]+)\s+[a-zA-Z]+(?:\s+[a-zA-Z]+)?$", r"\1", s)  # 18 dollars, 3 hours each
    s = re.sub(r"^[€£¥]\s*(?=\d)", "", s)
    s = re.sub(r"\s+", " ", s) if re.search(r"[a-zA-Z]{2} [a-zA-Z]{2}", s) else re.sub(r"\s+", "", s)
    return re.sub(r"^([-+]?)0+(?=\d)", r"\1", s).removeprefix("+")


def value(s: str) -> Fraction | None:
    """The exact number that a normalised answer is: an integer, decimal, a/b, \\frac{a}{b}, the last also with an
    integer in front; None if it is none."""
    number = r"-?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})"
    try:
        if re.fullmatch(number, s):
            return Fraction(s.rstrip("."))
        if m := re.fullmatch(rf"({number})/({number})|(-?)\\frac\{{({number})\}}\{{({number})\}}", s):
            a, b, sign, c, d = m.groups()
            return Fraction(a) / Fraction(b) if a else (-1 if sign else 1) * Fraction(c) / Fraction(d)
        if m := re.fullmatch(r"(-?)(\d{1,40})\\frac\{(\d{1,40})\}\{(\d{1,40})\}", s):  # two and a half
            return (-1 if m[1] else 1) * (int(m[2]) + Fraction(int(m[3]), int(m[4])))
    except (ValueError, ZeroDivisionError):
        pass
    return None


def is_correct(response: str, reference: str) -> bool:
    """Whether the answer that the response states equals the reference."""
    found = extract_answer(response)
    if found is None or len(found) > LONGEST:
        return False
    if re.fullmatch(r"[A-J]", reference.strip()):  # multiple choice, by letter
        choice = re.match(r"\W*(?:option|choice)?\W*([A-Ja-j])(?![a-zA-Z0-9])", normalize(found), re.IGNORECASE)
        return choice is not None and choice[1].upper() == reference.strip()
    a, b = normalize(found), normalize(reference)
    if not a:
        return False
    if a == b or a.lower() == b.lower():
        return True
    x, y = value(a), value(b)
    if x is not None and y is not None:
        return x == y
    return looks_like_latex(a, b) and same_mathematics(a, b)


def looks_like_latex(*answers: str) -> bool:
    """Whether math-verify is worth asking, and can be without harm: mathematics on both sides, short and shallow."""
    for s in answers:
        nesting = max((s[:i].count("{") + s[:i].count("(") - s[:i].count("}") - s[:i].count(")")
                       for i in range(len(s) + 1)), default=0)
        if len(s) > 150 or nesting > 8 or re.search(r"\^\{?-?\d{4,}|\d{60,}|\d!|\^[^{]*\^", s):
            return False
        if not re.search(r"[\\^_(\[,/*+=<>-]|\d", s):
            return False
    return True


def same_mathematics(a: str, b: str) -> bool:
    """math-verify's opinion, False when it has none in time. Its process starts with the first question."""
    with Verifier.lock:
        if Verifier.process is None or Verifier.process.poll() is not None:
            Verifier.start()
        try:
            Verifier.process.stdin.write(json.dumps([a, b]) + "\n")
            Verifier.process.stdin.flush()
            return Verifier.verdicts.get(timeout=SECONDS) == "True"
        except (Empty, OSError):
            Verifier.timeouts += 1
            Verifier.stop()
            return False


class Verifier:
    """The process that math-verify runs in. One for all threads."""

    lock, process, verdicts = threading.Lock(), None, None
    timeouts = 0  # comparisons that took too long and count as wrong; eval.py says how many

    @classmethod
    def start(cls) -> None:
        command = [sys.executable, "-u", str(Path(__file__).resolve()), "verify"]
        cls.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        cls.verdicts, pipe = Queue(), cls.process.stdout

        def read(verdicts=cls.verdicts):
            for line in pipe:
                verdicts.put(line.strip())
            verdicts.put("ended")

        threading.Thread(target=read, daemon=True).start()
        if cls.verdicts.get(timeout=60) != "ready":
            raise RuntimeError("math-verify did not start: pip install -r requirements.txt")

    @classmethod
    def stop(cls) -> None:
        if cls.process is not None:
            cls.process.kill()
            cls.process.wait()
            cls.process = None


atexit.register(Verifier.stop)


def verify_pairs() -> None:
    """Reads pairs of answers, writes True or False for each."""
    from math_verify import parse, verify

    verify(parse("$1$"), parse("$2$"))  # what is imported late
    print("ready")
    for line in sys.stdin:
        try:
            a, b = (parse(f"${x}$", parsing_timeout=None, raise_on_error=False) for x in json.loads(line))
            print(bool(a and b and verify(b, a, timeout_seconds=None)))
        except Exception:  # whatever a parser may stumble over: no opinion  # noqa: BLE001
            print(False)


if __name__ == "__main__" and sys.argv[1:] == ["verify"]:
    verify_pairs()
