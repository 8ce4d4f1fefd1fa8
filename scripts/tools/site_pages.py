# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Hooks of MkDocs for `make docs`: a page for each verb, from the configurations, as `--help` shows it."""

from __future__ import annotations

from typing import Any

from scripts.core.command_help import describe_verb
from scripts.core.verbs import verbs

PLACE = "VERBS"
"""Where the verbs' pages go in the site's `nav`."""
WIDTH = 100


def verb_pages() -> dict[str, str]:
    """Address -> Markdown of each verb's page."""
    return {
        f"verbs/{verb.replace(' ', '_')}.md": f"# {verb}\n\n```text\n{describe_verb(verb, files, WIDTH)}```\n"
        for verb, files in verbs().items()
    }


def on_config(config: Any) -> Any:
    """Put the pages into the navigation."""
    pages = [{address.rpartition("/")[2].removesuffix(".md").replace("_", " "): address} for address in verb_pages()]
    for section in config.nav:
        for title, entries in section.items():
            if isinstance(entries, list) and PLACE in entries:
                section[title] = [entry for entry in entries if entry != PLACE] + pages
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to the files of the site."""
    made = type(next(iter(files)))  # MkDocs' `File`, without importing MkDocs, which only `make docs` installs
    for address, text in verb_pages().items():
        files.append(made.generated(config, address, content=text))
    return files
