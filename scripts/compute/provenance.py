# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What says of a file where it comes from: that it is synthetic, and made by which version of the bundle and model."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from scripts.core.paths import CONFIGS

BUNDLE = "brain-image-synthesis-latent-diffusion"
SHORT = "Brain LDM"
SIDECAR_SCHEMA = 2
"""Of the sidecars of samples and phantoms; those of versions before 2.2.0 do not state theirs, which is the first."""
BIDS = "1.9.0"
DESCRIPTION_BYTES = 79
"""What the field `descrip` of a NIfTI header holds, without the zero at its end."""


@functools.cache
def bundle_version() -> str:
    """That of `configs/metadata.json`."""
    return str(json.loads((CONFIGS / "metadata.json").read_text(encoding="utf-8"))["version"])


def synthetic_facts() -> dict[str, Any]:
    """What a sidecar says of any volume that shows no person: schema, `synthetic`, and the bundle that made it."""
    return {
        "schema_version": SIDECAR_SCHEMA,
        "synthetic": True,
        "bundle": {"name": BUNDLE, "version": bundle_version()},
    }


def model_in_words(facts: Mapping[str, Any]) -> str:
    """A model's family, and the beginnings of its weights' hashes, from the facts of a sidecar."""
    weights = facts.get("weights")
    hashes = [str(one.get("sha256", ""))[:8] for one in weights.values()] if isinstance(weights, Mapping) else []
    return " ".join([str(facts.get("family", "latent_diffusion")), *hashes])


def header_text(model: str) -> str:
    """What the header of a synthetic volume says, in the bytes that NIfTI has for it."""
    words = f"synthetic; {SHORT} {bundle_version()}; {model}"
    return words.encode("ascii", "replace")[:DESCRIPTION_BYTES].decode("ascii")


def dataset_description(name: str, what: str) -> dict[str, Any]:
    """The `dataset_description.json` of a BIDS derivative of synthetic volumes.

    Args:
        name: of the dataset.
        what: how it was made, in a few words.
    """
    maker = {"Name": BUNDLE, "Version": bundle_version(), "Description": what}
    return {
        "Name": name,
        "BIDSVersion": BIDS,
        "DatasetType": "derivative",
        "GeneratedBy": [maker],
    }
