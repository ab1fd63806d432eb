"""Pull the final answer out of a response, and compare it with the reference.

`is_correct` takes lists, points, sets, intervals and matrices apart, compares numbers exactly and words as words, and
asks math-verify only about what is still mathematics. Nothing that a model wrote is evaluated as code; what goes to
math-verify is short and shallow, and parsed in a process of its own that ends when it takes too long.
"""

import json
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from fractions import Fraction
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path

from data import InputError

LONGEST = 500  # characters of an answer; what is longer is none
SECONDS = 0.7  # of processor time that math-verify may take for one comparison, however busy the machine
PATIENCE = 120  # seconds on the clock after which its process is taken for dead
DISPLAY = (r"\A[ \t*_:\n]*(?:\$\$?|\\\[|\\\(|`{3}\w*|\\begin\{\w{1,20}\*?\})[ \t]*\n+([^\n]*)"
           r"\n+[ \t]*(?:\$\$?|\\\]|\\\)|`{3}|\\end\{\w{1,20}\*?\})")  # of one line
NUMBER = r"(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})"
NAME = r"(?:m?\\angle ?)?\\?[a-zA-Z]+(?:_\{\w+\}|\^\{-1\})?(?:\([a-zA-Z]\))?"  # x, AB, \theta, x_{1}, f(x)
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NO_UNIT = set(SCALES) | set(re.findall("[a-z]+", """or and to not if is but unless plus minus over more less than least
    most squared cubed factorial choose mod base pi root half halves third thirds quarter quarters fourths fifths sixths
    sevenths eighths ninths tenths hundredths one two three four five six seven eight nine ten am pm"""))
SHORT_UNITS = set(re.findall("[a-zL]+", "m g s h cm mm km kg mg ml mL ft in mi yd lb oz hr sq cu of"))
SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "—": "-", "‐": "-", "⁄": "/", "÷": "/", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "±": r"\pm ",
    "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "≈": r"\approx ", "€": "", "£": "", "¥": "",
})
SPELLINGS = [
    # what is only for the eye: 1,\!000 and 1{,}000, \$5, \left, spaces, delimiters
    (r"(?<=\d)(?:\{,\}(?:\\!)?|,\s*\\!\s*|\\,)(?=\d{3}(?!\d))|\\\$|\\!|(?<!\\)\\(?=[\d.])", ""),
    (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])|\*\*(?![\w(])|(?<![\w)])\*\*|__", ""),
    (r"(?<!\\)\\[,;:> ()\[\]]|\\q?quad(?![a-zA-Z])|~|\$|`", " "), (r"\{([.:])\}", r"\1"),
    # words; one letter in \text after a number is a unit
    (r"(?<=[\d})])\s*\\(?:text\w*|mathrm|mbox)\s*\{\s*[a-df-hj-zA-Z]\s*\}", " units"),
    (r"\\(?:text\w*|mathrm|mbox|mathbf)\s*\{([^{}]*)\}", r" \1 "), (r"(?<=[a-zA-Z])\.", ""),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])", " degrees "), (r"\\?%", " percent "),
    (r"(?<![\\a-zA-Z])(pi|sin|cos|tan|log|ln|sqrt)(?![a-zA-Z])", r"\\\1 "), (r";|\s*,?\s{1,3}(?:or|and)\s", ","),
    # the same in other commands, with and without braces
    (r"\\[dtc]frac", r"\\frac"), (r"\\frac(?:\s*(\d|\\pi(?![a-z]))|\s+([a-zA-Z]))", r"\\frac{\1\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}"), (r"\*\*", "^"),
    (r"√\s*(\d+)|(?:√|\\sqrt)\s*(?:\(([^()]*)\)|(\w))", r"\\sqrt{\1\2\3}"),
    (r"\\sqrt(\[\d\])?\{(?:(\d+|[a-zA-Z])/(\d+|[a-zA-Z])|\\frac\{([^{}]+)\}\{([^{}-][^{}]*)\})\}",
     r"\\frac{\\sqrt\1{\2\4}}{\\sqrt\1{\3\5}}"), (r"\\sqrt\{([a-zA-Z])([a-zA-Z])\}", r"\\sqrt{\1}\\sqrt{\2}"),
    (r"\^\{(\w)\}", r"^\1"), (r"\^(\d\d+)", r"^{\1}"), (r"(?<=\d)_(\d+)|_(\w)", r"_{\1\2}"),
    (r"\\(begin|end)\{[bB]?matrix\}", r"\\\1{pmatrix}"), (r"^\s*\\mathbb\{R\}\s*$", r"(-\\infty,\\infty)"),
    (r"\\lbrace", r"\\{"), (r"\\rbrace", r"\\}"), (r"\\langle", "("), (r"\\rangle", ")"),
    (r"\\varnothing", r"\\emptyset"),
    (r"<=|\\leq?(?:slant)?(?![a-z])", r"\\leq "), (r">=|\\geq?(?:slant)?(?![a-z])", r"\\geq "),
]


def opens_thought(prompt: str) -> bool:
    """Whether a prompt, as the model reads it, ends with the tag that opens a thought (R1's template does)."""
    return prompt.rstrip().endswith("<think>")


def extract_answer(text: str, opened: bool = False) -> str | None:
    """The answer a response states: the last closed \\boxed{...} (braces matched); else what follows the last `####`,
    `answer is` or `Answer:`, on its line or the next one that is not empty. Thoughts, up to the last </think>, do not
    count, and while one has no end there is no answer. opened: the prompt has opened one already.

    None when there is neither: the last number of a text is not an answer. A `####` with text below it is a heading.
    """
    _, closed, text = text.rpartition("</think>")
    text = text.rstrip()
    if "<think>" in text or (opened and not closed):
        return None
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))
    for box in boxes[:-50:-1]:  # a text of nothing but \boxed{ must not take quadratic time
        depth, inside = 1, text[box.end() : box.end() + 2 * LONGEST]
        for m in re.finditer(r"\\[\\{}]|[{}]", inside):
            depth += (m[0] == "{") - (m[0] == "}")
            if depth == 0:
                if found := inside[: m.start()].strip():
                    return found
                break
    if bare := re.findall(r"\\boxed +([^\s{}$]+)", text):  # \boxed 18
        return bare[-1].rstrip(".,$")
    mark = r"(?:^|\n)[ \t]*####(?!#)|\banswer(?:\s+is|[\s*_]*[:=])[\s*_]*:?|\banswer\b[\s*_]*\n"
    for m in list(re.finditer(mark, text, re.IGNORECASE))[:-50:-1]:
        after = text[m.end() : m.end() + 2 * LONGEST]
        if "####" in m[0] and (not after.partition("\n")[0].strip() or "\n" in text[m.end() :].strip()):
            continue  # a heading
        found = first_statement(re.sub(DISPLAY, r"\1", after).lstrip(" \t*_:\n").partition("\n")[0])
        if found:
            return None if re.match(r"[$\s]*\\(?:boxed|fbox)\s*\{", found) else found  # a box without end or content
    return None


def first_statement(line: str) -> str | None:
    """What a line says first: the mathematics it starts with, unless that goes on (`$3$ or $4$`, `$3$ million`), else
    its first sentence."""
    line = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)|__|</?\w{1,20}>", "", line).strip()  # bold, and tags such as </answer>
    line = re.sub(r"(?i)^(?:that|is|equal(?:s| to)|therefore|thus|simply|just|about)\s+", "", line)
    end = r"(?<!\\)[.;](?=\s|$)(?!\s*(?:or|and)\b)|,?\s+(?:because|since|which|so|as|where)\s"
    line = re.split(end, line)[0].strip()
    m = re.match(r"(?:\$\$?|`|\\\(|\\\[)(.+?)(?:\$\$?|`|\\\)|\\\])(?!\d)[\s,]*(([a-zA-Z]*).*)", line)
    if m and (not m[2] or m[3] and m[3].lower() not in NO_UNIT):
        return m[1].strip() or None
    return line or None


def normalize(answer: str) -> str:
    """One spelling for what can be written in several, without units, spaces and separators of thousands."""
    s = re.sub(r"[⁻⁰¹²³⁴-⁹]+", r"^{\g<0>}", re.sub(r"[¼-¾⅐-⅞]", r" \g<0>", answer))  # NFKC makes digits of them
    s = unicodedata.normalize("NFKC", s).translate(SYMBOLS)
    for pattern, instead in SPELLINGS:
        s = re.sub(pattern, instead, s)
    s = " ".join(s.split()).strip("*_ ").rstrip(".,: ")
    scaled = rf"(?i)^(-? ?{NUMBER}) ?({'|'.join(SCALES)})\b"
    s = re.sub(scaled, lambda m: str(Fraction(m[1].replace(" ", "")) * SCALES[m[2].lower()]), s)
    amount = r"((?:[^ ]| (?![a-zA-Z]))*(?:[\d})]|\\pi))"  # with no word in it
    unit = re.fullmatch(rf"{amount}(?: -?|-|(?=[ckm]m|kg|[a-zA-Z]{{4}}))([a-zA-Z][a-zA-Z /]*)(?:\^[23])?", s)
    words = re.findall("[a-zA-Z]+", unit[2]) if unit else []
    if words and all((len(w) > 2 or w in SHORT_UNITS) and w.lower() not in NO_UNIT for w in words):
        s = unit[1]
    if re.fullmatch(r"-? ?\d{1,3}([, ]\d{3})+(\.\d+)?", s):
        s = re.sub("[, ]", "", s)
    s = re.sub(rf"^(?:\\approx|=|{NAME} ?\\in)(?![a-z])", "", s)
    s = re.sub(r"(?<![\da-zA-Z]) | (?![\da-zA-Z])|(?<=\d) (?=[a-zA-Z](?![a-zA-Z]))", "", s)
    s = re.sub(r"(\\(?:times|cdot|[lg]eq)) (?=\d)", r"\1", s)
    s = re.sub(rf"^([^=<>]*[\d)}}])=({NAME})$", r"\2=\1", s)  # 5=x
    return re.sub(r"^([-+]?)0+(?=\d)", r"\1", s).removeprefix("+")


def value(s: str) -> Fraction | None:
    """The exact number that a normalised answer is: an integer or decimal, also times a power of ten, a fraction, a
    mixed number; None if it is none."""
    s = re.sub(r"^(-?)(?:\((.*)\)|\{(.*)\})$", r"\1\2\3", s)
    s = re.sub(rf"\\frac\{{(-?{NUMBER})\}}\{{(-?{NUMBER})\}}", r" \1/\2", s).strip()
    if m := re.fullmatch(rf"(-?{NUMBER})(?:(?:[eE]|(?:\\times|\\cdot|\*)10\^)\{{?([-+]?\d{{1,3}})\}}?)?", s):
        return Fraction(m[1].rstrip(".")) * Fraction(10) ** int(m[2] or 0)
    m = re.fullmatch(rf"(-?) ?(?:(\d{{1,40}}) )?(-?{NUMBER})/(-?{NUMBER})", s)
    if m and Fraction(m[4].rstrip(".")):
        return (-1 if m[1] else 1) * (int(m[2] or 0) + Fraction(m[3].rstrip(".")) / Fraction(m[4].rstrip(".")))
    return None


def is_correct(response: str, reference: str, opened: bool = False) -> bool:
    """Whether the answer that the response states equals the reference. opened: the prompt ends within a thought. What
    is a matter of opinion:

    reference   right                                      wrong
    36 cm       36, 36 cm, 36 m: the problem says which    36 million, 36 squared: other numbers
    17          17%, \\$17, 017, 17.0, (17), [17], x = 17    0.17; 20-3, |-17|: to compute is the task
    1/3         2/6, \\frac13                               0.333: nothing is rounded, nor is \\pi
    1, 2        2, 1; 2 or 1; \\{2, 1\\}; (1, 2)              (2, 1): round brackets keep an order
    x = 5       5, 5 = x                                   y = 5
    2n          n + n                                      2N: another letter
    A           A, (a), A. or A - with its text            A or B; (A) or (C); A matter of taste; A - 5
    """
    found = extract_answer(response, opened)
    if found is None or len(found) > LONGEST:
        return False
    if letter := re.fullmatch(r"\(?([A-Z])\)?", normalize(reference)):
        return chosen_letter(found) == letter[1]
    powers = [re.findall(r"[a-zA-Z]{2}\W*\^\W*(\d)\W*$", s) for s in (found, reference)]
    if all(powers) and powers[0] != powers[1]:  # cm^3 is not cm^2
        return False
    try:
        return same(found, reference)
    except TimeoutError:
        return False


def chosen_letter(answer: str) -> str | None:
    """The option that is named and no other one; a sentence that starts with A or I names none."""
    s = re.sub(r"\\(?:text\w*|mathrm|mbox|mathbf)\s*\{([^{}]*)\}|\\left|\\right", r"\1", answer)
    hedge = r"\W*(?:or|and|but)\b|\s*[,/&]|.*(?-i:\([A-J]\)|\s[A-HJ](?:[):]|\.\s*\w)|\bor [A-J]\W*$)"
    after = r"\s*[).:](?!\w)|(?:\s-+\s+|\s*[–—]\s*)(?!(?:sin|cos|tan|log|exp)\b)(?=[a-z]{3})"  # A. text, A - text
    m = re.match(rf"(?is)[^\w-]*(?:(?:option|choice|answer)\W+)?([a-z])(?:\W*$|(?:{after})(?!{hedge}))", s)
    return m and m[1].upper()


def same(a: str, b: str) -> bool:
    """Whether an answer a is the reference b. Raises TimeoutError if math-verify has no opinion in time."""
    a, b = normalize(a), normalize(b)
    words = re.search("[a-zA-Z]{2}", b) and not re.search(r"[\\^_=+*/]", b)
    if a == b or words and a.lower().replace(" ", "") == b.lower().replace(" ", ""):
        return a != ""
    x, y = value(a), value(b)
    if x is not None and y is not None:
        return x == y
    (brackets_a, parts_a), (brackets_b, parts_b) = parts(a), parts(b)
    if len(parts_a) > 1 and len(parts_b) > 1 and r"\pm" not in a + b:
        kinds = {brackets_a, brackets_b}
        if len(parts_a) != len(parts_b) or not (len(kinds) == 1 or kinds <= {"", r"\{\}"} or kinds <= {"", "()"}):
            return False
        if kinds <= {"", r"\{\}"}:
            return all(any(same(p, q) for q in parts_b) for p in parts_a) and all(
                any(same(p, q) for p in parts_a) for q in parts_b)
        return all(same(p, q) for p, q in zip(parts_a, parts_b))
    if len(parts_a) == len(parts_b) == 1 and (brackets_a or brackets_b):
        return same(parts_a[0], parts_b[0])
    named_a, named_b = (re.fullmatch(rf"({NAME}|[^a-zA-Z<>=]+)=(?:[^<>]*=)?([^=<>]+)", s) for s in (a, b))
    if named_a and named_b and named_a[1] == named_b[1]:
        return same(named_a[2], named_b[2])
    if (named_a or named_b) and not re.search(r"[=<>]|\\[lg]eq", b if named_a else a):
        return same(named_a[2] if named_a else a, named_b[2] if named_b else b)
    if y is not None and re.fullmatch(r"(?:[\d.+\-*/()|{}]|\\cdot|\\times|\\frac)+", a):  # 20-3 for 17
        return False
    if re.search(r"[\dA-Z]_", a) or re.search(r"[\dA-Z]_", b):  # a base, which math-verify ignores
        return False
    letters_a, letters_b = ({*re.sub(r"\\[a-zA-Z]+", "", s)} for s in (a, b))
    if letters_a != letters_b and {*map(str.lower, letters_a)} == {*map(str.lower, letters_b)}:  # N for n
        return False
    return is_mathematics(a) and is_mathematics(b) and Verifier.ask(a, b)


def parts(s: str) -> tuple[str, list[str]]:
    """The brackets around, and the parts of, a list, set, point, interval, union or matrix; else s is the one part."""
    if m := re.fullmatch(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", s):
        rows = [row.split("&") for row in m[1].split(r"\\") if row]
        return f"matrix {[len(row) for row in rows]}", [entry for row in rows for entry in row]
    m = re.fullmatch(r"(\\\{|[(\[])(.+)(\\\}|[)\]])", s)
    if m and (pieces := split(m[2])):
        return m[1] + m[3], pieces
    return "", split(s) or [s]


def split(s: str) -> list[str]:
    """Cut at the commas, or \\cup, that no bracket encloses; [] if one is closed that was not opened, as in a)(b."""
    pieces, depth, start = [], 0, 0
    for m in re.finditer(r"[(\[{]|[)\]}]|,|\\cup", s):
        depth += (m[0] in "([{") - (m[0] in ")]}")
        if depth < 0:
            return []
        if depth == 0 and m[0] in (",", r"\cup"):
            pieces.append(s[start : m.start()])
            start = m.end()
    return [*pieces, s[start:]]


def is_mathematics(s: str) -> bool:
    """Whether math-verify can be asked without harm: no words, no times of day, no towers, short and shallow; no list
    like a28 b24, which it takes for a product, and so for b28 a24."""
    depth = max(accumulate((c in "([{") - (c in ")]}") for c in s), default=0)
    tower = r"\^\{?-?\d{4,}|\d{60,}|\d!|\^(?:\w|\{[^{}]*\})\^|\^[{(][^})]*\^"
    numbered = r"(?<![\\a-zA-Z])[a-zA-Z]\d"
    words = rf"{numbered}.*{numbered}|(?<![\\a-zA-Z])[a-zA-Z]{{3,}}|\d \d|\d['\"]|:|^[^a-zA-Z]*=[^a-zA-Z]*$"
    return len(s) < 200 and depth < 9 and not re.search(f"{tower}|{words}", s)


class Verifier:
    """The process that math-verify runs in, one for all threads. It starts with the first question, and ends when this
    process does: then its standard input ends."""

    lock, process = threading.Lock(), None
    timeouts = 0  # comparisons that took too long and count as wrong; eval.py says how many

    @classmethod
    def ask(cls, a: str, b: str) -> bool:
        """math-verify's opinion. TimeoutError if it has none in time; InputError if it cannot be started."""
        with cls.lock:
            process = cls.process if cls.process and cls.process.poll() is None else cls.start()
            cls.process = None  # until it has answered: one that a Ctrl-C interrupts would answer the next question
            try:
                process.stdin.write(json.dumps([a, b]) + "\n")
                process.stdin.flush()
                verdict = cls.read(process)
            except OSError:
                verdict = ""
            if not verdict:
                cls.timeouts += 1
                process.kill()
                process.wait()
                raise TimeoutError("math-verify has no opinion in time")
            cls.process = process
            return verdict == "True"

    @staticmethod
    def read(process: subprocess.Popen) -> str:
        """Its next line, or "" if it has ended or not said anything for PATIENCE seconds."""
        return process.stdout.readline().strip() if wait([process.stdout], PATIENCE) else ""

    @classmethod
    def start(cls) -> subprocess.Popen:
        command, root = [sys.executable, "-m", "data.answers", "verify"], Path(__file__).resolve().parent.parent
        process = subprocess.Popen(  # in a session of its own, which a Ctrl-C on the terminal does not reach
            command, cwd=root, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if cls.read(process) != "ready":
            process.kill()
            raise InputError("math-verify, which compares answers, did not start: pip install -r requirements.txt; "
                             f"in {root}, python -m data.answers verify says what is wrong")
        return process


def verify_pairs() -> None:
    """Reads pairs of answers, writes True or False for each. A comparison that takes SECONDS of its own processor time
    ends the process: by SIGPROF, which stops the long powers of C code too."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig(normalization_config=NormalizationConfig(units=False, nits=True, boxed="none"))]
    options = {"float_rounding": 15, "numeric_precision": 50, "allow_set_relation_comp": True, "timeout_seconds": None}

    def compare(answer: str, reference: str) -> bool:
        a, b = (parse(f"${s}$", latex, fallback_mode="no_fallback", parsing_timeout=None) for s in (answer, reference))
        return bool(a and b) and verify(b, a, **options)

    compare("x>5", r"(5,\infty)"), compare("2y=4x", "y=2x")  # what is imported late
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            verdict = compare(*json.loads(line))
        except Exception:  # whatever a parser may stumble over: no opinion  # noqa: BLE001
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["verify"]:
    verify_pairs()
