# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
