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

from __future__ import annotations

import sys

import pytest
from torch._utils import ExceptionWrapper

from scripts.errors import BundleError, find_bundle_error


def in_a_worker(error: Exception) -> ExceptionWrapper:
    """What the process of a data loader sends of an error, as PyTorch makes it there."""
    try:
        try:
            raise OSError("no such file")
        except OSError as cause:
            raise error from cause
    except Exception:
        return ExceptionWrapper(sys.exc_info(), "in DataLoader worker process 0")


@pytest.mark.parametrize("module", ["scripts.errors", "scripts.core.errors", "errors"])
def test_an_error_of_a_loader_s_process_is_found_wherever_its_class_lives(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BundleError, "__module__", module)
    with pytest.raises(BundleError) as caught:
        in_a_worker(BundleError("cannot read sub-1.nii.gz: restore it")).reraise()
    assert f"{module}.BundleError" in str(caught.value)
    assert str(find_bundle_error(caught.value)) == "cannot read sub-1.nii.gz: restore it"


def test_another_error_of_a_loader_s_process_is_none() -> None:
    with pytest.raises(ValueError) as caught:
        in_a_worker(ValueError("BundleError: no")).reraise()
    assert find_bundle_error(caught.value) is None
