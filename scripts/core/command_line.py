# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts VERB`: the short form of `python -m monai.bundle run` with its lists of configurations."""

from __future__ import annotations

import itertools
import runpy
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.core.command_help import (
    changes_something,
    describe_verb,
    documented_options,
    list_verbs,
    option_names,
    programs,
    tool_name,
    tools,
)
from scripts.core.errors import BundleError
from scripts.core.flags import FLAG, near_matches, read_flags, refuse_flags, with_args_file
from scripts.core.paths import CONFIGS, INSTALLED, ROOT, as_called
from scripts.core.verbs import BASE, SAMPLE, additions, merge, verbs

COMPLETION = """\
_brain_images() {
    [ "${COMP_WORDS[1]} ${COMP_WORDS[2]}" = "-m scripts" ] || return
    COMPREPLY=($("${COMP_WORDS[0]}" -m scripts completion words "${COMP_WORDS[@]:3:$((COMP_CWORD - 2))}" 2>/dev/null))
}
complete -o default -F _brain_images python python3
"""
WITH_WHAT = "--with what? Give the name of an overlay, or a .yaml or .json file of your own"
TRACKERS = ("mlflow",)
FILES_FOR_MONAI = ("args_file", "meta_file", "logging_file")
OF_PATHS = ("_dir", "_path", "_table", "_file", "_root")
"""How names of flags end that take a path."""
SHELLS = {"bash": COMPLETION, "zsh": "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n" + COMPLETION}


class UsageError(BundleError):
    """A command that cannot be understood: the exit code is 2."""


@dataclass
class Request:
    """What a command line asks for: a verb, the files that make it, and the flags that go on to MONAI."""

    verb: str
    files: list[Path] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    printed: bool = False

    def arguments(self) -> list[str]:
        """Those of `python -m monai.bundle run`."""
        files = [_from_here(path) for path in self.files]
        elsewhere = not INSTALLED and Path.cwd() != ROOT and "bundle_root" not in read_flags(self.flags)
        return [
            "--config_file",
            f"[{','.join(map(repr, files))}]",
            *(["--bundle_root", str(ROOT)] * elsewhere),
            *self.flags,
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code: 2 where it is not understood."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(given: list[str]) -> int:
    words = list(itertools.takewhile(lambda word: not FLAG.fullmatch(word), given))
    asks_help = not {"--help", "-h"}.isdisjoint(given)
    if not words or (asks_help and len(words) == 1 and _verbs_of(words[0])):
        if given and not asks_help:
            raise UsageError(f"a verb comes before {given[0]}: `python -m scripts` lists them")
        print(as_called(list_verbs()), end="")
    elif words[0] in tools():
        _run_tool(words[0], given[1:])
    elif words[0] == "completion":
        print(_completion(given[1:]), end="")
    else:
        verb, rest = _split_verb(words, given)
        request = read_request(verb, [word for word in rest if word not in ("--help", "-h")])
        if asks_help:
            print(as_called(describe_verb(verb, request.files)), end="")
            return 0
        _check(request)
        _start(request)
    return 0


def _verbs_of(word: str) -> list[str]:
    """The verbs of two words that begin with a word."""
    return [verb for verb in verbs() if verb.startswith(f"{word} ")]


def _split_verb(words: Sequence[str], given: Sequence[str]) -> tuple[str, list[str]]:
    """The verb that a command line begins with, in either spelling, and what follows it."""
    names = {verb.replace(" ", "_"): verb for verb in verbs()}
    for count in range(len(words), 0, -1):
        if verb := names.get("_".join(words[:count]).replace("-", "_")):
            return verb, list(given[count:])
    known = [*verbs(), *tools(), "completion"]
    begun = _verbs_of(words[0])
    if begun and len(words) == 1:
        raise UsageError(f"{words[0]} what? There are `{'`, `'.join(begun)}`")
    hint = near_matches(" ".join(words[:2]), begun or known) or near_matches(words[0], known)
    if words[0] in additions():
        hint = f": it is an overlay, for --with {words[0]}"
    raise UsageError(
        f"there is no verb '{' '.join(words[: 2 if begun else 1])}'{hint or ': `python -m scripts` lists them'}"
    )


def read_request(verb: str, rest: Sequence[str]) -> Request:
    """A command line behind its verb, understood.

    Raises:
        UsageError: for a word that belongs to no option, or a `--with` of what is not there.
    """
    request = Request(verb, list(verbs()[verb]))
    name, takes = "", False
    for word in [*rest, "--end"]:
        if found := FLAG.fullmatch(word):
            if name == "with" and takes:
                raise UsageError(WITH_WHAT)
            name, takes = found[1], found[2] is None and found[1] != "print"
        if name == "with" and (not found or found[2] is not None):
            for one in (found[2] if found else word).split(","):
                request.files.append(_added(one, request))
            takes = False
        elif found:
            request.printed |= name == "print"
            request.flags += [word] if name not in ("with", "print", "end") else []
        elif takes:
            if word in ("-", "--"):
                raise UsageError(f"--{name} {word}: a lone {word} is no value")
            request.flags.append(word)
            takes = False
        else:
            hint = f"--with {word} adds it" if word in additions() else f"write --OPTION {word}"
            raise UsageError(f"'{word}' belongs to no option: {hint}")
    return request


def _added(name: str, request: Request) -> Path:
    """The file that `--with NAME` adds to what a request has so far."""
    if not name.strip():
        raise UsageError(WITH_WHAT)
    known = additions()
    path = known.get(name.removesuffix(".yaml"), Path(name))
    named = {one.replace(" ", "_"): one for one in verbs()}
    verb = named.get(name.replace(" ", "_"))
    if verb is None and path.resolve().parent == CONFIGS and path.is_file():
        verb = named.get(path.stem) or (SAMPLE if path.resolve() == BASE else None)
    if verb:
        raise UsageError(f"--with {name}: that is a verb of its own, `python -m scripts {verb}`")
    if path.is_file() and path.suffix in (".json", ".yaml", ".yml"):
        if path.resolve() in [one.resolve() for one in request.files]:
            raise UsageError(f"--with {name} is given twice")
        return path
    hint = (
        near_matches(path.stem, known) or f": there are {', '.join(known)}, or give a .yaml or .json file of your own"
    )
    if path.exists():
        raise UsageError(f"--with {name}: that is no .yaml or .json file")
    raise UsageError(f"--with {name}: there is no such configuration{hint}")


def _check(request: Request) -> None:
    """Refuse overlays and flags that change nothing in this verb, and flags that there are not."""
    for name, path in additions().items():
        if path in request.files and not changes_something(path, request.verb):
            raise UsageError(f"--with {name} has no effect on `{request.verb}`")
    flags = read_flags(request.flags)
    if "config_file" in flags:
        raise UsageError("--config_file would take the place of the verb's own: --with adds configurations to them")
    for name in FILES_FOR_MONAI:
        if flags.get(name) is not None and not Path(flags[name] or "").is_file():
            raise UsageError(f"--{name} {flags[name]}: there is no such file")
    tracking = flags.get("tracking")
    if tracking is not None and tracking not in TRACKERS and not Path(tracking).is_file():
        raise UsageError(f"--tracking must be {' or '.join(TRACKERS)}, or a file of settings for it, got '{tracking}'")
    config = merge(request.files)
    for name in (name for name, value in flags.items() if value is None and _needs_value(name, config)):
        raise UsageError(f"--{name} what? Give a value behind it")
    try:
        refuse_flags(with_args_file(flags), request.files, documented_options(request.files))
    except BundleError as error:
        raise UsageError(str(error)) from error


def _needs_value(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a flag without a value, which is True for MONAI, cannot be meant: that of a path, or of a word."""
    default = config.get(name)
    is_word = isinstance(default, str) and default != "auto" and not default.startswith("@")
    return is_word or name.endswith(OF_PATHS)


def _start(request: Request) -> None:
    """Hand a command over to MONAI, or print it."""
    if request.printed:
        path = [f"PYTHONPATH={_quoted(str(ROOT))}"] * INSTALLED
        print(*path, "python -m monai.bundle run", *map(_quoted, request.arguments()))
        return
    import fire
    from monai.bundle import run

    fire.Fire(run, command=request.arguments(), name="python -m scripts")


def _quoted(word: str) -> str:
    """A word as it stands in the documentation, in double quotes, which every shell takes, where it needs any."""
    if word == shlex.quote(word):
        return word
    return f'"{word}"' if not set(word) & set('"$`\\!%') else shlex.quote(word)


def _from_here(path: Path) -> str:
    """A path as it is written from the working directory, if it lies there."""
    full = path.absolute()
    return (full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full).as_posix()


def _run_tool(name: str, arguments: list[str]) -> None:
    """`python -m scripts.MODULE` of that name, within this process."""
    sys.argv = [name, *arguments]
    module = next(module for module in programs() if tool_name(module) == name)
    runpy.run_module(f"scripts.{module}", run_name="__main__", alter_sys=True)


def _completion(arguments: Sequence[str]) -> str:
    """A script for a shell, or, as that script asks, the words that may come next."""
    if arguments[:1] == ["words"]:
        return "".join(f"{word}\n" for word in complete(arguments[1:]))
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise UsageError(f"completion of what? There are `completion {'` and `completion '.join(SHELLS)}`")
    return SHELLS[arguments[0]]


def complete(words: Sequence[str]) -> list[str]:
    """What may stand in place of the last, unfinished word of a command line behind `python -m scripts`."""
    *before, begun = words or [""]
    spelt = " ".join(itertools.takewhile(lambda word: not FLAG.fullmatch(word), before))
    last = next((word for word in reversed(before) if FLAG.fullmatch(word)), "")
    names = {name: verb for verb in verbs() for name in (verb, verb.replace(" ", "_"))}
    if last == "--with" and not begun.startswith("-"):
        found = list(additions())
    elif spelt in names:
        found = [f"--{name}" for name in ("with", "print", "help", *option_names(names[spelt]))]
    else:
        known = [*verbs(), *tools(), "completion"]
        begins = f"{spelt} " if spelt else ""
        found = [one[len(begins) :].split(" ")[0] for one in known if one.startswith(begins)]
    return list(dict.fromkeys(one for one in found if one.startswith(begun)))
