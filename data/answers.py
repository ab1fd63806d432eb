"""Pull the final answer out of a response, and compare it with the reference."""

import re
from fractions import Fraction


def extract_answer(text: str) -> str | None:
    """The last closed \\boxed{...} (braces matched), else what follows the last `####` or `answer is` on its line.

    None when there is neither: the last number of a text is not an answer.
    """
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start:i].strip() or None
    marks = list(re.finditer(r"####|answer is:?", text, re.IGNORECASE))
    if not marks:
        return None
    return text[marks[-1].end() :].split("\n")[0].strip() or None


def normalize(answer: str) -> str:
    """Strip what does not change the value: $ signs, commas between digits, spaces, a trailing period, leading
    zeros."""
    answer = answer.strip().strip("$").rstrip(".").replace("\\$", "").replace("$", "").strip()
    answer = re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer)
    answer = re.sub(r"\s+", " ", answer)
    return re.sub(r"^(-?)0+(?=\d)", r"\1", answer)


def is_correct(response: str, reference: str) -> bool:
    """Whether the response's answer equals the reference: as a string once normalised, or as an exact number."""
    found = extract_answer(response)
    if found is None or len(found) > 500:
        return False
    found, reference = normalize(found), normalize(reference)
    if not found:
        return False
    if found == reference:
        return True
    number = r"-?\d{1,30}(\.\d{1,30})?(/\d{1,30})?"
    if not (re.fullmatch(number, found) and re.fullmatch(number, reference)):
        return False
    try:
        a, b = (Fraction(x.split("/")[0]) / Fraction(x.split("/")[1] if "/" in x else 1) for x in (found, reference))
    except ZeroDivisionError:
        return False
    return a == b
