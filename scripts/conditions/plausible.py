# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What values a person can have, asked of what tables state and of what is measured alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Plausible = Mapping[str, Sequence[float]]
"""Raw name of a condition -> lowest and highest value that a person can have."""


def why_impossible(raw: str, value: float, plausible: Plausible | None) -> str:
    """Why no person has a value, in words; empty where one can.

    Args:
        raw: name of a condition in raw units; one that `plausible` does not name can have any finite value.
        value: NaN and infinity are impossible.
        plausible: None for no limits but that.
    """
    low, high = (plausible or {}).get(raw, (-1e300, 1e300))
    return "" if low <= round(value, 6) <= high else f"no person has less than {low:g} or more than {high:g}"
