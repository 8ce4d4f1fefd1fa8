# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""HTML pages that need no other file, from the templates in `scripts/core/templates`."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from scripts.core.paths import PACKAGE

TEMPLATES = PACKAGE / "core" / "templates"


def render(template: str, **content: Any) -> str:
    """A page, in which all text that is put into the template is escaped.

    Args:
        template: name of a file in `scripts/core/templates`.
        content: what the template names; lacking any of it is an error.
    """
    return _environment().get_template(template).render(content)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("scripts.core", "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    return environment
