"""Reading of config files and ``key=value`` words: trees of values, each with its source.

YAML means what version 1.2 of it means, so ``010`` is ten and ``12:30:45`` a text. Beyond that, ``1e4`` is
the whole number, and ``yes``, ``no``, ``on`` and ``off`` are booleans, as in the files of threestudio. Which
fields hold text is not known here; ``Leaf.text`` keeps what was written for those that do.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from omegaconf import OmegaConf

COMMAND_LINE = "the command line"
PROMPT = "system.prompt_processor.prompt"
"""The key that ``--prompt`` stands for."""
CORE = "tag:yaml.org,2002:"
MOST_BYTES, MOST_VALUES, MOST_FILES = 2**20, 10_000, 200
"""Bounds of a config file and of an override, of what a file's aliases come to, and of ``base`` files."""

READABLE = (
    "CUDA_VISIBLE_DEVICES", "DATA", "DATASETS", "FOURDFY_CACHE", "HF_HOME", "HOME", "HOSTNAME", "LOGNAME",
    "MODELS", "PROJECT", "PWD", "SCRATCH", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURM_TMPDIR", "TEMP",
    "TMP", "TMPDIR", "USER", "USERNAME", "WORK", "XDG_CACHE_HOME", "XDG_DATA_HOME",
)  # fmt: skip
"""The environment variables that a config file may read. Any other might hold a secret, which would end up in
``parsed.yaml`` and in logs, and a config may be somebody else's."""
ALLOW = "FOURDFY_ALLOW_ENV"
"""The environment variable with the names of others that files may read, separated by commas."""

PACKAGE = Path(__file__).parent
CONFIGS = next(folder / "configs" for folder in (PACKAGE, PACKAGE.parent) if (folder / "configs").is_dir())
"""The configs that ship: inside an installed package, beside it in a clone."""


class ConfigError(ValueError):
    """Something a user wrote in a config file or on the command line; the message says what to write."""


@dataclass(frozen=True)
class Leaf:
    """A value that is no mapping, as set by a source."""

    value: Any
    source: str
    text: str | None = None
    """What was written, if YAML does not read it as text; None if the value is the text, or null."""
    entries: tuple[str | None, ...] = ()
    """The texts of a list's entries."""


class Section(dict[str, Any]):
    """A mapping of names to sections and leaves."""

    def __init__(
        self, values: Mapping[str, Any] | None = None, source: str = "", text: str | None = None
    ) -> None:
        super().__init__(values or {})
        self.source, self.text = source, text

    def put(self, places: Sequence[str], value: Section | Leaf) -> None:
        """Set a value at a path of names; missing sections on the way are made."""
        node = self
        for place in places[:-1]:
            if not isinstance(node.get(place), Section):
                node[place] = Section(source=value.source)
            node = node[place]
        node[places[-1]] = value

    def over(self, below: Section) -> Section:
        """Both merged; if they differ, this one wins, unless its value is ``???``."""
        merged = Section(below, self.source, self.text)
        for name, value in self.items():
            old = below.get(name)
            if isinstance(old, Section) and isinstance(value, Section):
                merged[name] = value.over(old)
            elif old is None or plain(value) != "???":
                merged[name] = value
        return merged


def plain(tree: Any) -> Any:
    """The values of a section or leaf; anything else is returned unchanged."""
    if isinstance(tree, Section):
        return {name: plain(value) for name, value in tree.items()}
    return tree.value if isinstance(tree, Leaf) else tree


# ---------------------------------------------------------------------------------------------
# Files


def find_config(name: str | Path, folder: Path = Path()) -> Path:
    """The file of that name in ``folder``, else the one that ships; ``.yaml`` may be left out.

    If there is neither, the path in ``folder``, which ``read_layers`` then refuses.
    """
    found = (
        file
        for path in (folder / name, CONFIGS / name)
        for file in (path, Path(f"{path}.yaml"))
        if os.path.isfile(file)  # not Path.is_file, which raises if the name is too long
    )
    return next(found, folder / name)


def named_config(name: str, file: Path, key: str) -> Path:
    """The config that a config file names, beside it or shipped.

    Raises:
        ConfigError: it is no YAML file by its name: errors in it would show what somebody's file holds.
    """
    found = find_config(name, file.parent)
    if os.path.isfile(found) and found.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{file}: {key}: {name}: expected a config file, whose name ends in .yaml")
    return found


def read_layers(path: Path, chain: tuple[Path, ...] = ()) -> list[Section]:
    """The file's ``base`` files, left to right, each over its own, and then the file itself.

    Raises:
        ConfigError: a file is missing, is no YAML mapping, or is its own base; names file and line.
    """
    here = path.resolve()
    if here in chain:
        names = " -> ".join(file.name for file in (*chain[chain.index(here) :], here))
        raise ConfigError(f"{path}: its base files lead back to it: {names}")
    layer = read_yaml(_content(path, chain), str(path))
    layer = Section(source=str(path)) if plain(layer) is None else layer
    if not isinstance(layer, Section):
        raise ConfigError(f"{path}: expected a mapping at the top level, such as seed: 0")
    bases = plain(layer.pop("base", None)) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and _is_name(base) for base in bases):
        shown = repr(bases)[:200]
        raise ConfigError(f"{path}: base: expected the name of a file, or a list of them, got {shown}")
    layers = [layer]
    for base in bases:
        layers[-1:-1] = read_layers(named_config(base, path, "base"), (*chain, here))
        if len(layers) > MOST_FILES:
            raise ConfigError(f"{path}: base: leads to more than {MOST_FILES} files")
    return layers


def _is_name(text: str) -> bool:
    return text.isprintable() and len(text) < 256


def _content(path: Path, chain: tuple[Path, ...]) -> str:
    asked = f" (base of {chain[-1]})" if chain else ""
    if os.path.isdir(path):
        raise ConfigError(f"{path}{asked}: a folder; expected a config file")
    if not os.path.isfile(path):
        names = {file.stem: file.stem for file in CONFIGS.glob("*.yaml")}
        names |= {file.stem: str(file) for file in path.parent.glob("*.yaml") if file.resolve() not in chain}
        near = difflib.get_close_matches(path.stem, names)
        hint = f"; did you mean {' or '.join(names[stem] for stem in near)}?" if near else ""
        raise ConfigError(f"{path}{asked}: no such config file{hint}")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ConfigError(
            f"{path}{asked}: has {size:,} bytes; expected a config file, of {MOST_BYTES:,} at most"
        )
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; expected a YAML file") from error


def read_yaml(text: str, source: str) -> Section | Leaf:
    """A YAML document; an empty one is null.

    Raises:
        ConfigError: not YAML, or a key twice in a mapping; names ``source`` and the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return Leaf(None, source) if node is None else loader.tree(node, source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{source}:{line}: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}:{line}: not a text; expected a YAML file") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: an anchor (&) holds itself, or lists are nested too deeply") from error


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    values = 0
    """How many the document has, so far."""

    def number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value.lower().replace("_", "")
        if node.tag == f"{CORE}int":
            return int(text, 0 if re.match(r"[-+]?0[xo]", text) else 10)
        value = float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text))
        return int(value) if re.fullmatch(r"[-+]?\d+e\+?\d{1,2}", text) else value

    def tree(self, node: yaml.Node, source: str) -> Section | Leaf:
        self.values += 1
        if self.values > MOST_VALUES:
            problem = f"more than {MOST_VALUES:,} values, with those that aliases (*) repeat"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        if node.tag == f"{CORE}map" and isinstance(node, yaml.MappingNode):
            return self._section(node, source)
        if node.tag == f"{CORE}seq" and isinstance(node, yaml.SequenceNode):
            entries = [self.tree(entry, source) for entry in node.value]
            return Leaf([plain(e) for e in entries], source, entries=tuple(e.text for e in entries))
        is_other = node.tag not in (f"{CORE}str", f"{CORE}null")
        text = node.value if is_other and getattr(node, "style", "") is None else None
        try:
            return Leaf(self.construct_object(node, deep=True), source, text)
        except (ValueError, OverflowError, TypeError, AttributeError, LookupError) as error:
            problem = f"{str(node.value)[:40]!r} is no {node.tag.removeprefix(CORE)}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def _section(self, node: yaml.MappingNode, source: str) -> Section:
        own, merged = Section(), Section()
        lines: dict[str, int] = {}
        for key, value in node.value:
            problem = ""
            if key.tag == f"{CORE}merge":
                entries = value.value if isinstance(value, yaml.SequenceNode) else [value]
                if not all(isinstance(entry, yaml.MappingNode) for entry in entries):
                    problem = "expected a mapping or list of mappings for merging"
                for entry in () if problem else reversed(entries):
                    merged.update(self._section(entry, source))
            elif key.tag != f"{CORE}str" or not _is_name(key.value):
                got = str(key.value)[:100] if key.value else "null"
                problem = f"expected a word as the key, got {got if got.isprintable() else repr(got)}"
            elif key.value in lines:
                problem = f"the key {key.value!r} occurs here again, after line {lines[key.value]}"
            else:
                lines[key.value] = key.start_mark.line + 1
                own[key.value] = self.tree(value, source)
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return Section(merged | own, source)


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"(?i:yes|no|true|false|on|off)", list("yYnNtTfFoO")),
    ("int", r"[-+]?\d[\d_]*|[-+]?0o[0-7]+|[-+]?0x[\da-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.\d+|\d[\d_]*(\.[\d_]*)?)([eE][-+]?\d+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(CORE + _kind, re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{CORE}int", _Loader.number)
_Loader.add_constructor(f"{CORE}float", _Loader.number)


def save_yaml(values: Mapping[str, Any], path: Path) -> None:
    """Write resolved values so that ``read_layers`` reads the same again, even a ``${`` in a text."""
    OmegaConf.save(OmegaConf.create(escaped(dict(values))), path)


def escaped(value: Any) -> Any:
    """Plain values in which OmegaConf sees no interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, Mapping):
        return {key: escaped(entry) for key, entry in value.items()}
    return [escaped(entry) for entry in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------
# The command line


def split_overrides(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, text) of every ``key=text``.

    Raises:
        ConfigError: a word is none; says what to type.
    """
    for index, word in enumerate(words):
        key, equals, text = word.partition("=")
        if not equals or not key or word.startswith("-") or key != key.strip() or not _is_name(key):
            raise ConfigError(_what_to_type(list(words), index))
        if len(text) > MOST_BYTES:
            raise ConfigError(f"{key}: has {len(text):,} characters; expected {MOST_BYTES:,} at most")
        yield key, text


def _what_to_type(words: list[str], index: int) -> str:
    word, before, after = words[index], words[:index], words[index + 1 :]
    if word.startswith("-"):
        setting = word.lstrip("-") + ("" if "=" in word else "=...")
        return f"{word}: settings are written without dashes: {setting}"
    if "=" not in word and after and after[0].startswith("="):  # key = value, as several words
        word = " ".join((word, *after[: 1 + (after[0] == "=")]))
    key, equals, text = (part.strip() for part in word.partition("="))
    if equals and key:
        return f"{word}: write it without spaces: {key}={text}"
    if before:
        bare = " ".join(itertools.takewhile(lambda other: "=" not in other, words[index:]))
        key, _, text = before[-1].partition("=")
        value = f"{text} {bare}".strip()
        value = f'"{value}"' if " " in value else value
        return f"{bare or word!r} stands alone; if it belongs to the value before it, write {key}={value}"
    return f"{word!r}: expected key=value, e.g. trainer.max_steps=1000"


def literal_override(key: str, text: str) -> str:
    """The override that sets a field of text, or one of a path, to exactly ``text``."""
    return f"{key}={escaped(text)}"


def check_readable(name: str) -> None:
    """Refuse an environment variable that a config file may not read.

    Raises:
        ValueError: it is not in ``READABLE``; says how to allow it.
    """
    allowed = os.environ.get(ALLOW, "")
    if name not in (*READABLE, *allowed.replace(" ", "").split(",")):
        names = f"{allowed},{name}" if allowed else name
        raise ValueError(
            f"the environment variable {name} may hold a secret, so config files don't read it; if it does "
            f"not, allow it: export {ALLOW}={names}"
        )


def expand_path(path: str, is_typed: bool = True) -> str:
    """``path`` with ``~``, ``~user`` and ``$VAR`` replaced; ``$$`` is a dollar sign.

    Args:
        is_typed: whether the user typed it; one of a config file does not read every variable.

    Raises:
        ValueError: no such user, or a variable is not set or not to be read.
    """
    found = re.match(r"~[^/\\]*", path)
    home = found[0] if found else ""
    if home and os.path.expanduser(home) == home:
        raise ValueError(f"{path!r}: there is no home folder {home}; write ./{home} for a file of that name")

    def value(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        if not is_typed:
            check_readable(match[1])
        if match[1] not in os.environ:
            raise ValueError(f"{path!r}: ${match[1]} is not set; write $$ for a dollar sign")
        return os.environ[match[1]]

    return os.path.expanduser(home) + re.sub(r"\$(\$|\w+)", value, path.removeprefix(home))


def join(path: str, key: str) -> str:
    """The dotted key of ``key`` inside ``path``."""
    return f"{path}.{key}" if path and key else path or key
