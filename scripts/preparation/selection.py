# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Which scans of a BIDS dataset are meant: those of some people and sessions, and with some entities in their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.core.errors import BundleError
from scripts.core.files import parse_json
from scripts.core.options import is_absent
from scripts.core.tables import read_text

ENTITY = re.compile(r"([A-Za-z]+)-([A-Za-z0-9+]+)")
OUT: Mapping[str, tuple[str, ...]] = {"part": ("phase", "real", "imag"), "inv": (), "space": (), "desc": ()}
"""Entities of images that are no scans to train on, by default: with these values, or with any."""
LONG_NAMES = {
    **{"subject": "sub", "session": "ses", "acquisition": "acq", "ceagent": "ce", "tracer": "trc"},
    **{"reconstruction": "rec", "inversion": "inv", "processing": "proc", "description": "desc"},
    **{name: name for name in ("chunk", "run", "echo", "flip", "part", "space", "mt", "direction")},
}
"""What filter files call entities, which names of files abbreviate."""
FURTHER_KEYS = ("datatype", "suffix", "extension", "scope", "invalid_filters", "regex_search")
NONE, ANY, OPTIONAL = "query.none", "query.any", "query.optional"
KEY = "t1w"


def entities(name: str) -> dict[str, str]:
    """The entities in a file's name, such as `{"sub": "01", "run": "2"}`."""
    return dict(ENTITY.findall(name))


class Selection:
    """Which people, sessions and images are taken.

    Args:
        participants: labels, with or without `sub-`, as a list, or separated by commas or blanks; None takes all.
        sessions: labels, with or without `ses-`.
        filter_file: a JSON file as fMRIPrep's `--bids-filter-file`, of which `t1w` counts: entity -> a value, several,
            or null where the name must not have it.

    Raises:
        BundleError: if the filter file cannot be used.
    """

    def __init__(self, participants: Any = None, sessions: Any = None, filter_file: Any = None) -> None:
        self.participants = _labels(participants, "sub")
        self.sessions = _labels(sessions, "ses")
        self.filters = {} if is_absent(filter_file) else _read_filters(Path(str(filter_file)))

    def takes_participant(self, participant: str) -> bool:
        """Whether scans of a participant, such as `sub-01`, are taken."""
        return _is_among(participant.split("_ses-")[0], self.participants, "sub")

    def takes_session(self, session: str) -> bool:
        """Whether scans of a session, such as `ses-1`, are taken."""
        return _is_among(session, self.sessions, "ses")

    def takes(self, name: str) -> bool:
        """Whether a T1w image is taken, by the entities in its name."""
        found = entities(name)
        if any(not _fits(found.get(entity), wanted) for entity, wanted in self.filters.items()):
            return False
        others = {entity: values for entity, values in OUT.items() if entity not in self.filters}
        return not any(e in found and (not values or found[e].lower() in values) for e, values in others.items())

    def check(self, participants: Sequence[str], sessions: Sequence[str]) -> None:
        """Raise `BundleError` for a label that no scan has."""
        for flag, prefix, wanted, known in (
            ("participant_label", "sub-", self.participants, {p.removeprefix("sub-") for p in participants}),
            ("session_label", "ses-", self.sessions, {s.removeprefix("ses-") for s in sessions if s}),
        ):
            lacking = sorted(label for label in wanted or () if not any(_plain(label) == _plain(k) for k in known))
            if lacking:
                there = ", ".join(f"{prefix}{label}" for label in sorted(known)[:8]) or "none"
                raise BundleError(f"--{flag}: there is no {prefix}{lacking[0]}; there are {there}")


def _is_among(name: str, labels: set[str] | None, prefix: str) -> bool:
    return labels is None or _plain(name.removeprefix(f"{prefix}-")) in {_plain(label) for label in labels}


def _labels(given: Any, prefix: str) -> set[str] | None:
    if given is None or is_absent(given):
        return None
    parts = given if isinstance(given, (list, tuple)) else re.split(r"[,\s]+", str(given))
    return {str(part).strip().removeprefix(f"{prefix}-") for part in parts if str(part).strip()}


def _read_filters(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise BundleError(f"--bids_filter_file: {path} is no JSON ({error})") from error
    stated = content.get(KEY, {}) if isinstance(content, Mapping) else None
    if not isinstance(stated, Mapping):
        raise BundleError(f'--bids_filter_file: {path} must be like {{"{KEY}": {{"session": "1", "run": null}}}}')
    for name, wanted in (("suffix", "T1w"), ("datatype", "anat")):
        if not _fits(wanted, stated.get(name, wanted)):
            raise BundleError(f"--bids_filter_file: {name} of {KEY} in {path} must be {wanted}")
    found = {LONG_NAMES.get(str(name), str(name)): v for name, v in stated.items() if name not in FURTHER_KEYS}
    for entity in found:
        if entity not in {*LONG_NAMES.values(), *OUT}:
            raise BundleError(f"--bids_filter_file: there is no entity '{entity}' of a T1w image in {path}")
    return found


def _fits(value: str | None, wanted: Any) -> bool:
    """Whether the value of an entity, None where a name has none, is what a filter asks for."""
    if isinstance(wanted, list):
        return any(_fits(value, one) for one in wanted)
    word = "" if wanted is None else str(wanted).strip()
    special = word.lower().strip("<>").split(":")[0]
    if special == OPTIONAL:
        return True
    if special in (ANY, "*"):
        return value is not None
    if wanted is None or special == NONE:
        return value is None
    return value is not None and _plain(value) == _plain(re.sub(r"^[a-z]+-", "", word))


def _plain(label: str) -> str:
    """A label; a number without the zeros before it."""
    return str(int(label)) if label.isascii() and label.isdigit() else label
