"""What a model does where a chain ends at a wall, counted in its responses.

    python eval.py --model out/step_000040 --data dominoes --temperature 1 --max_new_tokens 768 --out x.json
    python data/dominoes/walls.py x.jsonl ...
"""

import json
import re
import sys

LINE = re.compile(r"(?:(\d)(/../..))?(\d)([abAB])>(..)((?: .{4})*)(!| .. x)")
QUESTION = re.compile(r"(\d)(/(..)/(..))>(..)")


def count(prompt: str, answer: str, response: str) -> dict[str, int]:
    """Of a careful response: lines; lines with a slip, which no careful text has; questions begun, and with the right
    name; walls behind a first name, and after how many of them the other name was tried."""
    follows = {word[:2]: word[2:] for word in prompt.split() if len(word) == 4}
    asked = {number: (pair, names, goal) for number, pair, *names, goal in QUESTION.findall(prompt)}
    lines, found = response.split("\n")[1:-1], dict.fromkeys(("lines", "slips", "begun", "right", "walls", "again"), 0)
    for line, following in zip(lines, [*lines[1:], ""]):
        found["lines"] += 1
        parts = LINE.fullmatch(line)
        if not parts or parts[3] not in asked:
            found["slips"] += 1
            continue
        begun, pair_, number, letter, goal_, dominoes, end = parts.groups()
        pair, names, goal = asked[number]
        name, laid = names["ab".index(letter.lower())], ""
        while name != goal and name in follows:
            laid, name = f"{laid} {name}{follows[name]}", follows[name]
        true_end = "!" if name == goal else f" {name} x"
        found["slips"] += (begun or number, pair_ or pair, goal_, dominoes, end) != (number, pair, goal, laid, true_end)
        if letter in "ab":
            found["begun"] += 1
            found["right"] += number + letter in answer
            if end != "!":
                found["walls"] += 1
                found["again"] += following[:2] in (number + "A", number + "B")
    return found


def main() -> None:
    for path in sys.argv[1:]:
        with open(path, encoding="utf-8") as f:
            records = [json.loads(line) for line in f if '"response"' in line]
        careful = [r for r in records if r["response"].startswith(" +")]
        found = [count(r["prompt"], r["answer"], r["response"]) for r in careful]
        n = {key: sum(f[key] for f in found) for key in found[0]} if found else {}
        print(f"{path}: {len(records)} responses, careful {len(careful) / len(records):.2f}")
        if n:
            print(f"  the other name tried after {n['again'] / max(1, n['walls']):.3f} of {n['walls']} walls; first "
                  f"name right {n['right'] / n['begun']:.3f} of {n['begun']}; slips in {n['slips'] / n['lines']:.4f} "
                  f"of {n['lines']} lines")


if __name__ == "__main__":
    main()
