"""Pairs of answers with known verdicts, for test_answers.py: `pairs(seed, n)` draws n references of each family.

A family is a reference (=), right answers (+) and wrong ones (-), as a model would write them, separated by ` | `.
What is in « » is computed: a, b and c are different numbers of two digits, a < b; d, e and f different digits from 2
to 9, d < e; m and n different numbers of three digits; A and B letters of options, V and W words, U a unit.
"""

import math
import random
import re
from collections.abc import Iterator

FAMILIES = r"""
integers
= «-a»
+ «-a».0 | $«-a»$ | \text{«-a»} | n=«-a» | **«-a»** | «-a». | −«a» | –«a» | \(«-a»\) | («-a») | \approx «-a» | «-a»=x
- «-a-1» | «a» | «-a»0 | «-a».01 | |«a»| | «a»-«2*a» | x=«1-a» | «-a» or «-b» | 1«-a»
thousands
= «a»«m»
+ «a»,«m» | «a»{,}«m» | «a»,\!«m» | «a»\,«m» | «a» «m» | \$«a»,«m» | «a»,\! «m» | «a»,«m».00 | $«a»,«m»$ dollars
- «a» | «m» | («a»,«m») | \{«a»,«m»\} | [«a»,«m»] | «a».«m» | «a»,«n» | «a»,«m»,«n»
thousands in the reference
= «a»,\!«m»
+ «a»«m» | «a»,«m» | \$«a»,«m» | «a»«m».0
- («a»,«m») | «a» | «a»,«m+1»
decimals
= «a».«d»
+ «a».«d»0 | «a»{.}«d» | 0«a».«d» | \frac{«10*a+d»}{10} | «a» «d»/10
- «a».«d»1 | «a» | «a»«d» | «a»,«d» | «b».«d» | -«a».«d»
fractions
= -\frac{«d»}{11}
+ -\dfrac{«d»}{11} | -\frac «d»{11} | -«d»/11 | - «d» / 11 | \frac{-«d»}{11} | -\tfrac{«2*d»}{22} | -(«d»/11)
- -\frac{«d»}{12} | -«d»11 | \frac{«d»}{11} | -«d»«d»/11 | -\frac{«d+1»}{11} | «-d/11» | -\frac{11}{«d»}
fractions of digits
= \frac{«d»}{«e»}
+ \frac«d»«e» | \frac«d»{«e»} | \frac{«d»}«e» | \frac «d» «e» | «d»/«e» | \tfrac«d»«e»
- \frac«e»«d» | «d»«e» | \frac1«e» | «d» «e» | «d»
mixed numbers
= \frac{«a*e+d»}{«e»}
+ «a» «d»/«e» | «a»\frac{«d»}{«e»} | «a» \frac«d»«e» | «a*e+d»/«e» | «a»\tfrac{«d»}{«e»}
- «a»«d»/«e» | «a» | «b» «d»/«e» | «a»-«d»/«e» | «a» «d» «e» | «d»/«e» | -«a» «d»/«e»
halves
= «2*a+1»/2
+ «a»½ | «a» ½ | «a»\frac12 | «a».5 | «a» 1/2
- «a»12 | «a» | «a»1/2 | «b»½
points
= («a»,«m»)
+ («a», «m») | \left(«a»,«m»\right) | ( «a» , «m» ) | (x,y)=(«a»,«m») | («a».0,«m»)
- («m»,«a») | «a»«m» | («a»«m») | («a»,-«m») | [«a»,«m»] | «a» | («a»,«m»,0) | («a»,«n»)
points of fractions
= \left( \frac{«d»}{11}, -«e» \right)
+ (\frac«d»{11},-«e») | («d»/11, -«e») | (\dfrac{«2*d»}{22}, -«e»)
- (\frac{«d»}{11}, «e») | (\frac{«d»}{12}, -«e») | \frac{«d»}{11} | (-«e», \frac«d»{11})
points in degrees
= («d»,«m»^\circ)
+ («d», «m»^\circ) | («d»,«m»°) | («d», «m»^{\circ})
- («d»«m»^\circ) | («d»,«n»^\circ) | («e»,«m»^\circ) | «d»«m»^\circ
sets
= \{«m»,«n»\}
+ \{«n», «m»\} | \left\{«m»,«n»\right\} | \lbrace «m»,«n»\rbrace | «m», «n» | \{«m»,\,«n»\}
- \{«m»«n»\} | \{«m»\} | \{«m»,«n+1»\} | «m»«n» | \{«m»,«n»,0\}
intervals
= [-«a»,«m»)
+ [-«a», «m») | \left[-«a», «m»\right) | x \in [-«a»,«m») | -«a» \le x < «m» | -«a»<=x<«m»
- (-«a»,«m») | [-«a»,«m»] | [«a»,«m») | [-«a»,«n») | -«a» < x < «m» | («m»,-«a»] | -«a»«m»
infinite intervals
= («a»,\infty)
+ («a», \infty) | \left(«a», +\infty\right) | («a»,∞) | x > «a» | «a» < x
- [«a»,\infty) | (-\infty,«a») | x < «a» | x \ge «a» | («b»,\infty) | «a» | («a»,-\infty)
unions
= (-\infty,«a») \cup [«b»,\infty)
+ (-\infty, «a»)\cup[«b», \infty) | [«b»,\infty)\cup(-\infty,«a») | (-∞,«a») ∪ [«b»,∞) | x<«a» \text{ or } x \geq «b»
- (-\infty,«a»] \cup [«b»,\infty) | (-\infty,«a») | (-\infty,«a») \cup («b»,\infty) | x<«a» | x<«a» \text{ or } x>«b»
lists
= «a», «b», -«c»
+ «b»,«a»,-«c» | -«c», «a» and «b» | «a», «b», and -«c» | «a»;«b»;-«c» | $ «a» $, $ «b» $, $ -«c» $
- «a»,«b»,«c» | «a»,«b» | «a»«b»«c» | «a» | «a»,«b»,-«c+1» | «a» «b» -«c»
alternatives
= «a», «b»
+ «a» or «b» | «a» \text{ or } «b» | «b»\text{ and }«a» | «a», \text{ or } «b» | x=«a» or x=«b» | $«a»$ and $«b»$
- «a»«b» | «a» | «a» «b» | «b» | «a» or «b+1» | «a» or more
hedged numbers
= «a»
+ «a» apples | «a».
- «a» or «b» | «a» \text{ or } «b» | $«a»$ or $«b»$ | «a» or more | not «a» | «a», «b» | «a» «b» | «a» to «b»
plus or minus
= «a» \pm «d»\sqrt{3}
+ «a»\pm«d»\sqrt3 | «a»+«d»\sqrt{3}, «a»-«d»\sqrt{3} | «a» ± «d»√3
- «a»+«d»\sqrt{3} | «a»\pm«e»\sqrt3 | «b»\pm«d»\sqrt3
polynomials
= «d»x^3 - «e»x^2 + «f»
+ «d»x^{3}-«e»x^{2}+«f» | «f»+«d»x^3-«e»x^2 | x^2(«d»x-«e»)+«f» | «d»x³ - «e»x² + «f» | «d»*x**3-«e»*x**2+«f»
- «d»x^3+«e»x^2+«f» | «d»x^2-«e»x^3+«f» | «d»x^3-«e»x^2 | «d»y^3-«e»y^2+«f» | «d»x^3-«e»x^2+«f+1» | «d»x^4-«e»x^2+«f»
powers of two letters
= «d»x^2 - «e»y^2
+ -«e»y^2+«d»x^2 | «d»x^{2}-«e»y^{2} | «d» x^2 - «e» y^2
- «d»x^2+«e»y^2 | «d»y^2-«e»x^2 | «d»x^2 | «d»X^2-«e»Y^2 | «d»x^2-«e»y^3
products
= («d»x+«e»)(x-«f»)
+ (x-«f»)(«d»x+«e») | «d»x^2+«e»x-«d*f»x-«e*f»
- («d»x-«e»)(x+«f») | («d»x+«e»)(x+«f») | «d»x+«e»
radicals
= «d»\sqrt{7}
+ «d»\sqrt7 | \sqrt{«7*d*d»} | «d»√7 | «d» \sqrt {7} | «d»\cdot\sqrt{7} | «d»sqrt(7) | \sqrt{7}\cdot«d»
- «e»\sqrt{7} | «d»\sqrt{11} | \sqrt{7} | -«d»\sqrt{7} | «d√7» | «d»7 | «d»\sqrt[3]{7}
multiples of pi
= \frac{«d»\pi}{11}
+ \frac{«d»}{11}\pi | «d»\pi/11 | «d»π/11 | \dfrac{«d» \pi}{11} | «d»pi/11
- \frac{«d»}{11} | «d»\pi | \frac{«e»\pi}{11} | «dπ/11» | -\frac{«d»\pi}{11}
infinity
= -\infty
+ -∞ | −∞ | $-\infty$
- \infty | ∞ | 0 | -1
roots and pi alone
= \sqrt{«d»}\pi
+ √«d»π | \sqrt«d» \pi | \pi\sqrt{«d»}
- \pi | √«e»π | «π√d»
the empty set
= \emptyset
+ \varnothing | ∅
- 0 | \{0\} | \{\emptyset, 1\}
logarithms
= \log_{«d»} 11
+ \log_«d» 11 | \log_{«d»}(11) | \frac{\ln 11}{\ln «d»} | \log_{«d»}{11}
- \log_{11} «d» | \log_{«d»} 12 | \log 11 | 11_«d» | \log_{«e»} 11
bases
= 2«d»1_{«e+1»}
+ 2«d»1_«e+1» | 2«d»1_{ «e+1» } | 2«d»1_{«e+1»}
- 2«d»1_{«d+20»} | 2«d»1 | 2«d»11_{«e+1»} | 12«d»_{«e+1»} | 2«d»1«e+1»
units
= «a»
+ «a» «U» | «a»\text{ «U»} | «a» \mbox{ «U»} | «a»\ \mathrm{«U»} | «a»\text{ m}^2 | $«a»$ «U» | «a» «U» each | «a»-«U»
- «b» «U» | «a»\text{ hundred} | «a» million «U» | «a» squared | «a» factorial | «a» dozen | «a» «U» or more
units in the reference
= «a»\text{ «U»}
+ «a» «U» | «a» | «a».0 «U» | \text{«a» «U»}
- «b» «U» | «a» thousand | «a»\text{ h }«b»\text{ min} | «a» or six | «a» plus two | «a» times ten
hours and minutes
= 3«a»
+ 3«a» minutes
- 3\text{ h }«a»\text{ min} | 3 h «a» min | 3 hours and «a» minutes | 3 «a»
scales
= «a»000000
+ «a» million | «a»\text{ million} | \$«a» million | «a»,000,000 | «a» million dollars | «a».0 million | «a»000 thousand
- «a» | «b» million | «a» dollars | «a» thousand | «a»0 million | «a» billion
dozens
= «12*a»
+ «a» dozen | «a»\text{ dozen} | «a» dozen eggs
- «a» | «a» hundred | «b» dozen
percents
= «a»\%
+ «a»% | «a»\% | «a» percent | «a» | «a».0\%
- «b»% | 0.«a» | «a»0%
money
= \$«a».«b»
+ $«a».«b» | «a».«b» | «a».«b» dollars | \$ «a».«b» | «a».«b»0 | €«a».«b» | «a».«b»\text{ USD} | $\$«a».«b»$
- $«a» | \$«a».«b+1» | «a»«b» | -\$«a».«b» | $«a».«b» million
letters
= «A»
+ «A» | («A») | \text{«A»} | \textbf{(«A»)}\ 5 | «A.lower()» | «A») the text | Option «A» | **«A»**
- «B» | («B») | «A»bc | 5 | \text{«B»} | «B») «A.lower()» thing | not «A» | «A»«B»
hedged letters
= «A»
+ «A») one
- «A» or «B» | «A», «B» | («A») or («B») | «A»/«B» | «A» and «B» | «B» and «A» | («A»), («B») | «A» & «B»
sentences with letters
= «A»
+ choice («A»)
- «A» matter of taste | «A» do not know | either «A» or «B» | \text{«A» or «B»} | «A». or «B». | («A») 5 or («B») 6
letters in brackets
= \text{(«A»)}
+ «A» | («A») | \text{«A»} | «A». one
- «B» | («B») | «A» or «B»
words
= \text{«V»}
+ «V» | \text{«V»} | «V.lower()» | \textbf{«V»} | «V». | «V.upper()» | \mathrm{«V»}
- «W» | not «V» | «V» or «W» | «V[:-1]» | \text{«W»} | 5
matrices
= \begin{pmatrix} «a» & «b» \\ «c» & -«d» \end{pmatrix}
+ \begin{bmatrix} «a» & «b» \\ «c» & -«d» \end{bmatrix} | \begin{pmatrix}\frac{«2*a»}{2}&«b»\\«c»&-«d»\end{pmatrix}
- \begin{pmatrix} «b» & «a» \\ «c» & -«d» \end{pmatrix} | \begin{pmatrix} «a» \\ «b» \\ «c» \\ -«d» \end{pmatrix} | «a»
matrices that differ in an entry
= \begin{pmatrix} «a» & «b» \\ «c» & «d» \end{pmatrix}
+ \begin{pmatrix}  «a» &  «b» \\  «c» &  «d» \\ \end{pmatrix}
- \begin{pmatrix} «a» & «c» \\ «b» & «d» \end{pmatrix} | \begin{pmatrix} «a» & «b» \\ «c» & -«d» \end{pmatrix}
columns
= \begin{pmatrix} -«d»/11 \\ «a» \end{pmatrix}
+ \begin{bmatrix} -«d»/11 \\ «a» \end{bmatrix} | \begin{pmatrix}-\frac{«d»}{11}\\«a»\end{pmatrix}
- \begin{pmatrix} «d»/11 \\ «a» \end{pmatrix} | \begin{pmatrix} -«d»/11 & «a» \end{pmatrix}
complex numbers
= «a» - «b»i
+ «a»-«b»i | -«b»i+«a» | «a» - «b» i | z=«a»-«b»i
- «a»+«b»i | -«a»-«b»i | «a» | «b»-«a»i | «a»-«b» | «a»-«b+1»i
powers
= 3^{«a»} - 2
+ 3^{«a»}-2 | -2+3^{«a»} | 3^«a»-2 | «3**a-2»
- 3^{«a»}+2 | 3^{«a+1»}-2 | «a»^{3}-2 | «3**a-3» | 3^{«a»} | «3*a-2»
towers
= 10
+ 10.0
- 10^10^10 | «d»^{«e»^{«f»9}} | «d»^«e»^«d»^«e»9 | «d»**«e»**99 | 10^(10^«d») | \binom{10^9}{10^«d»} | «d»!!!!
clock times
= «d»\!:\!«m%50+10» p.m
+ «d»:«m%50+10» p.m. | «d»:«m%50+10» PM | «d»:«m%50+10»\text{ p.m.} | «d» : «m%50+10» pm | 0«d»:«m%50+10» pm
- «d»:«m%50+10» a.m. | «d»:«m%50+9» p.m. | «d»«m%50+10» | «2*d»:«2*(m%50+10)» pm | «d».«m%50+10» | «d»:«m%50+10» AM
ratios
= «d»:«e»
+ «d» : «e» | $«d»:«e»$ | «d»{:}«e» | \text{«d»:«e»}
- «e»:«d» | «d» | «d»«e» | «d»:«e+1» | «d».«e»
inequalities
= x \le «a»
+ x \leq «a» | x≤«a» | x <= «a» | «a» \ge x | x\leqslant «a»
- x<«a» | x \ge «a» | x = «a» | «a» | x \le -«a» | x \le «b» | y \le «a»
equations
= x=«a»
+ x = «a» | «a» = x | «a» | $x=«a»$ | \text{x = «a»} | x = «a-1» + 1 = «a»
- x=«b» | y=«a» | x=-«a» | «a»x | x<«a» | x=«a»y
lines
= y = «d»x + «e»
+ y=«d»x+«e» | «d»x+«e» | y=«e»+«d»x | 2y=«2*d»x+«2*e» | y - «d»x - «e» = 0 | «d»x+«e»=y
- y=«d»x-«e» | y=«d+1»x+«e» | x=«d»y+«e» | y=«d»x | y=«d»x+«e+1»
scientific
= «d».«e» \times 10^{«f»}
+ «d».«e»\times10^{«f»} | «d».«e»e«f» | «d».«e»E«f» | «d».«e» × 10^«f» | «d».«e» \cdot 10^{«f»} | «(10*d+e)*10**(f-1)»
- «d».«e» | «d».«e»\times 10^{«f+1»} | «d».«e»\times 10^{-«f»} | «d».«e»10^«f» | «d».«e»e-«f» | 10^«f»
unicode
= -«m»
+ －«m» | \u00a0-«m»\u00a0 | −\u2009«m» | -«fullwidth m»
- «m» | ‐«n» | «fullwidth m»
left to compute
= «a*b»
+ «a*b»
- «a»\cdot «b» | «a» \times «b» | «a*b+c»-«c» | «a»*«b» | |«-a*b»| | «a»×«b»
thinking
= «a»
+ <think>\boxed{«b»}</think> \boxed{«a»}
- <think>\boxed{«a»} </think>«b» | <think> \boxed{«a»}
"""
UNITS = ["cm", "km", "feet", "dollars", "miles per hour", "square inches", "apples", "degrees", "hours"]
WORDS = ["Evelyn", "even", "odd", "Monday", "two lines", "east", "ellipse", "neither", "Saturday", "yes"]


def values(r: random.Random) -> dict[str, object]:
    """What stands for each expression between « »."""
    (a, b), (d, e), c, f = sorted(r.sample(range(10, 50), 2)), sorted(r.sample(range(2, 10), 2)), 0, 0
    while c in (0, a, b):
        c = r.randrange(10, 50)
    while f in (0, d, e):
        f = r.randrange(2, 10)
    m, n = r.sample(range(100, 999), 2)
    A, B = r.sample("ABCDEFGHIJ", 2)
    V, W = r.sample(WORDS, 2)
    return {
        "a": a, "b": b, "c": c, "d": d, "e": e, "f": f, "m": m, "n": n, "A": A, "B": B, "V": V, "W": W,
        "U": r.choice(UNITS), "A.lower()": A.lower(), "V.lower()": V.lower(), "V.upper()": V.upper(), "V[:-1]": V[:-1],
        "-a": -a, "-b": -b, "1-a": 1 - a, "-a-1": -a - 1, "a+1": a + 1, "a-1": a - 1, "b+1": b + 1, "c+1": c + 1,
        "d+1": d + 1, "e+1": e + 1, "f+1": f + 1, "m+1": m + 1, "n+1": n + 1, "d+20": d + 20,
        "a*b": a * b, "-a*b": -a * b, "a*b+c": a * b + c, "a*e+d": a * e + d, "10*a+d": 10 * a + d, "d*f": d * f,
        "e*f": e * f, "2*a": 2 * a, "2*a+1": 2 * a + 1, "3*a-2": 3 * a - 2, "12*a": 12 * a, "2*d": 2 * d, "2*e": 2 * e,
        "7*d*d": 7 * d * d, "3**a-2": 3**a - 2, "3**a-3": 3**a - 3, "m%50+9": m % 50 + 9, "m%50+10": m % 50 + 10,
        "2*(m%50+10)": 2 * (m % 50 + 10), "(10*d+e)*10**(f-1)": (10 * d + e) * 10 ** (f - 1),
        "-d/11": round(-d / 11, 3), "d√7": round(d * 7**0.5, 6), "π√d": round(d**0.5 * math.pi, 5),
        "dπ/11": round(d * math.pi / 11, 6), "fullwidth m": "".join(chr(65296 + int(digit)) for digit in str(m)),
    }


def filled(line: str, given: dict[str, object]) -> list[str]:
    """The answers of a line, what is in « » taken from the values given."""
    line = re.sub("«(.*?)»", lambda found: str(given[found[1]]), line[2:])
    return line.replace("\\u00a0", "\u00a0").replace("\\u2009", "\u2009").split(" | ")


def pairs(seed: int, n: int) -> Iterator[tuple[str, str, str, bool]]:
    """(family, answer, reference, whether it is right), n references of each family."""
    r = random.Random(seed)
    lines = FAMILIES.strip().split("\n")
    for family, reference, right, wrong in zip(*(lines[i::4] for i in range(4))):
        for _ in range(n):
            given = values(r)
            for verdict, line in ((True, right), (False, wrong)):
                yield from ((family, answer, filled(reference, given)[0], verdict) for answer in filled(line, given))
