# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Warnings in words where the losses or the validation show that a training goes wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ignite.engine import Engine, Events

from scripts.core.options import whole_number
from scripts.training.engine import losses_of

logger = logging.getLogger(__name__)

WORSE = 1.5
"""A finding is told again once its severity is this many times what was told."""

COLLAPSED_KL = 0.01
"""Nats per value of a latent. A mean of 0.1 standard deviations is worth 0.005: the decoder sees noise."""

EXPLODED_KL = 100.0
"""Nats per value. With posterior means of unit scale, even a standard deviation of 1e-6 gives 14; 100 takes means of
about 13 standard deviations of the prior."""

SMALL_MEANS, LARGE_MEANS = 0.1, 10.0
"""Standard deviation of the posterior means. The second stage rescales its latents, so that the scale itself does no
harm; outside of this range the decoder's input and the KL term are far from what the weights were chosen for."""

SMALL_LATENTS, LARGE_LATENTS = 0.5, 2.0
"""Standard deviation of the scaled latents. The noise schedules are made for 1; twice that shifts the signal-to-noise
ratio of every timestep by a factor of 4."""

MOST_NOISE = 0.1
"""Share of the latents' variance that is the posterior's own noise: above it the second stage learns to draw noise."""

DISCRIMINATOR_WINS = 0.02
"""Discriminator's least-squares loss: 0 if it is always right, 0.25 if it always answers 0.5."""

NOT_FOOLED = 0.8
"""Generator's least-squares loss: 1 if the discriminator sees through every reconstruction, 0 if through none."""

CHANCE, CHANCE_WITHIN = 0.25, 0.002
"""Either loss of a discriminator that always answers 0.5. One that learns stays below by more than 1 %."""

UNSTABLE = 0.4
"""Discriminator's least-squares loss over a whole window: worse than always answering 0.5, so it does not follow."""

RISEN = 1.2
"""A window's mean loss over the lowest one before. The diffusion loss of single draws varies by about as much as its
mean, so that means of 500 batches of 4 vary by about 2 %."""

RISEN_VALIDATION = 1.1
"""Validation loss over its lowest. Noise and timesteps are fixed, so that a tenth is no chance."""

COLLAPSED, ABOVE_REAL = 0.95, 0.1
"""MS-SSIM between samples of different noises, and how much it may exceed that between real volumes. The paper's own
GANs (Pinaya et al. 2022, Table 1) have 0.9997 and 0.9671, where real volumes have 0.6536."""

FALLEN_PSNR = 1.0
"""dB below the best validation: a mean squared error larger by a quarter."""

FIRST_BATCHES = 10
"""Batches whose latents are looked at when a training starts."""


class Finding(NamedTuple):
    """Something that looks wrong: what kind, how much so (above 0), and in words with what to do."""

    kind: str
    severity: float
    words: str


class TrainingHealth:
    """Handler that logs one warning where a training looks wrong, again only if it worsens or comes back.

    Looked at are the means of the losses over windows of iterations, whose names tell what they are (`adversarial`
    and `discriminator` are least-squares losses, unweighted), what a validation has put into the engine's metrics, and
    the scale of the latents of the first batches. Attach it after the validation.

    Args:
        watched: the loss that should not rise; one that is there from the first iteration, such as `l1`, since a total
            rises when the adversarial term comes in.
        window: iterations to average.
        latents: entry of a batch that holds scaled latents; None to look at none.
        cross_entropy: whether the discriminator's loss and the adversarial one are not least squares, but
            cross entropies.
        lever: the flag that makes the discriminator's opponent stronger.
    """

    def __init__(
        self,
        watched: str = "loss",
        window: Any = 500,
        latents: str | None = None,
        cross_entropy: bool = False,
        lever: str = "--adversarial_weight",
    ) -> None:
        self.watched, self.cross_entropy, self.lever = watched, cross_entropy, lever
        self.window = whole_number(window, "health_window", least=1)
        self.latents = latents
        self.told: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self._start()

    def attach(self, engine: Engine) -> None:
        """Follow a trainer whose output `scripts.training.engine.losses_of` reads."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.after_iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.after_epoch)

    def _start(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.iterations = 0
        self.batches = 0
        self.scale = 0.0

    def after_iteration(self, engine: Engine) -> None:
        """Take in the iteration's losses, and look at them where a window ends."""
        for name, value in losses_of(engine.state.output).items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
            self.counts[name] = self.counts.get(name, 0) + 1
        self.iterations += 1
        if self.latents is not None and self.batches < FIRST_BATCHES:
            self._take_batch(engine.state.batch[self.latents])
        if self.iterations == self.window:
            # A loss that came in within this window waits for a whole one.
            means = {name: s / self.window for name, s in self.sums.items() if self.counts[name] == self.window}
            self.sums, self.counts, self.iterations = {}, {}, 0
            players = opponents(means, self.cross_entropy, self.lever)
            self._tell(["discriminator", self.watched], [*players, *self._rising(means)])

    def _take_batch(self, latents: Any) -> None:
        self.scale += float(latents.float().std()) / FIRST_BATCHES
        self.batches += 1
        if self.batches == FIRST_BATCHES:
            self._tell(["scaled latents"], latent_scale(self.scale))

    def after_epoch(self, engine: Engine) -> None:
        """Look at the validation of this epoch, if there was one."""
        values = {name: float(value) for name, value in engine.state.metrics.items() if name.startswith("val_")}
        if values:
            kinds = ["posterior", "scale", "collapse", "val_loss", "val_psnr"]
            self._tell(kinds, [*posterior(values), *collapse(values), *self._worse_than_before(values)])

    def _rising(self, means: Mapping[str, float]) -> Iterator[Finding]:
        mean, name = means.get(self.watched), self.watched
        if mean is None:
            return
        best = self.best[name] = min(mean, self.best.get(name, mean))
        if mean > RISEN * best > 0.0:
            yield Finding(
                name,
                mean / best - 1.0,
                f"the loss '{name}' rises: {mean:.4g} in the last {self.window} iterations, {best:.4g} at its lowest. "
                "The training diverges: go back to a checkpoint from before, with a lower --lr",
            )

    def _worse_than_before(self, values: Mapping[str, float]) -> Iterator[Finding]:
        if "val_loss" in values:
            loss = values["val_loss"]
            best = self.best["val_loss"] = min(loss, self.best.get("val_loss", loss))
            if loss > RISEN_VALIDATION * best > 0.0:
                yield Finding(
                    "val_loss",
                    loss / best - 1.0,
                    f"the validation loss rises: {loss:.4g}, and it was {best:.4g}. If the training loss falls, the "
                    "network learns its scans by heart: take the best checkpoint, or train on more scans",
                )
        if "val_psnr" in values:
            psnr = values["val_psnr"]
            best = self.best["val_psnr"] = max(psnr, self.best.get("val_psnr", psnr))
            if psnr < best - FALLEN_PSNR:
                yield Finding(
                    "val_psnr",
                    best - psnr,
                    f"held-out volumes are reconstructed worse: {psnr:.2f} dB, and it was {best:.2f} dB. Where the "
                    "adversarial term has just come in, wait; else lower "
                    + " or ".join(dict.fromkeys((self.lever, "--lr"))),
                )

    def _tell(self, kinds: list[str], findings: list[Finding] | Iterator[Finding]) -> None:
        found = {finding.kind: finding for finding in findings}
        for kind in kinds:
            if kind not in found:
                self.told.pop(kind, None)
            elif found[kind].severity >= WORSE * self.told.get(kind, 0.0):
                self.told[kind] = found[kind].severity
                logger.warning(found[kind].words)


def posterior(values: Mapping[str, float]) -> Iterator[Finding]:
    """What the validation of an autoencoder says of its latents."""
    kl, sigma, std = (values.get(f"val_{name}") for name in ("kl_per_value", "latent_sigma", "latent_std"))
    if kl is None or sigma is None or std is None:
        return
    if kl < COLLAPSED_KL:
        yield Finding(
            "posterior",
            1.0,
            f"the posterior has collapsed to the prior: {kl:.2g} nats per value, mean standard deviation {sigma:.2f}, "
            f"means of standard deviation {std:.2g}. The decoder sees noise: lower --kl_weight, or start with "
            "--initial_log_variance -8",
        )
        return
    if kl > EXPLODED_KL:
        yield Finding(
            "posterior",
            kl / EXPLODED_KL,
            f"the KL divergence is {kl:.3g} nats per value: the latents leave the prior. Raise --kl_weight",
        )
    yield from latent_noise(sigma**2 / max(sigma**2 + std**2, 1e-12))
    if not SMALL_MEANS <= std <= LARGE_MEANS:
        yield Finding(
            "scale",
            max(std / LARGE_MEANS, SMALL_MEANS / max(std, 1e-12)),
            f"the posterior means have a standard deviation of {std:.3g}, usual is {SMALL_MEANS:g} to {LARGE_MEANS:g}: "
            + ("raise" if std > LARGE_MEANS else "lower")
            + " --kl_weight",
        )


def latent_noise(share: float) -> Iterator[Finding]:
    """What the share of noise in the variance of the latents says, in either stage."""
    if share > MOST_NOISE:
        yield Finding(
            "noise",
            share / MOST_NOISE,
            f"{share:.0%} of the latents' variance is the posterior's own noise, which a diffusion model would learn: "
            "train the autoencoder with a lower --kl_weight",
        )


def opponents(
    means: Mapping[str, float], cross_entropy: bool = False, lever: str = "--adversarial_weight"
) -> Iterator[Finding]:
    """What the losses of generator and discriminator, averaged over a window, say of them.

    Args:
        means: among them `discriminator` and `adversarial`.
        cross_entropy, lever: see `TrainingHealth`.
    """
    discriminator, generator = means.get("discriminator"), means.get("adversarial")
    if discriminator is None or generator is None:
        return
    chance = math.log(2.0) if cross_entropy else CHANCE
    losses = f"(its loss is {discriminator:.3f}, the generator's {generator:.3f}; {chance:.2f} each is a draw)"
    if cross_entropy:
        discriminator, generator = map(as_least_squares, (discriminator, generator))
    if discriminator < DISCRIMINATOR_WINS and generator > NOT_FOOLED:
        yield Finding(
            "discriminator",
            1.0,
            f"the discriminator tells every fake from a scan {losses}, and no longer says how to be better: "
            f"lower --discriminator_lr, or raise {lever}",
        )
    elif discriminator > UNSTABLE:
        yield Finding(
            "discriminator",
            discriminator / UNSTABLE,
            f"the discriminator does worse than by guessing {losses}: it does not follow the generator. Lower "
            f"--discriminator_lr, or {lever}",
        )
    elif max(abs(discriminator - CHANCE), abs(generator - CHANCE)) < CHANCE_WITHIN:
        yield Finding(
            "discriminator",
            1.0,
            f"the discriminator only guesses {losses}. With sharp fakes that is the equilibrium; with blurred ones it "
            "has given up: raise --discriminator_lr",
        )


def as_least_squares(cross_entropy: float) -> float:
    """The least-squares loss (1 - p)^2 of a judgement of probability p, whose cross entropy is -log p."""
    return (1.0 - math.exp(-cross_entropy)) ** 2


def collapse(values: Mapping[str, float]) -> Iterator[Finding]:
    """What the similarity of samples says of a generator."""
    found, real = values.get("val_ms_ssim"), values.get("val_ms_ssim_real", 1.0)
    limit = min(COLLAPSED, real + ABOVE_REAL)
    if found is not None and found > limit:
        beside = f"; real volumes have {real:.3f}" if "val_ms_ssim_real" in values else ""
        yield Finding(
            "collapse",
            found - limit,
            f"samples of different noises are nearly the same head: their MS-SSIM is {found:.3f}{beside}. Unless these "
            "are the first epochs, the generator has collapsed, which FID does not show: more scans, --r1 10, "
            "--instance_noise 0.1 or another seed may help",
        )


def latent_scale(std: float) -> Iterator[Finding]:
    """What the standard deviation of the scaled latents says of the scale."""
    if not SMALL_LATENTS <= std <= LARGE_LATENTS:
        yield Finding(
            "scaled latents",
            max(std / LARGE_LATENTS, SMALL_LATENTS / max(std, 1e-12)),
            f"the scaled latents have a standard deviation of {std:.3g}, where the noise schedule is made for 1: "
            "are these latents of another autoencoder? Encode the dataset again, or correct the latent scale",
        )
