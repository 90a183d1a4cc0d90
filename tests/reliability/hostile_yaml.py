"""Config files: bombs, tags, circles, deep nesting, broken bytes, and shipped files with changes."""

from __future__ import annotations

from pathlib import Path
from random import Random

from fourdfy.launching.experiment import load_experiment
from tests.commands import CONFIGS
from tests.reliability.fuzzing import PLANTED, Case

PROMPT = "system.prompt_processor.prompt=a red cube"
SHIPPED = [file.read_text() for file in sorted(CONFIGS.glob("**/*.yaml"))]
TAGS = (
    "!!python/object/apply:os.system", "!!python/name:os.system", "!!python/object/new:os.system", "!own",
    "!!python/module:os", "!<tag:yaml.org,2002:python/tuple>", "!!int", "!!float", "!!binary", "!!timestamp",
    "!!set", "!!omap", "!!pairs", "!!null", "!!bool", "!!map", "!!seq", "!!str",
)  # fmt: skip
SCALARS = (
    "x", "[touch FILE]", "{a: 1}", "9999-99-99", "2001-01-01T99:99:99", "@@@", ".nan", "-.inf", "1e999", "~",
    "0x" + "f" * 5000, "9" * 5000, "''", "[[]]", "'\\ud800'", '"\\ud800"', '"\\u001b[31m"', "- a", "? a",
    "<<", "&a *a", "1" * 300, "!!int 1_0", "0o9", "%", "`", "|\n  a", ">\n  b",
)  # fmt: skip
BROKEN = (*"&*!|>%@`{}[]:,#\t\0\n", *map(chr, (0x1B, 0x7F, 0x85, 0x2028, 0xD800, 0xFEFF, 0x1F600)))


def draw(random: Random, place: Path) -> Case:
    kinds = [_bomb, _merge_bomb, _tag, _nested, _bytes, _base, _circle, *[_changed] * 4, *[_replaced] * 3]
    kind, file = random.choice(kinds), place / "config.yaml"
    content = kind(random, place)
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return Case(f"{kind.__name__} {content[:60]!r}", lambda: load_experiment([file], [PROMPT]).values)


def _bomb(random: Random, place: Path) -> str:
    """A billion laughs: each list holds the one before some times."""
    fan, depth = random.randint(2, 12), random.randint(5, 40)
    lines = [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * fan)}]" for k in range(1, depth)]
    return "\n".join(("a0: &a0 [x]", *lines))


def _merge_bomb(random: Random, place: Path) -> str:
    fan, depth = random.randint(2, 12), random.randint(5, 40)
    lines = [f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * fan)}], y{k}: 1}}" for k in range(1, depth)]
    return "\n".join(("a0: &a0 {x: 1}", *lines))


def _tag(random: Random, place: Path) -> str:
    value = random.choice(SCALARS).replace("FILE", str(place / PLANTED))
    return f"{random.choice(['seed', 'tag', 'system', 'data', 'x', 'base'])}: {random.choice(TAGS)} {value}"


def _nested(random: Random, place: Path) -> str:
    opening = random.choice(["[", "{a: ", "- ", "? ", "[{a: [", "&a [", "!!seq ["])
    return random.choice(["", "tag: ", "system: "]) + opening * random.choice([50, 900, 1100, 5000, 50_000])


def _bytes(random: Random, place: Path) -> bytes:
    content = random.randbytes(random.choice([1, 10, 1000]))
    return random.choice([content, b"tag: " + content, b"\xff\xfe" + content, "seed: 1".encode("utf-16")])


def _base(random: Random, place: Path) -> str:
    """Files that each name the next one some times, and names of no file."""
    fan, depth = random.randint(1, 30), random.randint(1, 9)
    for k in range(depth):
        bases = ", ".join([f"b{k + 1}.yaml"] * fan) if k + 1 < depth else "base/shapes.yaml"
        (place / f"b{k}.yaml").write_text(f"base: [{bases}]")
    odd = ["../../../etc/passwd", "/dev/zero", "/dev/stdin", ".", "config.yaml", "a\0b", "x" * 5000, "~"]
    return f"base: [{random.choice(['b0.yaml'] * 8 + odd)!r}]"


def _circle(random: Random, place: Path) -> str:
    circles = ["a: &a [*a]", "system: &a {x: *a}", "&a {a: *a}", "tag: &a\n  <<: *a", "&a : *a"]
    return random.choice(circles)


def _changed(random: Random, place: Path) -> str:
    """A shipped file with some characters replaced, removed or repeated."""
    text = random.choice(SHIPPED)
    for _ in range(random.randint(1, 4)):
        at, size = random.randrange(len(text) + 1), random.choice([1, 1, 5, 200])
        repeated = text[at : at + size] * random.choice([2, 500])
        text = text[:at] + random.choice(["", repeated, random.choice(BROKEN)]) + text[at + size :]
    return text


def _replaced(random: Random, place: Path) -> str:
    """A shipped file with one value replaced."""
    lines = random.choice([text for text in SHIPPED if ":" in text]).split("\n")
    number = random.choice([k for k, line in enumerate(lines) if ":" in line])
    lines[number] = f"{lines[number].partition(':')[0]}: {random.choice(SCALARS)}"
    return "\n".join(lines)
