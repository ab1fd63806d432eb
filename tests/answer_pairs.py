"""Pairs of answers with known verdicts, for test_answers.py: `pairs(seed, n)` draws n of each family.

A family is a function of a random generator that returns (reference, right answers, wrong answers); each is written as
a model would write it, and its verdict is known from how it was made, not from any grader.
"""

import random
from collections.abc import Iterator
from fractions import Fraction
from math import gcd


def digits(r: random.Random, low: int = 2, high: int = 99) -> int:
    return r.randint(low, high)


def integers(r):
    n = r.choice([-1, 1]) * digits(r, 1, 9999)
    return f"{n}", [f"{n}.0", f"${n}$", f"\\text{{{n}}}", f"n={n}", f"**{n}**", f"{n}.", f"{n}".replace("-", "−"),
                    f"{n}".replace("-", "–"), f"\\({n}\\)", f"({n})", f"{n} ", f"\\approx {n}", f"{n}=x"], [
        f"{n + 1}", f"{-n}", f"{n}0", f"{n}.01", f"{n}1", f"|{n}|1", f"{n - 3}+3", f"x={n + 1}", f"{n} or {n + 1}"]


def thousands(r):
    a, b = digits(r, 1, 999), digits(r, 100, 999)
    n = a * 1000 + b
    sep = r.choice([",", "{,}", ",\\!", "\\,", ", \\!", "\u202f", " "])
    return r.choice([f"{n}", f"{a},{b}", f"{a},\\!{b}"]), [f"{a}{sep}{b}", f"\\${a},{b}", f"{n}", f"{a},{b}.00"], [
        f"{a}", f"{b}", f"({a},{b})", f"\\{{{a},{b}\\}}", f"{a},{b + 1 if b < 999 else 100}", f"[{a},{b}]", f"{a}.{b}"]


def decimals(r):
    a, b = digits(r, 0, 99), r.choice([i for i in range(1, 100) if i % 10])
    return f"{a}.{b:02}", [f"{a}.{b:02}0", f"{a}{{.}}{b:02}", f"0{a}.{b:02}", f"\\frac{{{a * 100 + b}}}{{100}}"] + (
        [f".{b:02}"] if a == 0 else []), [f"{a}.{b:02}1", f"{a}", f"{a}{b:02}", f"{a},{b:02}", f"{a + 1}.{b:02}"]


def fractions(r):
    a, b = digits(r, 1, 9), digits(r, 2, 9)
    k = digits(r, 2, 5)
    sign = r.choice(["", "-"])
    return f"{sign}\\frac{{{a}}}{{{b}}}", [
        f"{sign}\\dfrac{{{a}}}{{{b}}}", f"{sign}\\frac{a}{b}", f"{sign}\\tfrac {a} {b}", f"{sign}{a}/{b}",
        f"{sign}{a} / {b}",
        f"\\frac{{{sign}{a}}}{{{b}}}", f"{sign}\\frac{{{a * k}}}{{{b * k}}}", f"{sign}\\frac{a}{{{b}}}",
        f"{sign}\\frac{{{a}}}{b}", f"x = {sign}\\frac{{{a}}}{{{b}}}", f"{sign}({a}/{b})"], [
        f"{sign}\\frac{{{a}}}{{{b + 1}}}", f"{sign}{a}{b}", f"{'' if sign else '-'}\\frac{{{a}}}{{{b}}}",
        f"{sign}{a}{a}/{b}", f"{sign}\\frac{{{a + 1}}}{{{b}}}", f"{sign}{a / b + 0.01:.2f}"] + (
        [f"{sign}{a / b:.3f}"] if b in (3, 7, 9) and a % b and Fraction(a, b).denominator not in (1, 2, 4, 5, 8) else [])


def mixed(r):
    w, b = digits(r, 1, 30), digits(r, 2, 9)
    a = r.randint(1, b - 1)
    f = Fraction(w * b + a, b)
    half = [f"{w}½", f"{w} ½"] if Fraction(a, b) == Fraction(1, 2) else []
    return r.choice([f"\\frac{{{w * b + a}}}{{{b}}}", f"{w}\\frac{{{a}}}{{{b}}}", f"{w} {a}/{b}"]), half + [
        f"{w} {a}/{b}", f"{w}\\frac{{{a}}}{{{b}}}", f"{w} \\frac{a}{b}", f"{f.numerator}/{f.denominator}"], [
        f"{w}{a}/{b}", f"{w}", f"{w + 1} {a}/{b}", f"{w}-{a}/{b}", f"{w} {a} {b}", f"{a}/{b}"]


def points(r):
    a, b = digits(r, 1, 999), digits(r, 100, 999)
    b += a == b
    return f"({a},{b})", [f"({a}, {b})", f"\\left({a},{b}\\right)", f"( {a} , {b} )", f"(x,y)=({a},{b})"], [
        f"({b},{a})", f"{a}{b}", f"({a}{b})", f"({a},{-b})", f"[{a},{b}]", f"{a}", f"({a},{b},0)", f"({a},{b + 1})"]


def points_of_fractions(r):
    a, b, c = digits(r, 1, 9), digits(r, 2, 9), digits(r, 1, 9)
    return f"\\left( \\frac{{{a}}}{{{b}}}, -{c} \\right)", [
        f"(\\frac{a}{b},-{c})", f"({a}/{b}, -{c})", f"(\\dfrac{{{2 * a}}}{{{2 * b}}}, -{c})"], [
        f"(\\frac{{{a}}}{{{b}}}, {c})", f"(\\frac{{{a}}}{{{b + 1}}}, -{c})", f"\\frac{{{a}}}{{{b}}}", f"(-{c}, \\frac{a}{b})"]


def sets(r):
    a, b = r.sample(range(1, 999), 2)
    return f"\\{{{a},{b}\\}}", [f"\\{{{b}, {a}\\}}", f"\\left\\{{{a},{b}\\right\\}}", f"\\lbrace {a},{b}\\rbrace", f"{a}, {b}"], [
        f"\\{{{a}{b}\\}}", f"\\{{{a}\\}}", f"\\{{{a},{b + 1}\\}}", f"{a}{b}", f"\\{{{a},{b},0\\}}", f"({b},{a})"]


def intervals(r):
    a, b = sorted(r.sample(range(1, 9999), 2))
    left, right = r.choice("(["), r.choice(")]")
    swap = {"(": "[", "[": "(", ")": "]", "]": ")"}
    return f"{left}-{a},{b}{right}", [
        f"{left}-{a}, {b}{right}", f"\\left{left}-{a}, {b}\\right{right}", f"x \\in {left}-{a},{b}{right}",
        f"-{a} {'<' if left == '(' else chr(92) + 'le'} x {'<' if right == ')' else '<='} {b}"], [
        f"{swap[left]}-{a},{b}{right}", f"{left}-{a},{b}{swap[right]}", f"{left}{a},{b}{right}", f"{left}-{a},{b + 1}{right}"]


def infinite_intervals(r):
    a = r.randint(-99, 99)
    return f"({a},\\infty)", [f"({a}, \\infty)", f"\\left({a}, +\\infty\\right)", f"({a},∞)", f"x > {a}", f"{a} < x"], [
        f"[{a},\\infty)", f"(-\\infty,{a})", f"x < {a}", f"x \\ge {a}", f"({a + 1},\\infty)", f"{a}", f"({a},-\\infty)"]


def unions(r):
    a, b = sorted(r.sample(range(-99, 99), 2))
    return f"(-\\infty,{a}) \\cup [{b},\\infty)", [
        f"(-\\infty, {a})\\cup[{b}, \\infty)", f"[{b},\\infty)\\cup(-\\infty,{a})", f"(-∞,{a}) ∪ [{b},∞)",
        f"x<{a} \\text{{ or }} x \\geq {b}", f"\\left(-\\infty,{a}\\right) \\cup \\left[{b},+\\infty\\right)"], [
        f"(-\\infty,{a}] \\cup [{b},\\infty)", f"(-\\infty,{a})", f"[{b},\\infty)", f"(-\\infty,{a}) \\cup ({b},\\infty)",
        f"(-\\infty,{a - 1}) \\cup [{b},\\infty)", f"x<{a}", "(-\\infty,\\infty)"]


def lists(r):
    a, b, c = r.sample(range(1, 99), 3)
    return f"{a}, {b}, -{c}", [f"{b},{a},-{c}", f"-{c}, {a} and {b}", f"{a}, {b}, and -{c}", f"{a};{b};-{c}",
                               f"$ {a} $, $ {b} $, $ -{c} $", f"x={a}, x={b}, x=-{c}"], [
        f"{a},{b},{c}", f"{a},{b}", f"{a}{b}{c}", f"{a}", f"{a},{b},-{c + 1}", f"{a} {b} -{c}"]


def alternatives(r):
    a, b = r.sample(range(2, 99), 2)
    return f"{a}, {b}", [f"{a} or {b}", f"{a} \\text{{ or }} {b}", f"{b}\\text{{ and }}{a}", f"x={a} or x={b}", f"${a}$ and ${b}$"], [
        f"{a}{b}", f"{a}", f"{a} {b}", f"{b}", f"{a} or {b + 1}", f"{a} or more"]


def hedges(r):
    a, b = r.sample(range(2, 99), 2)
    return f"{a}", [f"{a} apples", f"{a}."], [
        f"{a} or {b}", f"{a} \\text{{ or }} {b}", f"${a}$ or ${b}$", f"{a} or more", f"not {a}", f"{a}, {b}", f"{a} {b}", f"{a} if {b} is even",
        f"{a} and {b}", f"at least {a}", f"{a}?{b}", f"{a} to {b}"]


def polynomials(r):
    a, b, c = digits(r, 2, 9), digits(r, 2, 9), digits(r, 1, 9)
    return f"{a}x^3 - {b}x^2 + {c}", [
        f"{a}x^{{3}}-{b}x^{{2}}+{c}", f"{c}+{a}x^3-{b}x^2", f"x^2({a}x-{b})+{c}", f"{a}x³ - {b}x² + {c}", f"{a}*x^3-{b}*x^2+{c}",
        f"y={a}x^3-{b}x^2+{c}"], [
        f"{a}x^3+{b}x^2+{c}", f"{a}x^2-{b}x^3+{c}", f"{a}x^3-{b}x^2", f"{a}y^3-{b}y^2+{c}", f"{a}x^3-{b}x^2+{c + 1}", f"{a}x^4-{b}x^2+{c}"]


def two_letters(r):
    a, b = digits(r, 2, 9), digits(r, 2, 9)
    return f"{a}x^2 - {b}y^2", [f"-{b}y^2+{a}x^2", f"{a}x^{{2}}-{b}y^{{2}}", f"{a}x^2-{b}y^{{2}}"], [
        f"{a}x^2+{b}y^2", f"{a}y^2-{b}x^2" if a != b else "x", f"{a}x^2", f"{a}X^2-{b}Y^2", f"{a}x^2-{b}y^3"]


def factors(r):
    a, b = r.sample(range(1, 30), 2)
    return f"(x+{a})(x-{b})", [f"(x-{b})(x+{a})", f"x^2+{a - b}x-{a * b}".replace("+-", "-"), f"(x - {b})(x + {a})"], [
        f"(x-{a})(x+{b})", f"(x+{a})(x+{b})", f"(x+{a})", f"x^2+{a + b}x-{a * b}"]


def radicals(r):
    a, k = r.choice([2, 3, 5, 6, 7, 11, 13]), digits(r, 2, 9)
    return f"{k}\\sqrt{{{a}}}", [f"{k}\\sqrt{a}" if a < 10 else f"\\sqrt{{{a}}}\\cdot {k}", f"\\sqrt{{{k * k * a}}}", f"{k}√{a}",
                                 f"{k} \\sqrt {{{a}}}", f"{k}\\cdot\\sqrt{{{a}}}", f"{k}sqrt({a})"], [
        f"{k + 1}\\sqrt{{{a}}}", f"{k}\\sqrt{{{a + 1}}}", f"\\sqrt{{{a}}}", f"-{k}\\sqrt{{{a}}}", f"{k * a ** 0.5:.6f}", f"{k}{a}",
        f"{k}\\sqrt[3]{{{a}}}"]


def pi_multiples(r):
    a, b = digits(r, 1, 30), r.choice([2, 3, 4, 5, 7])
    while gcd(a, b) > 1:
        a += 1
    return f"\\frac{{{a}\\pi}}{{{b}}}", [f"\\frac{{{a}}}{{{b}}}\\pi", f"{a}\\pi/{b}", f"{a}π/{b}", f"\\dfrac{{{a} \\pi}}{{{b}}}", f"{a}pi/{b}"], [
        f"\\frac{{{a}}}{{{b}}}", f"{a}\\pi", f"\\frac{{{a + b}\\pi}}{{{b}}}", f"{a * 3.14159265358979 / b:.6f}", f"-\\frac{{{a}\\pi}}{{{b}}}"]


def symbols(r):
    s, right, wrong = r.choice([("\\pi", "π", "3.14"), ("\\infty", "∞", "-∞"), ("\\sqrt{3}", "√3", "1.732"), ("\\emptyset", "\\varnothing", "0"),
                                ("-\\infty", "-∞", "∞"), ("\\frac{1}{2}", "½", "12"), ("90^\\circ", "90°", "9°"), ("x^2", "x²", "x2")])
    return s, [right, f"${right}$", f"\u00a0{right}"], [wrong, "1", "\\pi^2"]


def logarithms(r):
    a, b = r.sample([2, 3, 5, 7, 11], 2)
    return f"\\log_{{{a}}} {b}", [f"\\log_{{{a}}}{{{b}}}", f"\\log_{{{a}}}({b})", f"\\frac{{\\ln {b}}}{{\\ln {a}}}"], [
        f"\\log_{b} {a}", f"\\log_{a} {b + 1}", f"\\log {b}", f"{b}_{a}"]


def bases(r):
    n, b = "".join(r.choice("123") for _ in range(r.randint(2, 5))), r.randint(4, 9)
    return f"{n}_{{{b}}}" if r.random() < 0.5 else f"{n}_{b}", [f"{n}_{b}", f"{n}_{{{b}}}", f"{n}_{{ {b} }}"], [
        f"{n}_{b + 1}", f"{n}", f"{n}1_{b}", f"{n}_{{1{b}}}", f"{n}{b}"]


UNITS = ["cm", "km", "feet", "dollars", "miles per hour", "square inches", "apples", "degrees", "hours each"]


def units(r):
    n, unit = digits(r, 2, 999), r.choice(UNITS)
    return r.choice([f"{n}", f"{n}\\text{{ {unit}}}", f"{n} {unit}"]), [
        f"{n} {unit}", f"{n}\\text{{ {unit}}}", f"{n} \\mbox{{ {unit}}}", f"{n}\\ \\mathrm{{{unit}}}", f"{n}", f"{n}\\text{{ m}}^2", f"${n}$ {unit}"], [
        f"{n + 1} {unit}", f"{n}\\text{{ hundred}}", f"{n} million {unit}", f"{n} squared", f"{n} factorial", f"{n} dozen",
        f"{n} {unit} or more", f"{n} thirds", f"{n} or six", f"{n}\\text{{ h }}{r.randint(10, 59)}\\text{{ min}}", f"{n} plus two"]


def scales(r):
    n, (word, k) = digits(r, 2, 99), r.choice([("million", 10**6), ("thousand", 1000), ("hundred", 100), ("dozen", 12), ("billion", 10**9)])
    return f"{n * k}", [f"{n} {word}", f"{n}\\text{{ {word}}}", f"\\${n} {word}", f"{n * k:,}", f"{n} {word} dollars", f"{n}.0 {word}"], [
        f"{n}", f"{n + 1} {word}", f"{n} dollars", f"{n}0 {word}"]


def percents(r):
    n = digits(r, 2, 99)
    return r.choice([f"{n}\\%", f"{n}"]), [f"{n}%", f"{n}\\%", f"{n} percent", f"{n}", f"{n}.0\\%"], [f"{n + 1}%", f"0.{n:02}", f"{n}0%"]


def money(r):
    a, b = digits(r, 1, 999), digits(r, 10, 99)
    return f"\\${a}.{b}", [f"${a}.{b}", f"{a}.{b}", f"{a}.{b} dollars", f"\\$ {a}.{b}", f"{a}.{b}0", f"€{a}.{b}", f"{a}.{b}\\text{{ USD}}"], [
        f"${a}", f"\\${a}.{b + 1}", f"{a}{b}", f"-\\${a}.{b}", f"${a}.{b} million"]


def letters(r):
    a, b = r.sample("ABCDEFGHIJ", 2)
    return a, [a, f"({a})", f"\\text{{{a}}}", f"\\textbf{{({a})}}\\ 5", f"{a.lower()}", f"{a}) the text", f"Option {a}", f"**{a}**", f"({a}) five of them",
               f"{a}: the text", f"\\mathrm{{({a})}}", f"{a}."], [
        b, f"({b})", f"{a}bc", "5", f"\\text{{{b}}}", f"{b}) {a.lower()} thing", f"not {a}", ""]


def hedged_letters(r):
    a, b = r.sample("ABCDEFGHIJ", 2)
    return a, [a, f"{a}) one"], [f"{a} or {b}", f"{a}, {b}", f"({a}) or ({b})", f"{a}/{b}", f"{a} and {b}", f"{b} and {a}", f"({a}), ({b})",
                    f"{a} matter of taste", f"{a} do not know", f"either {a} or {b}", f"\\text{{{a} or {b}}}", f"{a}. or {b}.", f"({a}) 5 or ({b}) 6",
                    f"{a} & {b}", f"{a}\\text{{ or }}{b}", f"{a}{b}"]


def words(r):
    a, b = r.sample(["Evelyn", "even", "odd", "Monday", "two lines", "east", "ellipse", "neither", "Saturday", "yes", "no"], 2)
    return r.choice([a, f"\\text{{{a}}}"]), [a, f"\\text{{{a}}}", a.lower(), f"\\textbf{{{a}}}", f"{a}.", a.upper(), f"\\mathrm{{{a}}}"], [
        b, f"not {a}", f"{a} or {b}", f"{a[:-1]}", f"\\text{{{b}}}", "5"]


def matrices(r):
    a, b, c, d = r.sample(range(1, 99), 4)
    m = "\\begin{{{0}matrix}} {1} & {2} \\\\ {3} & -{4} \\end{{{0}matrix}}".format
    return m("p", a, b, c, d), [m("b", a, b, c, d), m("p", a, b, c, d).replace(" ", ""), m("p", a, b, c, d).replace(" &", "\u00a0&"),
                                m("p", f"\\frac{{{2 * a}}}{{2}}", b, c, d)], [
        m("p", b, a, c, d), m("p", a, c, b, d), m("p", a, b, c, f"-{d}"[1:] + "0"), m("b", a, b + 1, c, d),
        f"\\begin{{pmatrix}} {a} \\\\ {b} \\end{{pmatrix}}", f"{a}"]


def columns(r):
    a, b = r.sample(range(2, 99), 2)
    m = "\\begin{{{0}matrix}} -{1}/{2} \\\\ {3} \\end{{{0}matrix}}".format
    return m("p", a, 7, b), [m("b", a, 7, b), f"\\begin{{pmatrix}}-\\frac{{{a}}}{{7}}\\\\{b}\\end{{pmatrix}}"], [
        m("p", a, 8, b), m("p", b, 7, a), f"\\begin{{pmatrix}} {a}/7 \\\\ {b} \\end{{pmatrix}}", f"\\begin{{pmatrix}} -{a}/7 & {b} \\end{{pmatrix}}"]


def complex_numbers(r):
    a, b = digits(r, 2, 99), digits(r, 2, 99)
    return f"{a} - {b}i", [f"{a}-{b}i", f"-{b}i+{a}", f"{a} - {b} i", f"z={a}-{b}i"], [
        f"{a}+{b}i", f"-{a}-{b}i", f"{a}", f"{b}-{a}i" if a != b else "i", f"{a}-{b}", f"{a}-{b + 1}i"]


def towers(r):
    a, b = r.sample(range(2, 10), 2)
    return r.choice([f"{a}", "10"]), [], [f"{a}^{b}^{a}^{b}9", f"{a}^{{{b}^{{{a}9}}}}", "10^10^10", "9^{9^{9}}", f"({a}^{{999}})^{{999}}",
                                          f"{a}**{b}**99", f"\\binom{{10^9}}{{10^{a}}}", f"{a}!!!!", f"10^(10^{b})"]


def powers(r):
    a, b = r.choice([2, 3, 5, 7]), digits(r, 20, 90)
    return f"{a}^{{{b}}} - 2", [f"{a}^{{{b}}}-2", f"-2+{a}^{{{b}}}", f"{a}^{b}-2", f"{a ** b - 2}"], [
        f"{a}^{{{b}}}+2", f"{a}^{{{b + 1}}}-2", f"{b}^{{{a}}}-2", f"{a ** b - 3}", f"{a}^{{{b}}}"]


def clocks(r):
    h, m = r.randint(1, 9), r.randint(10, 59)
    return f"{h}\\!:\\!{m} p.m", [f"{h}:{m} p.m.", f"{h}:{m} PM", f"{h}:{m}\\text{{ p.m.}}", f"{h} : {m} pm", f"0{h}:{m} pm"], [
        f"{h}:{m} a.m.", f"{h}:{m + 1} p.m.", f"{h}{m}", f"{h * 2}:{m * 2} pm", f"{h}.{m}", f"{h}:{m} AM"]


def ratios(r):
    a, b = r.sample(range(1, 20), 2)
    return f"{a}:{b}", [f"{a} : {b}", f"${a}:{b}$", f"{a}{{:}}{b}", f"\\text{{{a}:{b}}}"], [f"{b}:{a}", f"{a}", f"{a}{b}", f"{a}:{b + 1}", f"{a}.{b}"]


def inequalities(r):
    a = digits(r, 2, 99)
    return f"x \\le {a}", [f"x \\leq {a}", f"x≤{a}", f"x <= {a}", f"{a} \\ge x", f"x\\leqslant {a}"], [
        f"x<{a}", f"x \\ge {a}", f"x = {a}", f"{a}", f"x \\le -{a}", f"x \\le {a + 1}", f"y \\le {a}"]


def equations(r):
    a = r.choice([-1, 1]) * digits(r, 2, 99)
    return f"x={a}", [f"x = {a}", f"{a} = x", f"{a}", f"$x={a}$", f"\\text{{x = {a}}}", f"x = {a - 1} + 1 = {a}"], [
        f"x={a + 1}", f"y={a}", f"x={-a}", f"{a}x", f"x<{a}", f"x={a}y"]


def lines(r):
    a, b = digits(r, 2, 9), digits(r, 1, 9)
    return f"y = {a}x + {b}", [f"y={a}x+{b}", f"{a}x+{b}", f"y={b}+{a}x", f"2y={2 * a}x+{2 * b}", f"y - {a}x - {b} = 0", f"{a}x+{b}=y"], [
        f"y={a}x-{b}", f"y={a + 1}x+{b}", f"x={a}y+{b}", f"y={a}x", f"y={a}x+{b + 1}"]


def scientific(r):
    a, k = digits(r, 11, 99) / 10, r.randint(2, 12)
    return r.choice([f"{a} \\times 10^{{{k}}}", f"{round(a * 10) * 10 ** (k - 1)}"]), [
        f"{a}\\times10^{{{k}}}", f"{a}e{k}", f"{a}E{k}", f"{a} × 10^{k}", f"{a} \\cdot 10^{{{k}}}", f"{round(a * 10) * 10 ** (k - 1):,}", f"{a}*10^{k}"], [
        f"{a}", f"{a}\\times 10^{{{k + 1}}}", f"{a}\\times 10^{{-{k}}}", f"{a}10^{k}" if k > 1 else "1", f"{a}e-{k}", f"10^{k}"]


def unicode_digits(r):
    n = digits(r, 10, 999)
    wide = "".join(chr(0xFF10 + int(c)) for c in str(n))
    return f"-{n}", [f"−{n}", f"－{wide}", f"–{n}", f"-{wide}", f"\u2212\u2009{n}", f"\u00a0-{n}\u00a0"], [f"{n}", wide, f"-{wide}0"]


def undone(r):
    a, b = digits(r, 11, 99), digits(r, 2, 9)
    return f"{a * b}", [f"{a * b}"], [f"{a}\\cdot {b}", f"{a} \\times {b}", f"{a * b + b}-{b}", f"{a}*{b}", f"|{-a * b}|", f"{a}×{b}"]


FAMILIES = [integers, thousands, decimals, fractions, mixed, points, points_of_fractions, sets, intervals, infinite_intervals, unions, lists,
            alternatives, hedges, polynomials, two_letters, factors, radicals, pi_multiples, symbols, logarithms, bases, units, scales, percents,
            money, letters, hedged_letters, words, matrices, columns, complex_numbers, towers, powers, clocks, ratios, inequalities, equations,
            lines, scientific, unicode_digits, undone]


def pairs(seed: int, n: int) -> Iterator[tuple[str, str, str, bool]]:
    """(family, answer, reference, whether it is right), n references of each family."""
    r = random.Random(seed)
    for family in FAMILIES:
        for _ in range(n):
            reference, right, wrong = family(r)
            yield from ((family.__name__, answer, reference, True) for answer in right)
            yield from ((family.__name__, answer, reference, False) for answer in wrong)
