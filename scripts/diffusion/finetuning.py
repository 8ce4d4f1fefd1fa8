# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether weights fit the diffusion training that starts from them."""

from __future__ import annotations

from monai.networks.schedulers import Scheduler

from scripts.core.errors import BundleError
from scripts.diffusion.schedules import check_facts
from scripts.networks.weights import LATENT_DIFFUSION, Checkpoint, check_family


def check_origin(
    checkpoint: Checkpoint | None,
    schedule: Scheduler,
    encoder_sha256: str | None = None,
    family: str = LATENT_DIFFUSION,
) -> None:
    """Refuse diffusion weights of another family, target or schedule, or that were trained on other latents.

    The latents' scale, too, is that of the weights' own autoencoder. Files that do not state these facts, such as the
    released weights, pass.

    Args:
        checkpoint: weights to start from, or None.
        schedule: of the training that begins.
        encoder_sha256: of what made its latents, see `scripts.networks.weights.encoder_sha256`; None without latents.
        family: of the model that is trained.

    Raises:
        BundleError: naming the flag to give, or the autoencoder.
    """
    if checkpoint is None:
        return
    check_family(checkpoint.path, checkpoint.facts, family)
    check_facts(checkpoint, schedule)
    trained = checkpoint.facts.get("encoder_sha256", encoder_sha256)
    if encoder_sha256 is not None and trained != encoder_sha256:
        raise BundleError(
            f"{checkpoint.path} was trained on latents of another autoencoder (SHA-256 of its encoder: "
            f"{str(trained)[:12]}...) than those in --latents_dir ({encoder_sha256[:12]}...): encode the dataset with "
            "the one that it knows"
        )
