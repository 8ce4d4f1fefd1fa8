# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Models that the page can sample from: their conditions, samplers and ranges, out of the configurations."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from scripts.conditions.conditions import Condition, Conditions
from scripts.core.command_line import read_request
from scripts.core.errors import BundleError, explain
from scripts.core.files import make_folder, write_json
from scripts.core.verbs import BASE, SAMPLE, SEPARATOR, merge, references, set_part, used_ids
from scripts.diffusion.samplers import choose_sampler

logger = logging.getLogger(__name__)

WEIGHTS = ("autoencoder_path", "diffusion_path", "generator_path")
MODEL = "chosen_family"
PASSED = ("bundle_root", "device", "amp", "decoder_amp", "tf32", "fast", "streaming", "compile", "guidance")
"""Options of the page's command that its samples are made with."""
HOW = (*PASSED, "compute_device", "uses_fast", "sampler", "num_inference_steps")
"""What decides how is computed, and not what the model is."""
BEYOND = 0.15
"""How far a slider goes beyond the training range on either side, as a share of it, where that is plausible."""


@dataclass(frozen=True)
class OfferedModel:
    """A model and the words that choose it on the command line of `sample`.

    Attributes:
        name: for the page.
        words: such as `--with demo`.
    """

    name: str
    words: Sequence[str] = field(default_factory=tuple)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its configuration, merged."""
        request = read_request(SAMPLE, [*self.words])
        config = merge(request.files)
        for name, value in zip(request.flags[::2], request.flags[1::2]):
            set_part(config, name.lstrip("-"), value)
        return config

    @cached_property
    def parser(self) -> ConfigParser:
        """The same, for what is computed from it."""
        return ConfigParser(dict(self.config))

    @property
    def family(self) -> Mapping[str, Any]:
        """The entry of its family."""
        return self.config["families"][self.config["family"]]

    @cached_property
    def conditions(self) -> Conditions:
        """Those that its samples have."""
        return self.parser.get_parsed_content("model_conditions")

    def weights(self) -> list[Path]:
        """The files of its networks."""
        used = used_ids(self.config, references(self.family))
        return [Path(self.parser.get_parsed_content(name)) for name in WEIGHTS if name in used]

    @cached_property
    def samplers(self) -> dict[str, int]:
        """Name -> its usual number of steps, of the samplers that the model's target can be walked with.

        That of distilled models is among them where it is the model's own.
        """
        if "chosen_sampler" not in used_ids(self.config, references(self.family)):
            return {}
        found = {}
        for name in self.config["samplers"]:
            try:
                maker = self.parser.get_parsed_content(f"samplers{SEPARATOR}{name}")
                sampler = choose_sampler({name: maker}, name)
            except BundleError:
                continue
            if name == self.config["sampler"] or not getattr(sampler, "for_students", False):
                found[name] = len(sampler.timesteps)
        return found

    def about(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the page shows of it.

        Args:
            given: values of options, conditions among them, that the page begins with.
        """
        samplers = self.samplers
        plausible = self.config.get("plausible", {})
        return {
            "name": self.name,
            "family": self.config["family"],
            "conditions": [_slider(c, plausible.get(c.raw), given) for c in self.conditions],
            "samplers": samplers,
            "sampler": given.get("sampler") or (self.parser.get_parsed_content("sampler") if samplers else None),
            "shape": list(self.parser.get_parsed_content("grid").shape),
        }


def _slider(condition: Condition, plausible: Sequence[float] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    width = BEYOND * (condition.maximum - condition.minimum)
    low, high = condition.minimum - width, condition.maximum + width
    if plausible:
        low, high = max(low, plausible[0]), min(high, plausible[1])
    named = [flag for flag in (condition.name, condition.raw) if given.get(flag) is not None]
    start = condition.parse(named[0], given[named[0]]) if named else condition.default
    about = {name: getattr(condition, name) for name in ("name", "raw", "unit", "minimum", "maximum")}
    return {**about, "codes": dict(condition.codes), "low": low, "high": high, "start": condition.denormalise(start)}


def find_models(
    config: Mapping[str, Any], entries: Mapping[str, Sequence[str]], runs: Path, folder: Path
) -> list[OfferedModel]:
    """The models whose weights are there: the one that the page's own command states, those of the map, those of runs.

    Args:
        config: merged, of the page's command.
        entries: name -> words of `sample`, such as `--with demo`.
        runs: the folder of the trainings.
        folder: where overlays are written for models that no configuration describes.
    """
    passed, found = passed_words(config), list[OfferedModel]()
    named = (OfferedModel(name, tuple(words)) for name, words in entries.items())
    stated = next(_stated(config, folder))
    for model in (*named, stated, *_trained(runs, folder)):
        model = OfferedModel(model.name, (*model.words, *passed))
        if _is_there(model) and not any(_same(model, other) for other in found):
            found.append(model)
    return sorted(found, key=lambda model: not _same(model, stated))  # that of the command first


def passed_words(config: Mapping[str, Any]) -> list[str]:
    """Options of the page's command, in words, that the commands for its samples get as well."""
    base = merge([BASE])
    return [word for n in PASSED if str(config[n]) != str(base[n]) for word in (f"--{n}", str(config[n]))]


def _same(one: OfferedModel, other: OfferedModel) -> bool:
    return model_part(one.config) == model_part(other.config)


def _is_there(model: OfferedModel) -> bool:
    try:
        return all(path.is_file() for path in model.weights())
    except Exception as error:  # whatever a configuration of one's own may raise
        logger.warning(f"the page does not offer the model {model.name}: {explain(error) or error}")
        return False


def model_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration, what is its model and is not so in the base."""
    base = merge([BASE])
    names = sorted({name.split(SEPARATOR)[0] for name in used_ids(config, [MODEL, "grid", "conditions"])})
    return {n: config[n] for n in names if n in config and n not in HOW and config[n] != base.get(n)}


def _stated(config: Mapping[str, Any], folder: Path) -> Iterator[OfferedModel]:
    part = model_part(config)
    yield _from_overlay("as given", part, folder) if part else OfferedModel("released")


def _from_overlay(name: str, part: Mapping[str, Any], folder: Path) -> OfferedModel:
    path = make_folder(folder) / f"{name.replace(' ', '_').replace('/', '_')}.json"
    write_json(path, part)
    return OfferedModel(name, ("--with", str(path)))


def _trained(runs: Path, folder: Path) -> Iterator[OfferedModel]:
    """Those of trainings of a diffusion model or a generator whose newest checkpoint says its configuration."""
    for checkpoint in sorted({path.parent for path in runs.glob("*/checkpoint_iteration=*.pt")}):
        newest = max(checkpoint.glob("checkpoint_iteration=*.pt"), key=lambda path: path.stat().st_mtime)
        try:
            content = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)
            config = json.loads(content["config"])
            flag = next(f"{n}_path" for n in ("diffusion", "generator") if n in content or f"{n}_ema" in content)
            result = str(newest.parent / f"{config['stage']}.pt")
            weights = result if Path(result).is_file() else str(newest)
            part = {**model_part(config), flag: weights, "load_old": 0}
            yield _from_overlay(f"runs/{checkpoint.name}", part, folder)
        except (StopIteration, OSError, KeyError, ValueError, RuntimeError, BundleError) as error:
            logger.debug(f"{newest} is no model for the page: {error}")
