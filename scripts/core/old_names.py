# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The names of version 2.0.0, when all modules lay in one folder: saved configurations and programs have them.

`import scripts.samplers`, `from scripts.samplers import DDIMSampler`, the path `scripts.samplers.DDIMSampler` in a
configuration and `python -m scripts.demo_training` go on working, give the very objects of the new modules, and warn.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

from scripts.core.errors import BundleError

PACKAGE = "scripts"
OLD_NAMES: dict[str, tuple[str, ...]] = {
    "acceleration": ("networks.cpu.acceleration",),
    "adapters": ("networks.adapters",),
    "atomic": ("core.files",),
    "autoencoder_training": ("autoencoder.training",),
    "autoencoder_validation": ("autoencoder.validation",),
    "bias_field": ("preparation.optional_steps",),
    "bootstrap": ("core.bootstrap",),
    "brain_age": ("measuring.brain_age",),
    "check_step": ("preparation.checks",),
    "checkpointing": ("training.checkpointing",),
    "checkpoints": ("networks.weights",),
    "condition_ranges": ("conditions.ranges",),
    "conditions": ("conditions.conditions",),
    "convolution": ("networks.cpu.convolution",),
    "correlation": ("core.correlation",),
    "covariate_volumes": ("preparation.covariate_volumes",),
    "covariates": ("preparation.covariates",),
    "curves": ("tools.curves",),
    "datasets": ("volumes.datasets",),
    "deformation": ("phantoms.deformation",),
    "demo_training": ("tools.demo_training",),
    "devices": ("compute.devices",),
    "diffusion_training": ("diffusion.training",),
    "diffusion_validation": ("diffusion.validation",),
    "distributed": ("compute.processes",),
    "ema": ("training.ema",),
    "encoding": ("autoencoder.encoding",),
    "errors": ("core.errors",),
    "evaluation": ("evaluation.run",),
    "example_data": ("tools.example_data",),
    "exclusions": ("preparation.exclusions",),
    "exported": ("sampling.exported",),
    "exporting": ("sampling.exporting", "sampling.family"),
    "figures": ("volumes.pictures",),
    "finetuning": (
        "training.finetuning",
        "diffusion.finetuning",
    ),
    "grid": ("volumes.grid",),
    "guidance": ("diffusion.guidance",),
    "head_size": ("volumes.head_size",),
    "health": ("training.health",),
    "html_report": ("evaluation.page",),
    "hybrid": ("diffusion.denoiser",),
    "latent_writer": ("autoencoder.latent_writer",),
    "latents": ("autoencoder.latents",),
    "measured_volumes": ("measuring.measured", "evaluation.segmentations"),
    "measures": ("evaluation.measures", "core.inputs"),
    "memory": ("networks.cpu.memory",),
    "metrics": ("evaluation.metrics",),
    "metrics.alignment": ("evaluation.metrics.alignment",),
    "metrics.brain_age": ("evaluation.metrics.predicted_age",),
    "metrics.copies": ("evaluation.metrics.copies",),
    "metrics.feature_distance": ("evaluation.metrics.feature_distance",),
    "metrics.features": ("evaluation.metrics.features", "compute.processes"),
    "metrics.fid": ("evaluation.metrics.fid",),
    "metrics.four_g_r_ssim": ("evaluation.metrics.four_g_r_ssim",),
    "metrics.highres3dnet": ("evaluation.metrics.highres3dnet",),
    "metrics.inception": ("evaluation.metrics.inception",),
    "metrics.kid": ("evaluation.metrics.kid",),
    "metrics.medicalnet": ("evaluation.metrics.medicalnet",),
    "metrics.ms_ssim": ("evaluation.metrics.ms_ssim",),
    "metrics.privacy": ("evaluation.metrics.privacy",),
    "metrics.volumetry": (
        "evaluation.metrics.volumetry",
        "evaluation.segmentations",
        "volumes.labels",
        "evaluation.stated_conditions",
    ),
    "multistep": ("diffusion.multistep",),
    "native_space": ("preparation.native_space",),
    "objective": ("diffusion.objective",),
    "optimisation": ("training.optimisation",),
    "optional_steps": ("preparation.optional_steps",),
    "options": ("core.options",),
    "outlines": ("measuring.outlines",),
    "overlap": ("evaluation.overlap",),
    "packages": ("core.wheels", "core.files"),
    "pairs": ("evaluation.pairs",),
    "paper_figures": ("sampling.paper_figures",),
    "patching": ("networks.patching",),
    "perceptual": ("autoencoder.perceptual",),
    "perceptual_weights": ("tools.perceptual_weights",),
    "phantom_covariates": ("phantoms.population",),
    "phantom_dataset": ("phantoms.dataset",),
    "phantom_heads": ("phantoms.heads", "volumes.labels"),
    "phantom_labels": ("tools.phantom_labels",),
    "phantom_looks": ("phantoms.looks",),
    "phantom_shapes": ("phantoms.shapes",),
    "phantoms": ("phantoms.making",),
    "potential_flow": ("phantoms.potential_flow",),
    "precision": ("compute.precision",),
    "preparation": ("preparation.run",),
    "preparation_steps": ("preparation.steps",),
    "prepared_dataset": ("preparation.prepared_dataset",),
    "prepared_scan": (
        "preparation.prepared_scan",
        "volumes.nifti",
    ),
    "process_pool": ("compute.pool",),
    "programs": ("core.programs", "volumes.scans"),
    "progress": ("training.progress",),
    "quality_page": ("preparation.quality_page",),
    "quality_pictures": ("preparation.quality_pictures",),
    "reconstruction": ("evaluation.reconstruction",),
    "registration": ("preparation.registration",),
    "repeatable": ("training.repeatable",),
    "report": ("evaluation.report",),
    "report_pictures": ("evaluation.report_pictures",),
    "requests": ("sampling.requests",),
    "samplers": ("diffusion.samplers",),
    "samples": ("evaluation.samples",),
    "sampling": ("sampling.saving",),
    "scan_checks": ("preparation.checks",),
    "scan_sources": ("preparation.sources",),
    "scans": ("volumes.scans",),
    "schedules": ("diffusion.schedules",),
    "segmentation": ("measuring.tools", "evaluation.segmentations"),
    "segmenter": ("measuring.segmenter",),
    "segmenter_agreement": ("tools.segmenter_agreement",),
    "segmenter_training": ("measuring.segmenter_training",),
    "skull_stripping": ("preparation.skull_stripping",),
    "slabs": ("networks.cpu.slabs",),
    "streaming": ("networks.cpu.streaming",),
    "synthstrip": ("preparation.synthstrip",),
    "tables": ("core.tables",),
    "tracking": ("training.tracking",),
    "training": ("training.engine",),
    "unires": ("preparation.optional_steps",),
    "validation": ("training.validation",),
    "values": ("compute.kept",),
    "volume_folders": ("volumes.folders",),
    "volumes": ("volumes.nifti",),
    "volumetry": ("tools.registration_volumetry",),
    "warping": ("preparation.warping",),
    "workflow": ("core.config",),
    "writing": ("compute.writer",),
}
"""Module of version 2.0.0 -> the modules that hold what was in it, the first of them its successor."""
RENAMED: dict[str, str] = {
    "covariate_volumes.Volumetry": "preparation.covariate_volumes.VolumeMethod",
    "covariate_volumes.normalised": "preparation.covariate_volumes.normalised_for_head_size",
    "covariates.Covariates": "preparation.covariates.CovariateReader",
    "encoding.Volumes": "autoencoder.encoding.VolumesToEncode",
    "phantom_heads.onto_grid": "volumes.datasets.read_on_grid",
    "phantom_shapes.Target": "phantoms.shapes.PhantomTarget",
    "prepared_dataset.Scan": "preparation.prepared_dataset.ScanToPrepare",
    "scan_checks.Pose": "preparation.checks.PoseCorrelations",
    "segmentation.Segmenter": "measuring.tools.SegmentationTool",
    "checkpoints.file_sha256": "core.files.file_hash",
    "training.arranged": "training.engine.prepare_for_training",
    "brain_age.aged_participants": "measuring.brain_age.read_ages",
    "diffusion_validation.sampled": "training.ema.network_to_sample",
}
"""Attribute of a module of version 2.0.0 -> its name now, where that is another one."""
REPLACED: dict[str, str] = {
    "autoencoder_training.AutoencoderStep": "autoencoder.training.AdversarialLoss",
    "brain_age.BrainAgeStep": "measuring.brain_age.BrainAgeLoss",
    "diffusion_training.DiffusionStep": "diffusion.training.DenoisingLoss",
    "segmenter_training.SegmenterStep": "measuring.segmenter_training.SegmenterLoss",
    "exporting.export_record": "sampling.exporting.export_networks",
    "hybrid.LatentDiffusionSampler": "sampling.latent_diffusion.LatentDiffusion",
    "sampling.sampling_facts": "sampling.latent_diffusion.LatentDiffusion",
}
"""Attribute of a module of version 2.0.0 that is no more -> what does its work now, from other arguments."""
IDS: dict[str, str] = {
    **dict.fromkeys(("train_autoencoder", "train_diffusion", "brain_age", "segmenter"), "trained"),
    "latents": "participants",
    **{f"validate::{old}": "validate::held_out" for old in ("loss", "reconstruction", "ages", "volumes")},
    "validate::samples": "validate::figure",
    "train::generator_step": "train::optimisation",
    "train::discriminator_step": "train::discriminator_optimisation",
    **{
        f"inferer::{part}": f"families::latent_diffusion::{part}"
        for part in ("hybrid", "sampler", "autoencoder", "latent_scale", "guidance", "release", "decoder_amp")
    },
}
"""Id of a configuration of version 2.0.0 -> the id that took its place."""
ROOMS = {new.split(".")[0] for names in OLD_NAMES.values() for new in names}


class OldNames(MetaPathFinder, Loader):
    """Finds the modules of `OLD_NAMES` that have not become rooms.

    A module that is found so has nothing of its own: its attributes are looked up in its successors.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib`: the specification of an old module, None for every other."""
        package, _, old = fullname.partition(".")
        if package != PACKAGE or old not in OLD_NAMES or old in ROOMS:
            return None
        successor = find_spec(f"{PACKAGE}.{OLD_NAMES[old][0]}")
        return ModuleSpec(
            fullname,
            self,
            origin=successor.origin if successor else None,
            is_package=any(other.startswith(f"{old}.") for other in OLD_NAMES),
        )

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib`: lets an old module look its attributes up."""
        old = module.__name__.partition(".")[2]
        _warn(module.__name__, [f"{PACKAGE}.{new}" for new in OLD_NAMES[old]])
        setattr(module, "__getattr__", lambda name: _found(old, name)[1])  # noqa: B010 # mypy knows it as a method
        setattr(module, "__dir__", lambda: _names(old))  # noqa: B010 # `python -m fire` looks here

    def get_code(self, fullname: str) -> CodeType | None:
        """See `importlib`: what `python -m` runs, the successor's code."""
        new = f"{PACKAGE}.{OLD_NAMES[fullname.partition('.')[2]][0]}"
        _warn(fullname, [new])
        spec = find_spec(new)
        loader: Any = spec.loader if spec else None
        return loader.get_code(new) if loader else None


def new_id(name: str) -> str | None:
    """The id that took the place of one of version 2.0.0, or of what it is within; None if there is none."""
    for old, new in IDS.items():
        if f"{name}::".startswith(f"{old}::"):
            return new + name[len(old) :]
    return None


def install() -> None:
    """Let the import system know the old names; once is enough."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, OldNames())

    def old_module(name: str) -> ModuleType:
        if name in OLD_NAMES:
            return import_module(f"{PACKAGE}.{name}")
        raise AttributeError(f"module '{PACKAGE}' has no attribute '{name}'")

    _set_getattr(PACKAGE, old_module)


def keep_old_attributes(room: str) -> None:
    """Let a room that has the name of an old module give what was in that module.

    Args:
        room: `__name__` of the room.
    """
    old = room.partition(".")[2]

    def old_attribute(name: str) -> Any:
        if name.startswith("__") or find_spec(f"{room}.{name}") is not None:  # a module of the room is no attribute yet
            raise AttributeError(f"module '{room}' has no attribute '{name}'")
        new, found = _found(old, name)
        _warn(f"{room}.{name}", [new])
        return found

    _set_getattr(room, old_attribute)


def _set_getattr(module: str, function: Callable[[str], Any]) -> None:
    """PEP 562, out of sight of type checkers, which would take every name for one that the module has."""
    setattr(sys.modules[module], "__getattr__", function)  # noqa: B010


def _names(old: str) -> list[str]:
    """What `dir` shows of an old module: the public names of its successors."""
    return sorted({name for new in OLD_NAMES[old] for name in dir(import_module(f"{PACKAGE}.{new}")) if name[0] != "_"})


def _found(old: str, name: str) -> tuple[str, Any]:
    """The new dotted name of an attribute of an old module, and the attribute."""
    path = f"{old}.{name}"
    if path in REPLACED:
        raise BundleError(
            f"{PACKAGE}.{path} of version 2.0.0 is no more: {PACKAGE}.{REPLACED[path]} does its work, from other "
            "arguments; start from the configurations of this version"
        )
    if path in RENAMED:
        home, _, renamed = RENAMED[path].rpartition(".")
        return f"{PACKAGE}.{RENAMED[path]}", getattr(import_module(f"{PACKAGE}.{home}"), renamed)
    homes = [] if name.startswith("__") else [f"{PACKAGE}.{new}" for new in OLD_NAMES[old]]
    for home in homes:
        module = import_module(home)
        if hasattr(module, name):
            return f"{home}.{name}", getattr(module, name)
    raise AttributeError(f"module '{PACKAGE}.{old}' has no attribute '{name}'")


def _warn(old: str, new: Sequence[str]) -> None:
    """Warn where the old name stands: of the callers, the first that is neither here nor in `importlib`."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or "importlib" in frame.f_code.co_filename
    ):
        frame, level = frame.f_back, level + ("importlib._bootstrap" not in frame.f_code.co_filename)
    warnings.warn(f"{old} is now {' and '.join(new)}: name that instead", DeprecationWarning, stacklevel=level)
