"""Completions written to hang, blow up, deceive or escape, each with the reward it must get.

Data only; used by the tests of everything that reads, shows or stores model text.
"""

from __future__ import annotations

from typing import NamedTuple


class Hostile(NamedTuple):
    """One hostile completion: `reward` is what the strict math reward gives it against `reference`."""

    name: str
    text: str
    reference: str = "42"
    reward: float = 0.0


CANARY = "grpoforge_canary"
"""The file that the code below would create if anything ran it."""

POWER_BOMBS = (
    Hostile("power tower", "#### 9**9**9**9"),
    Hostile("LaTeX power tower", "The answer is $9^{9^{9^{9}}}$"),
    Hostile("boxed power tower", r"\boxed{9^{9^{9}}}"),
    Hostile("huge power of two", r"\boxed{2^{34359738368}}"),
    Hostile("huge negative power", r"\boxed{2^{-99999999999}}"),
    Hostile("power of a fraction", r"\boxed{(13/10)^{6472416997}}"),
    Hostile("factorial", "#### 10000000!", reference="10000000"),
    Hostile("iterated factorial", r"\boxed{((9!)!)!}"),
    Hostile("binomial", r"\boxed{\binom{1000000000}{500000000}}"),
    Hostile("exponential tower", r"\boxed{" + r"\exp(" * 12 + "10e" + ")" * 12 + "}"),
)

ALGEBRA_BOMBS = (
    Hostile("endless sum", r"\boxed{\sum_{i=1}^{10^{12}} i^3 \sin i}"),
    Hostile("endless product", r"\boxed{\prod_{i=1}^{10^8} i}"),
    Hostile("hard integral", r"\boxed{\int_0^\infty e^{-x^{x^x}} \sin x^x \, dx}"),
    Hostile("hard limit", r"\boxed{\lim_{x \to 0} x^{x^x}}"),
    Hostile("nested logarithms", r"\boxed{\log_{2^5}(\log_{2^4}(\log_{2^3}(\log_{2^2} 2)))}"),
    Hostile("symbolic determinant", r"\det\begin{pmatrix}" + r"a & b & c \\" * 9 + r"\end{pmatrix}"),
    Hostile("trigonometric sum", r"\boxed{" + "+".join(rf"\sin^{{{n}}}({n}x)" for n in range(24)) + "}"),
    Hostile("binomial expansion", r"\boxed{(a+b+c+d+e+f+g+h)^{40}}"),
    Hostile("large set", r"\boxed{\{" + ",".join(map(str, range(3000))) + r"\}}"),
    Hostile("union of intervals", r"\boxed{" + r"\cup".join(f"[{n},{n + 1})" for n in range(300)) + "}"),
    Hostile("chain of inequalities", r"\boxed{" + "<".join(f"x_{{{n}}}" for n in range(150)) + "}"),
    Hostile("large matrix", r"\boxed{\begin{pmatrix}" + ("1 & " * 59 + r"1 \\ ") * 60 + r"\end{pmatrix}}"),
)

DEPTH = (
    Hostile("nested parentheses", r"\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}"),
    Hostile("nested braces", r"\boxed{" + "{" * 5000 + "1" + "}" * 5000 + "}"),
    Hostile("nested fractions", r"\boxed{" + r"\frac{1}{" * 300 + "1" + "}" * 300 + "}"),
    Hostile("nested roots", r"\boxed{" + r"\sqrt{" * 500 + "2" + "}" * 500 + "}"),
    Hostile("continued fraction", r"\boxed{" + r"1+\cfrac{1}{" * 200 + "1" + "}" * 200 + "}"),
    Hostile("boxes never closed", r"\boxed{" * 2000),
    Hostile("nested text commands", r"\boxed{" + r"\text{" * 3000 + "42" + "}" * 3001),
)

LENGTH = (
    Hostile("100,000 digits", "#### " + "7" * 100_000),
    Hostile("5,000 digits boxed", r"\boxed{" + "7" * 5000 + "}"),
    Hostile("5,000 zeros", "#### 1" + "0" * 5000),
    Hostile("huge exponent", "#### 1e999999999"),
    Hostile("huge negative exponent", "#### 1e-999999999", reference="0"),
    Hostile("almost a third", "#### 0." + "3" * 20_000, reference="1/3"),
    Hostile("280 kB, wrong", "blah " * 56_000 + "\n#### 43"),
    Hostile("280 kB, right", "blah " * 56_000 + "\n#### 42", reward=1.0),
    Hostile("answer 280 kB ago", "#### 42\n" + "blah " * 56_000),
    Hostile("5,000 equal boxes", r"\boxed{42}" * 5000, reward=1.0),
    Hostile("5,000 equal marks", "#### 42\n" * 5000, reward=1.0),
)

BACKTRACKING = (
    Hostile("groups of one", "#### " + "1," * 20_000),
    Hostile("groups of three", "#### " + "111," * 20_000),
    Hostile("spaces", " " * 100_000),
    Hostile("number, then spaces", "#### 42" + " " * 100_000 + "43"),
    Hostile("dollars", "$" * 50_000),
    Hostile("backslashes", "\\" * 50_000),
    Hostile("stars", "*" * 50_000),
    Hostile("hashes", "#" * 50_000),
    Hostile("open annotations", "<<" * 50_000),
    Hostile("phrases", "final answer is: " * 5000),
    Hostile("open thoughts", "<think>" * 20_000),
    Hostile("closed thoughts", "</think>" * 20_000),
    Hostile("answer tags", "<answer>" * 20_000),
)

CODE = (
    Hostile("system call", f"#### __import__('os').system('touch {CANARY}')"),
    Hostile("boxed system call", rf"\boxed{{__import__('os').system('touch {CANARY}')}}"),
    Hostile("subclasses", "The answer is ().__class__.__bases__[0].__subclasses__()[42]"),
    Hostile("globals", "#### (lambda: 42).__globals__"),
    Hostile("format string", f"#### {{open('{CANARY}', 'w')}} f'{{open(\"/etc/passwd\").read()}}'"),
    Hostile("arithmetic", "#### 40+2"),
    Hostile("call", "#### int('42')"),
)

CHARACTERS = (
    Hostile("NUL in a box", "\\boxed{4\x002}"),
    Hostile("right-to-left override", "#### \u202e24\u202c"),
    Hostile("full-width digits", "#### \uff14\uff12", reward=1.0),
    Hostile("Arabic-Indic digits", "#### ٤٢"),
    Hostile("superscript", "#### 4²", reference="4"),
    Hostile("zero-width space", "#### 4\u200b2"),
    Hostile("lone surrogate", "#### 4\ud8002"),
    Hostile("combining marks", "#### 42" + "\u0301" * 5000),
    Hostile("clear screen and title", "\x1b[2J\x1b]0;owned\x07#### 43"),
    Hostile("escape in the number", "#### 4\x1b[31m2"),
    Hostile("8-bit control sequence", "\x9b2J#### 43"),
    Hostile("carriage return", "#### 43\r#### 42"),
    Hostile("script", "<script>alert(42)</script>"),
    Hostile("markdown beacon", "![42](javascript:alert(42))"),
)

DEGENERATE = (
    Hostile("empty", ""),
    Hostile("white space", " \n\t "),
    Hostile("nan", "#### nan"),
    Hostile("infinity", r"\boxed{\infty}"),
    Hostile("division by zero", r"\boxed{\frac{1}{0}}"),
    Hostile("zero to the zero", r"\boxed{0^0}", reference="1"),
    Hostile("recursive macro", r"\def\a{\a\a}\boxed{\a}"),
    Hostile("file inclusion", r"\boxed{\input{/etc/passwd}}"),
    Hostile("mark without a number", "####"),
)

REWARD_HACKING = (
    Hostile("several boxes", r"\boxed{1}\boxed{2}\boxed{3}\boxed{42}"),
    Hostile("list in a box", r"\boxed{1,2,3,42}"),
    Hostile("boxes in a mark", r"#### \boxed{4}\boxed{2}"),
    Hostile("percent for a ratio", r"\boxed{400\%}", reference="4"),
    Hostile("only a thought", "<think>#### 42</think>"),
    Hostile("thought never closed", "<think>\n#### 42"),
    Hostile("only an annotation", "#### <<42>>"),
    Hostile("prompt copied", "Tom has 42 apples. How many apples does Tom have?"),
    Hostile("two marks", "#### 42 #### 43"),
    Hostile("two marks, right last", "#### 43\n#### 42"),
    Hostile("nearly", "#### 42.0000000001"),
    Hostile("either", "#### 42 or 43"),
    Hostile("range", "#### 41-43"),
    Hostile("digits apart", "#### 4 2"),
    Hostile("sign as minus", "#### \u221242", reference="-42", reward=1.0),
    Hostile("sign dropped", "#### 42", reference="-42"),
    Hostile("grouping", "#### 1,000", reference="1000", reward=1.0),
    Hostile("wrong grouping", "#### 10,00", reference="1000"),
    Hostile("currency", "#### $42", reward=1.0),
    Hostile("unit", "#### 42 dollars", reward=1.0),
    Hostile("scientific", "#### 4.2e1", reward=1.0),
    Hostile("hexadecimal", "#### 0x2a"),
    Hostile("words", "#### forty-two"),
    Hostile("Chinese numerals", "#### 四十二"),
)

HOSTILE: tuple[Hostile, ...] = (
    *POWER_BOMBS,
    *ALGEBRA_BOMBS,
    *DEPTH,
    *LENGTH,
    *BACKTRACKING,
    *CODE,
    *CHARACTERS,
    *DEGENERATE,
    *REWARD_HACKING,
)
