# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The rule by which a sample is accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.options import number
from scripts.measuring.labelling import Measures
from scripts.measuring.segmenter import COLUMNS


class AcceptanceRule:
    """By which samples are kept: measured volumes within a share of what was asked for.

    Args:
        stated: raw name of a measured condition -> largest relative difference, such as 0.1; None keeps all.
        conditions: what is asked for.

    Raises:
        BundleError: for a name that is not asked for or not measured, or a share that is not above 0.
    """

    def __init__(self, stated: Any, conditions: Conditions) -> None:
        measured = [c.raw for c in conditions if c.raw in COLUMNS]
        if not isinstance(stated, (Mapping, type(None))):
            raise BundleError(f"--accept must be a map such as {{'ventricular_vol_mm3':0.1}}, got {stated!r}")
        for name in stated or {}:
            if name not in measured:
                raise BundleError(
                    f"--accept: '{name}' is none of what is asked for and measured: {', '.join(measured)}"
                )
        self.stated = {name: number(share, f"accept::{name}", 1e-6) for name, share in (stated or {}).items()}

    def accepts(self, asked: Mapping[str, Any], measured: Measures) -> bool:
        """Whether a sample may stay.

        Args:
            asked: raw names -> raw values.
            measured: see `scripts.measuring.labelling.Labeller.label`.
        """
        return all(
            measured is not None and abs(measured[name] - asked[name]) <= share * abs(asked[name])
            for name, share in self.stated.items()
        )
