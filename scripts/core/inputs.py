# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What a flag gives: a folder of volumes, feature networks, segmentations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class Input(ABC):
    """Something that a flag gives.

    Attributes:
        flag: the flag's name.
        warnings: what was warned of when it was made.
    """

    flag: str
    warnings: Sequence[str] = ()

    @property
    @abstractmethod
    def requested(self) -> bool:
        """Whether the flag was given."""

    @property
    def why_not(self) -> str:
        """Why it does without what it was meant to take by itself; empty where it does not."""
        return ""

    def check(self) -> None:  # noqa: B027 (most have nothing to look at)
        """Raise a `BundleError` if what was given cannot be used; before anything is computed."""
