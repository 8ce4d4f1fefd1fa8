# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What each option may be: one table of types and ranges, which every verb consults before it builds anything.

A name within a section stands with `::`, and `*` for any word. What the table does not name has to be of the kind of
the default that a configuration gives it. Values that are computed (`@`, `$`, `%`) are for their components to refuse.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from scripts.core.errors import BundleError
from scripts.core.options import NO, YES, is_absent, number, probability, whole_number, yes_or_no
from scripts.core.verbs import references

SECTIONS = ("population", "anatomy", "ageing", "looks", "splits")
"""Maps of settings that are read as a whole: a name that the table does not have is none of theirs."""


@dataclass(frozen=True)
class OptionType:
    """What one option may be.

    Attributes:
        kind: `number`, `whole`, `share`, `yes_no`, `path`, `paths`, `text`, `numbers`, `wholes`, `names`, `map`, or
            `anything`, which its component checks.
        least, most: bounds of numbers, which may be taken.
        above, below: bounds of numbers, which may not.
        words: what else may stand there, or all that may stand there for a `text`.
        count: least and most entries of a list.
        optional: whether it may be left out, as `null`.
        single: whether one number may stand for a list.
    """

    kind: str
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    words: tuple[str, ...] = ()
    count: tuple[int, int] = (0, 1000)
    optional: bool = False
    single: bool = False

    def check(self, value: Any, flag: str) -> None:
        """Refuse what the option may not be.

        Raises:
            BundleError: naming the flag, what it may be and what was given.
        """
        if (self.optional and is_absent(value) and str(value).strip()) or str(value).strip().lower() in self.words:
            return
        if value is None:
            raise BundleError(f"--{flag} needs a value")
        getattr(self, f"_check_{self.kind}")(value, flag)

    def _check_anything(self, value: Any, flag: str) -> None:
        pass

    def _check_number(self, value: Any, flag: str) -> None:
        found = number(value, flag, self.least, self.most)
        if found <= self.above:
            raise BundleError(f"--{flag} must be above {self.above:g}, got {value}")
        if found >= self.below:
            raise BundleError(f"--{flag} must be below {self.below:g}, got {value}")

    def _check_whole(self, value: Any, flag: str) -> None:
        least = 0 if math.isinf(self.least) else int(self.least)
        found = whole_number(value, flag, least)
        if found > self.most:
            raise BundleError(f"--{flag} must be at most {self.most:.0f}, got {found}")

    def _check_share(self, value: Any, flag: str) -> None:
        probability(value, flag)

    def _check_yes_no(self, value: Any, flag: str) -> None:
        if self.words and str(value).strip().lower() not in YES | NO:
            first, last = ", ".join(("0", "1", *self.words[:-1])), self.words[-1]
            raise BundleError(f"--{flag} must be {first} or {last}, got '{value}'")
        yes_or_no(value, flag)

    def _check_text(self, value: Any, flag: str) -> None:
        if isinstance(value, (Mapping, Sequence)) and not isinstance(value, str):
            raise BundleError(f"--{flag} must be one word, and was read as {value!r}: write it in quotes")
        if self.words:
            raise BundleError(f"--{flag} must be {' or '.join(self.words)}, got '{value}'")
        if not str(value).strip():
            raise BundleError(f"--{flag} is empty: give a value, or leave it out")

    def _check_path(self, value: Any, flag: str) -> None:
        if not isinstance(value, (str, os.PathLike)):
            raise BundleError(f"--{flag} must be a path, and was read as {value!r}: write it in quotes")
        if not str(value).strip():
            raise BundleError(f"--{flag} is empty: give a path, or leave it out")
        if "\0" in str(value):
            raise BundleError(f"--{flag} has a character that no path has")
        if "#" in str(value) or "::" in str(value):
            raise BundleError(
                f"--{flag} {value}: MONAI reads # as ::, so a path with either cannot be given; use another"
            )

    def _check_paths(self, value: Any, flag: str) -> None:
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else [value]
        for part in parts:
            if part is not None:
                self._check_path(part, flag)

    def _check_numbers(self, value: Any, flag: str) -> None:
        for one in self._list(value, flag):
            self._check_number(one, flag)

    def _check_wholes(self, value: Any, flag: str) -> None:
        for one in self._list(value, flag):
            self._check_whole(one, flag)

    def _check_names(self, value: Any, flag: str) -> None:
        for one in self._list([value] if isinstance(value, str) else value, flag):
            if not isinstance(one, str) or not one.strip():
                raise BundleError(f"--{flag} must be names such as \"['a','b']\", got {value!r}")

    def _check_map(self, value: Any, flag: str) -> None:
        if not isinstance(value, Mapping):
            raise BundleError(f"--{flag} must be a map such as \"{{'a':...,'b':...}}\", got {value!r}")

    def _list(self, value: Any, flag: str) -> Sequence[Any]:
        least, most = self.count
        value = [value] if self.single and not isinstance(value, (list, tuple)) else value
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            counted = f"{least}" if least == most else f"{least} to {most}" if most < 1000 else f"at least {least}"
            raise BundleError(f'--{flag} must be a list of {counted}, such as "[1,2,3]", got {value!r}')
        return value


def _number(least: float = -math.inf, most: float = math.inf, **more: Any) -> OptionType:
    return OptionType("number", least, most, **more)


def _whole(least: int = 1, most: float = 10**15, **more: Any) -> OptionType:
    return OptionType("whole", least, most, **more)


def _choice(*words: str, **more: Any) -> OptionType:
    return OptionType("text", words=words, **more)


YES_NO, SHARE, PATH, TEXT = (OptionType(kind) for kind in ("yes_no", "share", "path", "text"))
PERHAPS_PATH, PERHAPS_PATHS = OptionType("path", optional=True), OptionType("paths", optional=True)
PERHAPS_TEXT, ANYTHING = OptionType("text", optional=True), OptionType("anything")
PERHAPS_ANYTHING = OptionType("anything", optional=True)
RATE, POSITIVE = _number(above=0.0, most=1000.0), _number(above=0.0)
NOT_NEGATIVE, ANY_NUMBER = _number(0.0), _number()
PRECISION = OptionType("yes_no", words=("auto", "bf16", "fp16"))
MANY = 10**7
"""More volumes than any disk of today holds: numbers of them are compared with the disk as well."""

OPTIONS: Mapping[str, OptionType] = {
    # of all verbs
    "bundle_root": PATH,
    "dataset_dir": PATH,
    "output_dir": PATH,
    "device": TEXT,
    "amp": PRECISION,
    "decoder_amp": PRECISION,
    "seed": _whole(0, optional=True),
    "batch_size": _whole(1, MANY * 1000),
    "autoencoder_path": PATH,
    "diffusion_path": PATH,
    "load_old": YES_NO,
    "resample_to_grid": YES_NO,
    "resample_volumes": YES_NO,
    "num_workers": _whole(0, 4096),
    "tracking": PERHAPS_TEXT,
    "tracking_uri": PERHAPS_TEXT,
    "experiment_name": PERHAPS_TEXT,
    "run_name": PERHAPS_TEXT,
    # sampling
    "conditions_table": PERHAPS_PATH,
    "num_samples": _whole(1, MANY, optional=True),
    "target": TEXT,
    "sampler": TEXT,
    "num_inference_steps": _whole(1, optional=True),
    "family": TEXT,
    "fast": OptionType("yes_no", words=("auto",)),
    "streaming": OptionType("whole", 0, 2, words=("auto",)),
    "compile": YES_NO,
    "write_threads": _whole(0, 1024),
    "guidance": _number(0.0, optional=True),
    "output_dtype": TEXT,
    "layout": _choice("flat", "bids"),
    "latent_scale": POSITIVE,
    # editing
    "scan": PERHAPS_PATH,
    "native_scan": PERHAPS_PATH,
    "mask": PERHAPS_PATH,
    "scans": PERHAPS_PATHS,
    "seeds": OptionType("wholes", count=(2, 2), optional=True),
    "frames": _whole(2, 1000),
    "inpaint_steps": _whole(1),
    "repaint_times": _whole(1, 1000),
    "own": OptionType("map", optional=True),
    "strength": _number(above=0.0, most=1.0),
    "inversion_steps": _whole(1),
    "inversion_tolerance": _number(above=0.0, most=1.0),
    "keep_residual": YES_NO,
    "measure": YES_NO,
    # sizes of networks and volumes
    "latent_channels": _whole(1, 4096),
    "autoencoder_channels": OptionType("wholes", 1, 65536, count=(1, 16)),
    "network_def::channels": OptionType("wholes", 1, 65536, count=(1, 16)),
    "network_def::num_head_channels": OptionType("wholes", 0, 65536, count=(1, 16), single=True),
    "*_def::num_res_blocks": OptionType("wholes", 1, 64, count=(1, 16), single=True),
    "*_def::norm_num_groups": _whole(1, 65536),
    "*_def::norm_eps": POSITIVE,
    "grid::shape": OptionType("wholes", 1, 100_000, count=(3, 3)),
    "grid::spacing": OptionType("numbers", -1000.0, 1000.0, count=(3, 3)),
    "grid::origin": OptionType("numbers", count=(3, 3)),
    "schedules::*::num_train_timesteps": _whole(1, 10**6),
    "schedules::*::beta_*": _number(above=0.0, below=1.0),
    "samplers::*::num_inference_steps": _whole(1),
    "samplers::*::eta": SHARE,
    # all trainings
    "run_dir": PATH,
    "max_epochs": _whole(1),
    "epoch_length": _whole(1, optional=True),
    "lr": RATE,
    "lr_decay": TEXT,
    "lr_decay_factor": _number(1.0e-6, 1.0),
    "lr_warm_up": _whole(0),
    "ema_decay": SHARE,
    "clip_gradients": NOT_NEGATIVE,
    "accumulate": _whole(1),
    "gradient_checkpointing": YES_NO,
    "channels_last": YES_NO,
    "deterministic": YES_NO,
    "tf32": YES_NO,
    "max_minutes": _number(above=0.0, optional=True),
    "checkpoint_minutes": _number(0.0, optional=True),
    "pretrained": PERHAPS_PATH,
    "freeze": OptionType("names", optional=True),
    "validation_fraction": SHARE,
    "validate_every": _whole(0),
    "validation_limit": _whole(1, optional=True),
    "missing_conditions": TEXT,
    "cache_rate": SHARE,
    "checkpoint_every": _whole(1, optional=True),
    "keep_checkpoints": _whole(1),
    "log_every": _whole(1),
    "health_window": _whole(1),
    "momentum": _number(0.0, below=1.0),
    "weight_decay": _number(0.0, 1000.0),
    "stage": TEXT,
    # the autoencoder
    "discriminator_lr": RATE,
    "l1_weight": NOT_NEGATIVE,
    "l2_weight": NOT_NEGATIVE,
    "device_augmentation": _number(0.0, 100.0),
    "perceptual_weight": NOT_NEGATIVE,
    "perceptual_path": PATH,
    "kl_weight": NOT_NEGATIVE,
    "adversarial_weight": NOT_NEGATIVE,
    "fake_3d_ratio": _number(above=0.0, most=1.0),
    "warm_up_epochs": _whole(0),
    "patch_shape": OptionType("wholes", 1, 100_000, count=(3, 3)),
    "discriminator_channels": _whole(1, 4096),
    "discriminator_layers": _whole(1, 16),
    "initial_log_variance": _number(-30.0, 20.0, optional=True),
    "flip": SHARE,
    "affine": SHARE,
    "intensity_shift": SHARE,
    "gamma": SHARE,
    # the baselines
    "generator_path": PATH,
    "noise_size": _whole(1, 10**6),
    "generator_channels": OptionType("wholes", 1, 65536, count=(1, 16)),
    "gan_discriminator_channels": OptionType("wholes", 1, 65536, count=(1, 16)),
    "feature_weight": _number(1.0e-6, 1.0),
    "intensity": SHARE,
    "r1": NOT_NEGATIVE,
    "r1_every": _whole(1),
    "instance_noise": NOT_NEGATIVE,
    "balance": SHARE,
    "diversity_volumes": _whole(2, 10**6),
    # latents and the diffusion model
    "latents_dir": PERHAPS_PATH,
    "latent_versions": _whole(1, 10**12),
    "latent_dtype": TEXT,
    "sample_every": _whole(0),
    "timestep_density": TEXT,
    "density_location": ANY_NUMBER,
    "density_scale": NOT_NEGATIVE,
    "min_snr_gamma": _number(0.0, optional=True),
    "condition_dropout": SHARE,
    "teacher_steps": _whole(1),
    "teacher_guidance": _number(0.0, optional=True),
    "trained_conditions": OptionType("names", optional=True),
    # brain age and the segmenter
    "augment": SHARE,
    "shift": NOT_NEGATIVE,
    "rotation": _number(0.0, 180.0),
    "volume_weight": NOT_NEGATIVE,
    "random_contrast": SHARE,
    "segmenter_spacing": _number(0.1, 100.0),
    "segmenter_features": OptionType("wholes", 1, 65536, count=(1, 16)),
    # preparation
    "input_dir": PERHAPS_PATH,
    "input_table": PERHAPS_PATH,
    "participant_label": PERHAPS_ANYTHING,  # a label, several, or a number
    "session_label": PERHAPS_ANYTHING,
    "bids_filter_file": PERHAPS_PATH,
    "columns": ANYTHING,  # a map of the preparation, and a list of the figures
    "words": OptionType("map", optional=True),
    "plausible": OptionType("map", optional=True),
    "plausible::*": OptionType("numbers", count=(2, 2)),
    "shard": PERHAPS_TEXT,
    "assemble": YES_NO,
    "segment_with": PERHAPS_TEXT,
    "segmentations": PERHAPS_PATHS,
    "bias_field": YES_NO,
    "super_resolution": PERHAPS_TEXT,
    "skull_strip": PERHAPS_TEXT,
    "exclude": PERHAPS_PATH,
    "splits": OptionType("map"),
    "splits::*": _number(0.0, 1.0),
    "split_seed": _whole(0),
    "learn_ranges": YES_NO,
    "template": PATH,
    "template_brain": PATH,
    "overwrite": YES_NO,
    "steps::*::percentile": _number(0.0, 100.0),
    "steps::scale::level": _number(above=0.0, most=1.0),
    "steps::*::seed": _whole(1),
    "steps::*::order": OptionType("whole", 0, 5),
    "steps::register::*_similarity": _number(-1.0, 1.0),
    "steps::check::min_*": SHARE,
    # phantoms
    "num_phantoms": _whole(1, MANY, optional=True),
    "independent": YES_NO,
    "intracranial_mm3": _number(above=0.0, most=1.0e7, optional=True),
    "reference_intracranial_mm3": POSITIVE,
    "heads_dir": PATH,
    "labels_dir": PATH,
    "heads": OptionType("names", count=(1, 1000), optional=True),
    "contact_sheet": PERHAPS_PATH,
    "population::male": SHARE,
    "population::correlation": _number(-1.0, 1.0),
    "population::*::sd": NOT_NEGATIVE,
    "population::age::mean": _number(0.0, 120.0),
    "population::ventricles::median": POSITIVE,
    "population::brain::mean": POSITIVE,
    "population::*::per_year": ANY_NUMBER,
    "population::*::male_over_female": ANY_NUMBER,
    "population::intracranial::*male": POSITIVE,
    "anatomy::amplitude": _number(0.0, 100.0),
    "anatomy::wavelength": POSITIVE,
    "anatomy::stretch": _number(0.0, below=1.0),
    "anatomy::tilt": _number(0.0, 90.0),
    "ageing::head_age": _number(0.0, 120.0),
    "ageing::grey_over_white": ANY_NUMBER,
    "ageing::contrast": ANY_NUMBER,
    "looks::bias": _number(0.0, 10.0),
    "looks::wavelength": POSITIVE,
    "looks::gamma": _number(0.0, below=1.0),
    "looks::gain": _number(0.0, below=1.0),
    "looks::noise": _number(0.0, 1.0),
    # segmentation and evaluation
    "volumes_dir": PERHAPS_PATH,
    "segmenter_path": PERHAPS_PATH,
    "value_dir": PATH,
    "feature_dir": PATH,
    "segmentation_dir": PATH,
    "synthetic_dir": PERHAPS_PATHS,
    "real_dir": PERHAPS_PATH,
    "reconstruct_dir": PERHAPS_PATH,
    "training_dir": PERHAPS_PATH,
    "features": OptionType("names", optional=True),
    "medicalnet_path": PERHAPS_PATH,
    "brain_age_path": PERHAPS_PATH,
    "num_pairs": _whole(1, 10**9),
    "resamplings": _whole(2, 10**6),
    "*_metrics::*::kernel_size": OptionType("whole", 1, 1001),
    "*_metrics::*::win_size": OptionType("whole", 1, 1001),
    "*_metrics::*::kernel_sigma": POSITIVE,
    "*_metrics::*::data_range": POSITIVE,
    "*_metrics::*::max_val": POSITIVE,
    "alignment::spacing": _number(0.1, 1000.0),
    "alignment::largest_*": NOT_NEGATIVE,
    "feature_networks::*::shrink": _whole(1, 1000),
    "feature_networks::*::slices": _whole(1, 10**6),
    "metrics::*::candidates": _whole(1),
    # collections
    "collection_dir": PATH,
    "law": TEXT,
    "people_table": PERHAPS_PATH,
    "law_file": PERHAPS_PATH,
    "jitter": _number(above=0.0, most=1.0),
    "strata": OptionType("map", optional=True),
    "num_rows": _whole(1, 10**6),
    "rows_per_shard": _whole(1, 10**6),
    "labels": YES_NO,
    "accept": OptionType("map", optional=True),
    "max_tries": _whole(1, 10**6),
    "pictures": YES_NO,
    "dry_run": YES_NO,
    "dry_rows": _whole(1, 1000),
    "workers": _whole(1, 10**6),
    "lease_minutes": _number(0.01),
    "remake": _whole(0, 10**6),
    "tolerance": SHARE,
    "partial": YES_NO,
    "skull_stripped": YES_NO,
    # figures and export
    "figure": TEXT,
    "rows": ANYTHING,
    "num_heads": _whole(1, MANY),
    "levels": OptionType("numbers", -10.0, 10.0, count=(1, 100)),
    "figures": OptionType("map"),
    "models": OptionType("map", optional=True),
    "count": _whole(1),
    "export_dir": PATH,
    "formats": OptionType("names", count=(1, 10)),
    # the page
    "host": TEXT,
    "port": _whole(0, 65535),
    "open": YES_NO,
    "token": OptionType("text", optional=True),
    "runs_dir": PERHAPS_PATH,
    "evaluation_dir": PERHAPS_PATH,
    "offered": OptionType("map"),
}


def type_of(name: str, default: Any = None) -> OptionType | None:
    """What an option may be; None where neither the table nor a default tells.

    Args:
        name: of the option, with `::` within sections.
        default: what a configuration gives it.
    """
    if name in OPTIONS:
        return OPTIONS[name]
    found = next((OPTIONS[pattern] for pattern in OPTIONS if "*" in pattern and fnmatchcase(name, pattern)), None)
    return found or _like(default)


def _like(default: Any) -> OptionType | None:
    if isinstance(default, bool):
        return YES_NO
    if isinstance(default, (int, float)):
        return ANY_NUMBER
    if isinstance(default, list) and default and all(type(one) in (int, float) for one in default):
        return OptionType("numbers", count=(1, 1000))
    return None


def as_typed(name: str, text: str, is_condition: bool = False) -> str | None:
    """A path or a word as it was typed, `~` expanded; None for an option of another kind.

    MONAI's command line reads `2026_01`, `1.10`, `1e3`, `a,b` and `x#y` as numbers, lists and comments, and `+10`, a
    change of a condition, as 10.

    Args:
        name: of the option.
        text: what stands behind it on the command line.
        is_condition: whether it states a condition.
    """
    if is_condition:
        return text if "+" in text and text[:1] not in ("$", "@", "%") else None
    found = OPTIONS.get(name)
    if found is None or found.kind not in ("path", "paths", "text") or text[:1] in "$@%" and text:
        return None
    if is_absent(text) and text.strip() or found.kind != "path" and text[:1] in "[{('\"":
        return None
    return text if found.kind == "text" else os.path.expanduser(text)


def check_option(name: str, value: Any, default: Any = None) -> None:
    """Refuse a value that an option may not have; what is computed, and a component, pass.

    Raises:
        BundleError: naming the flag and what it may be.
    """
    computed = isinstance(value, str) and value[:1] in ("$", "@", "%")
    found = type_of(name, default)
    if found is None or computed or (isinstance(value, Mapping) and "_target_" in value):
        return
    if isinstance(value, (list, tuple)) and any(isinstance(one, str) and one[:1] in ("$", "@", "%") for one in value):
        return
    found.check(value, name)
    if name == "grid::spacing" and 0.0 in [float(one) for one in value]:
        raise BundleError(f"--{name} must be three steps other than 0, got {value}")


def check_sizes(config: Mapping[str, Any]) -> None:
    """Compare what one batch takes with the memory of this machine, before anything is allocated.

    Only what is surely too much is refused: the batch itself, in float32, without networks and gradients.

    Raises:
        BundleError: naming the flag.
    """
    memory, grid = physical_memory(), config.get("grid", {})
    shape = grid.get("shape") if isinstance(grid, Mapping) else None
    if memory is None or not isinstance(shape, (list, tuple)) or not all(isinstance(n, int) for n in shape):
        return
    voxels = math.prod(shape)
    if 4 * voxels > memory:
        raise BundleError(
            f"--grid::shape {list(shape)}: one volume takes {4 * voxels / 2**30:.0f} GiB and this machine has "
            f"{memory / 2**30:.0f} GiB of memory"
        )
    if not {"run_training", "train::trainer"} & set(references(config.get("run"))):
        return
    patch = config.get("patch_shape")
    sides = patch if isinstance(patch, (list, tuple)) else shape
    each = 4 * math.prod(int(n) for n in sides) // (512 if "latents_dir" in config else 1)
    batch = int(str(config.get("batch_size", 1)))
    if batch * each > memory:
        raise BundleError(
            f"--batch_size {batch}: its volumes alone take {batch * each / 2**30:.0f} GiB and this machine has "
            f"{memory / 2**30:.0f} GiB of memory"
        )


def physical_memory() -> int | None:
    """Bytes of memory of this machine; None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def check_disk(folder: str | os.PathLike, needed: float, flag: str, given: Any) -> None:
    """Compare what is to be written with what is free on the disk of a folder.

    Args:
        folder: where it goes; need not be there.
        needed: bytes, at the least.
        flag, given: the option that asks for so much, and its value.

    Raises:
        BundleError: if it does not fit.
    """
    there = next(parent for parent in (Path(folder).absolute(), *Path(folder).absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise BundleError(
            f"--{flag} {given} needs at least {needed / 1e9:.1f} GB in {folder}, whose disk has {free / 1e9:.1f} GB "
            "left: ask for fewer, or give another disk"
        )
