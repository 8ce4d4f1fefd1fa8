# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Help for the command line, out of the configurations' opening comments and the tables of docs/configuration.md."""

from __future__ import annotations

import ast
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.core.flags import is_read
from scripts.core.options import range_in_words
from scripts.core.paths import ROOT
from scripts.core.verbs import (
    BASE,
    OF_OVERLAYS,
    SAMPLE,
    STARTS,
    additions,
    condition_entries,
    condition_flags,
    load_config,
    merge,
    used_ids,
    verbs,
)

OPTIONS = ROOT / "docs" / "configuration.md"
INDENT, TEXT = 2, 26
UNBROKEN: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
COMMAND = re.compile(r"\s{2,}((?:python|torchrun|make) .*)")
ENTRY = re.compile(r"(--[\w:]+(?:,\s+(?:--[\w:]+|\.\.\.))*(?: \S+(?=\s{2,}))?)\s*(.*)", re.DOTALL)
POINTER = re.compile(r"see (\w+)\.yaml")
MONAI_COMMAND = re.compile(r"-m monai\.bundle run(.*?) --config_file (?:\"(\[.*?\])\"|([^\s\[]\S*))")
STATED_DEFAULT = re.compile(r" \(default:? [^();,]*\)")
RENAMED_TOOLS = {"released_weights": "weights"}
SENTENCE = re.compile(r"(.*?)(?:\.(?=\s)|[.:]?$)", re.DOTALL)
MAPS = {"sampler": "samplers", "family": "families"}
"""Option -> the map of the configuration that it names an entry of."""
USAGE = "usage: python -m scripts {verb} [--with NAME ...] [--OPTION VALUE ...] [--print]"
OF_THE_COMMAND = {
    "--with NAME ...": "more configurations, in this order: names from above, or YAML and JSON files of your own",
    "--print": "print the equal command of MONAI instead of running it",
    "--help": "this; with --with NAME, the defaults that hold then",
}
FOOT = (
    "Any other id of the configuration is an option too, nested ones with ::, such as --network_def::num_res_blocks 1. "
    'Numbers may be written 1e-4, lists "[64,64,64]". Paths that stand as defaults are within --bundle_root, which is '
    "the bundle's folder wherever the command runs. More: docs/configuration.md"
)


@dataclass(frozen=True)
class Option:
    """One entry of a help text: flags as they are written, their names, what they are for, and the default in words."""

    head: str
    text: str
    default: str = ""

    @property
    def names(self) -> list[str]:
        """Names of the flags in its head."""
        return re.findall(r"--(\w+)", self.head)

    @property
    def described(self) -> list[str]:
        """Names of the flags that it says something of, in its text as well; none if it only points elsewhere."""
        return [] if POINTER.match(self.text) else self.names + re.findall(r"--(\w+)(?= [\w(])", self.text)


def list_verbs(width: int | None = None) -> str:
    """All verbs, programs and overlays, a line each."""
    sections = {
        "Verbs": {verb: first_sentence(opening(files[-1])) for verb, files in verbs().items()},
        "--with": {name: first_sentence(opening(path)) for name, path in additions().items()},
        "Tools": {
            **tools(),
            "completion": "`completion bash` or `completion zsh` prints a script that completes these",
        },
    }
    lines = [USAGE.format(verb="VERB"), "       python -m scripts VERB --help"]
    for title, entries in sections.items():
        lines += ["", f"{title}:", *(line for one, text in entries.items() for line in _row(one, text, width))]
    return "\n".join(lines) + "\n"


def describe_verb(verb: str, files: Sequence[Path], width: int | None = None) -> str:
    """The help of a verb with its overlays: opening comments, options with the defaults that hold, `--with`."""
    config = merge(files)
    used = used_ids(config)
    parts = list(_comment(verbs()[verb][-1], verb))
    added = [part for path in files[len(verbs()[verb]) :] for part in _comment(path, verb) if isinstance(part, Option)]
    described = {name for part in (*parts, *added) if isinstance(part, Option) for name in part.described}
    sections: dict[str, list[Option]] = {"Options of what --with adds": [one for one in added if one not in parts]}
    for title, options in option_tables().items():
        rows = [as_configured(option, config) for option in options]
        rows = [replace(one, head=_head([name for name in one.names if name in used - described])) for one in rows]
        sections[title] = [row for row in rows if row.head]
    lines = [USAGE.format(verb=verb), *_show_comment(parts, config, width)]
    for title, options in sections.items():
        lines += ["", f"{title}:"] if options else []
        lines += [line for option in options for line in _row(option.head, _with_default(option, config), width)]
    fitting = {name: path for name, path in additions().items() if changes_something(path, verb)}
    lines += ["", "--with:", *(line for name, path in fitting.items() for line in _row(name, _first(path), width))]
    lines += ["", *(line for head, text in OF_THE_COMMAND.items() for line in _row(head, text, width))]
    return "\n".join([*lines, "", *_wrap(FOOT, width)]) + "\n"


def option_names(verb: str) -> list[str]:
    """The options of a verb by name: what it uses and that is a plain value, or that a table describes."""
    config = merge(verbs()[verb])
    used = {name for name in used_ids(config) - set(STARTS) - OF_OVERLAYS if "::" not in name}
    listed = documented_options([])
    return sorted(name for name in used if name in listed or not isinstance(config.get(name), (dict, list)))


def documented_options(files: Sequence[Path]) -> set[str]:
    """The options that the tables, or the opening comments of configurations, say something of."""
    parts = [part for path in files for part in parse_comment(opening(path)) if isinstance(part, Option)]
    return {name for options in (parts, *option_tables().values()) for option in options for name in option.names}


def _comment(path: Path, verb: str) -> Iterator[str | Option | tuple[str]]:
    """The parts of an opening comment, with what other comments say of the options that it points to them for."""
    for part in parse_comment(shorten_commands(opening(path), verb)):
        pointer = POINTER.match(part.text) if isinstance(part, Option) else None
        if pointer and isinstance(part, Option):
            other = [
                one for one in parse_comment(opening(path.with_name(f"{pointer[1]}.yaml"))) if isinstance(one, Option)
            ]
            found = {name: one for one in other for name in one.described}
            yield from dict.fromkeys(found[name] for name in part.names if name in found)
            part = Option(_head([name for name in part.names if name not in found]), part.text)
        if not isinstance(part, Option) or (part.names and part.text):  # named alone: the tables say what it is
            yield part


def changes_something(path: Path, verb: str) -> bool:
    """Whether an overlay without a `run` sets anything that a verb comes to."""
    used = used_ids(merge([*verbs()[verb], path]))
    return any(is_read(key.lstrip("+").split("::")[0], used) for key in load_config(path))


def opening(path: Path) -> str:
    """The comment that a configuration opens with; for the base, which is JSON, what docs/configuration.md says."""
    if path == BASE:
        section = OPTIONS.read_text(encoding="utf-8").split("\n## Sampling\n")[1]
        return re.sub(
            r"```\n(.*?)```\n", lambda m: textwrap.indent(m[1], "  "), section.split("\n|")[0], flags=re.DOTALL
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = lines[: next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return "\n".join(re.sub("^# ?", "", line) for line in comment)


def first_sentence(text: str) -> str:
    """The first sentence of a text, in one line."""
    found = SENTENCE.match(" ".join(text.split("\n\n")[0].split()))
    return found[1] if found else ""


def _first(path: Path) -> str:
    return first_sentence(opening(path))


def shorten_commands(text: str, verb: str) -> str:
    """A text with `python -m scripts VERB` in place of MONAI's commands, each in one line."""

    def short(found: re.Match[str]) -> str:
        stems = [Path(one).stem for one in (ast.literal_eval(found[2]) if found[2] else [found[3]])]
        own = {files[-1].stem: name for name, files in verbs().items() if name != SAMPLE}
        named = next((own[stem] for stem in stems if stem in own), SAMPLE)
        added = [stem for stem in stems if stem in additions()]
        return f"-m scripts {named}{' --with ' if added else ''}{' '.join(added)}{found[1]}"

    joined = MONAI_COMMAND.sub(short, re.sub(r" *\\\n\s*", " ", text))
    return joined.replace("-m monai.bundle run", f"-m scripts {verb}")


def parse_comment(text: str) -> Iterator[str | Option | tuple[str]]:
    """The parts of an opening comment in their order: prose, options, and commands as tuples of one."""
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        block: list[str] = []
        for line in paragraph.split("\n"):
            begins = block and _indent(line) <= _indent(block[0]) and (_is_entry(line) or _is_entry(block[0]))
            if COMMAND.fullmatch(line) or (begins and not block[-1].endswith(",")):
                yield from _part(block)
                block = []
            if found := COMMAND.fullmatch(line):
                yield (found[1],)
            else:
                block.append(line)
        yield from _part(block)


def _is_entry(line: str) -> bool:
    return bool(re.match(r"\s+--\w|--\w.*\S\s{2,}\S", line))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _part(block: Sequence[str]) -> Iterator[str | Option]:
    if block and _is_entry(block[0]) and (found := ENTRY.fullmatch("\n".join(line.strip() for line in block))):
        yield Option(" ".join(found[1].split()), " ".join(found[2].split()))
    elif block:
        yield " ".join(" ".join(block).split())


def option_tables() -> dict[str, list[Option]]:
    """Heading -> options, of all tables of docs/configuration.md with the columns `option` and `default`."""
    tables: dict[str, list[Option]] = {}
    title, header = "", list[str]()
    for line in OPTIONS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        title = line.lstrip("# ") if line.startswith("#") else title
        if not cells:
            header = []
        elif not header:
            header = [cell.lower() for cell in cells]
        elif {"option", "default"} <= set(header) and cells[header.index("option")].startswith("`--"):
            text = next(cell for name, cell in zip(header, cells) if name not in ("option", "default"))
            head, default = (cells[header.index(name)].replace("`", "") for name in ("option", "default"))
            tables.setdefault(title, []).append(Option(head, re.sub(r"\[.*?\]\((.*?)\)", r"docs/\1", text), default))
    return tables


def as_configured(option: Option, config: Mapping[str, Any]) -> Option:
    """A table's row, which knows the base, for a configuration that may have more conditions, samplers or families.

    The row of the normalised conditions names those there are, and that of the raw ones their ranges as well; that of
    the number of steps has the defaults of all samplers; the row of an option that names an entry of a map has the
    entries, where it does not say of each what it is.
    """
    flags, entries = condition_flags(config), condition_entries(config)
    of_base = condition_flags(merge([BASE]))
    if set(option.names) & set(of_base[::2]):
        own = [f"{entry['default']} of --{name}" for name, entry in entries.items() if "default" in entry]
        return Option(_head(flags[::2]), option.text, ", ".join([option.default, *own]))
    if set(option.names) & set(of_base[1::2]):
        ranges = [f"--{raw} {said}" for raw, entry in zip(flags[1::2], entries.values()) if (said := _range(entry))]
        return Option(_head(flags[1::2]), f"{option.text}: {', '.join(ranges)}", option.default)
    if "num_inference_steps" in option.names:
        others = {name: entry for name, entry in config.get("samplers", {}).items() if name not in option.text}
        lengths = [f"{name} {entry.get(option.names[0], '')}".strip() for name, entry in others.items()]
        return replace(option, default=", ".join([option.default, *lengths]))
    names = [name for one in option.names if one in MAPS for name in config.get(MAPS[one], ())]
    if set(names) <= set(re.findall(r"`(\w+)`", option.text)):
        return option
    return replace(option, text=f"{option.text} (one of: {', '.join(names)})")


def _head(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _range(entry: Mapping[str, Any]) -> str:
    """A condition's raw values in words: its codes, or its range; empty where expressions say it."""
    if entry.get("codes"):
        return " or ".join(entry["codes"])
    least, most = entry.get("minimum"), entry.get("maximum")
    if not isinstance(least, (int, float)) or not isinstance(most, (int, float)):
        return ""
    return range_in_words(least, most, entry.get("unit", ""))


def default_in_words(config: Mapping[str, Any], name: str) -> str | None:
    """The default of an option as a reader would write it; None where the configuration has none that is plain."""
    value = config.get(name)
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (int, float)):
        return f"{value:g}"
    if isinstance(value, list):
        return json.dumps(value, separators=(",", ":")) if value and not re.search("[@$%]", str(value)) else None
    if not isinstance(value, str):
        return None
    if found := re.fullmatch(r"\$@(\w+) \+ '/([^']*)'", value):
        within = {"bundle_root": found[2], "shipped": f"models/{found[2]} of the bundle"}
        return within.get(found[1], f"{found[2]} in --{found[1]}")
    if found := re.fullmatch(r"@(\w+)", value):
        return f"as --{found[1]}"
    if re.match("[@$%]", value):
        return None
    return value if value != "default" else f"'{value}'"


def _show_comment(
    parts: Sequence[str | Option | tuple[str]], config: Mapping[str, Any], width: int | None
) -> list[str]:
    """Prose in paragraphs, commands indented, options in two columns."""
    lines: list[str] = []
    for before, part in zip([None, *parts], parts):
        lines += [""] if isinstance(part, str) or type(part) is not type(before) else []
        if isinstance(part, Option):
            lines += _row(part.head, _with_default(part, config), width)
        else:
            lines += _wrap(part, width) if isinstance(part, str) else _show_command(part[0], width)
    return lines


def _show_command(command: str, width: int | None) -> list[str]:
    """A command in lines that a shell takes as one, broken before options."""
    words = command.replace(" --", "\n--").replace(" ", "\0").split("\n")
    lines = textwrap.wrap(" ".join(words), _columns(width) - 4, subsequent_indent="    ", **UNBROKEN)
    return [f"  {line}".replace("\0", " ") for line in " \\\n".join(lines).split("\n")]


def _wrap(text: str, width: int | None) -> list[str]:
    return textwrap.wrap(text, _columns(width), **UNBROKEN)


def _with_default(option: Option, config: Mapping[str, Any]) -> str:
    found = [default_in_words(config, name) for name in option.names]
    known = list(dict.fromkeys(one for one in found if one is not None)) if None not in found else []
    if option.default:
        return f"{option.text} (default {', '.join(known) or option.default})"
    if len(known) != 1 or len(found) != 1:
        return option.text
    stated = STATED_DEFAULT.search(option.text)
    if stated:
        return option.text.replace(stated[0], f" (default {known[0]})")
    return option.text if "default" in option.text else f"{option.text} (default {known[0]})"


def _row(head: str, text: str, width: int | None) -> list[str]:
    indent = " " * TEXT
    lines = textwrap.wrap(text, _columns(width), initial_indent=indent, subsequent_indent=indent, **UNBROKEN) or [""]
    if len(head) + INDENT + 2 > TEXT:
        return [" " * INDENT + head, *lines]
    return [f"{' ' * INDENT}{head}".ljust(TEXT) + lines[0].strip(), *lines[1:]]


def _columns(width: int | None) -> int:
    return max(60, min(width or shutil.get_terminal_size((100, 24)).columns, 120))


def tools() -> dict[str, str]:
    """Name -> first line, of the programs in this package that are no configuration: `python -m scripts NAME`."""
    return {tool_name(module): said for module, said in programs().items()}


def tool_name(module: str) -> str:
    """How a program is called on the command line."""
    last = module.rpartition(".")[2]
    return RENAMED_TOOLS.get(last, last)


def programs() -> dict[str, str]:
    """Module -> first sentence, of these programs: `python -m scripts.MODULE`."""
    found = {}
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        said = re.search(
            r"^\"\"\"(?:`python -m (?:scripts\.)([\w.]+)[^`]*`: )(.*?)(?:\n\s*\n|\"\"\")", text, re.M | re.S
        )
        if said:
            found[said[1]] = first_sentence(said[2])
    return found
