# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading network weights from files, strictly."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar as numpy_scalar
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import file_hash, parse_json, replacing
from scripts.core.options import range_in_words, yes_or_no

logger = logging.getLogger(__name__)

FACTS = "facts"
LATENT_DIFFUSION = "latent_diffusion"  # the family of all weights that do not state theirs
NESTS = ("state_dict", "model")  # where other trainers put the weights: PyTorch Lightning, timm and the like
ENCODER = ("encoder.", "quant_conv_")  # what an autoencoder's parts that make latents are called
PREFIX = "module."  # which torch.nn.parallel.DistributedDataParallel puts before each name
LATENT_SCALES = (1e-6, 1e6)
LARGEST = 1e8  # a weight beyond is damage: those of trained networks stay below 1e4
CHECKSUM = "weights_sha256"  # of the tensors, in the metadata of safetensors files, whose format has none
NUMPY_SCALARS: list[Any] = [
    *((numpy_scalar, f"{module}.multiarray.scalar") for module in ("numpy._core", "numpy.core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
]
"""What a checkpoint may hold beside tensors: numbers as NumPy has them, such as a loss or a step."""
ALIGNMENT = 64  # bytes, of PyTorch's own memory: products of matrices may round otherwise where it is less
LARGE = 2**20  # bytes of a weight above which a convolution brings it into an order of its own before it computes
WAYS_OUT = (
    "download the released weights with `python -m scripts weights`, "
    "or use the small model that ships with the bundle, `python -m scripts sample --with demo` "
    "(--config_file \"['configs/inference.json','configs/demo.yaml']\"); "
    "networks of other sizes, such as tiny.yaml's, need weights of a training of their own"
)
WAYS_OUT_OF = {"generator": "train one with `python -m scripts train gan`, and give its --generator_path"}
"""Of networks of which no weights ship."""


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds.

    Attributes:
        path: the file.
        state: state dict of one network, on the CPU.
        facts: plain data that training stored with it: `latent_scale`, `conditions` and so on; empty
            for the released weights.
        sha256: of the file's bytes.
        mapped: whether the tensors are pages of the file, in memory once they are used, and all float32.
        stamp: of the file when it was read; see `file_stamp`.
    """

    path: Path
    state: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    mapped: bool = False
    stamp: tuple[int, ...] = ()

    @property
    def identity(self) -> dict[str, str]:
        """Which file it is, for records: `file`, its name, and `sha256`."""
        return {"file": self.path.name, "sha256": self.sha256}

    @property
    def latent_scale(self) -> float:
        """Factor between the autoencoder's latents and those that the diffusion model saw; 1 if none was stored."""
        scale = self.facts.get("latent_scale", 1.0)
        if not is_latent_scale(scale):
            low, high = LATENT_SCALES
            raise BundleError(
                f"{self.path} holds a latent scale of {scale}, not a number from {low:g} to {high:g}: it is damaged"
            )
        return float(scale)


def is_latent_scale(value: Any) -> bool:
    """Whether a value can be one over the standard deviation of latents."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and LATENT_SCALES[0] <= value <= LATENT_SCALES[1]


def read_checkpoint(path: str | os.PathLike, network: str, family: str | None = None) -> Checkpoint:
    """Read a state dict from a `.pt`, `.pth` or `.safetensors` file without running any code in it.

    Args:
        path: a bare state dict, one under `state_dict` or `model`, or a training checkpoint of this bundle.
            Where that has averaged weights, such as `diffusion_ema`, they are taken. A prefix `module.` of all names
            is removed.
        network: which network of a training checkpoint to take: `autoencoder`, `diffusion` or `generator`.
        family: the one that it must be of, by its name in `families`; None takes any.

    Raises:
        BundleError: if the file is missing, truncated, holds code or is no checkpoint of that network, or of another
            family.
    """
    path = Path(str(path))
    if not path.is_file():
        raise BundleError(f"no weights of the {network} at {path}: {WAYS_OUT_OF.get(network, WAYS_OUT)}")
    stamp = file_stamp(path)
    state, facts = read_state(path, network, family=family)
    mapped = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
    mapped = mapped and all(tensor.dtype == torch.float32 for tensor in state.values())
    return Checkpoint(path, state, facts, file_hash(path), mapped, stamp)


def read_state(
    path: Path,
    network: str,
    say: Callable[[str], None] = logger.info,
    family: str | None = None,
    check: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and facts of `read_checkpoint`, without the hash, for which the whole file is read.

    Args:
        path, network, family: as there.
        say: is told what was chosen.
        check: whether to compare checksums and look at the values, which reads every weight. Without it, those of a
            file that is mapped are read when they are used.

    Raises:
        BundleError: as `read_checkpoint`.
    """
    content, facts = (_read_safetensors if path.suffix == ".safetensors" else _read_torch)(path, check)
    facts = content.get(FACTS, facts)
    if family is not None and isinstance(facts, Mapping):
        check_family(path, facts, family)
    state = _without_prefix(_find_state(content, network, path, say), path, say)
    if not _is_state_dict(state) or not isinstance(facts, Mapping):
        parts = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise BundleError(f"{path} holds no weights of the {network}: it holds {parts}")
    if check:
        check_values(path, state)
    return dict(state), dict(facts)


@torch.no_grad()
def check_values(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that cannot be those of a trained network: NaN, infinite, enormous or complex ones.

    Raises:
        BundleError: naming the file and the first such weight.
    """
    for name, tensor in state.items():
        if tensor.is_complex():
            raise BundleError(f"{path} is damaged or no file of weights: its {name} is {tensor.dtype}")
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = (float(value) for value in tensor.float().aminmax())
        if not (-LARGEST <= low and high <= LARGEST):
            raise BundleError(f"{path} is damaged: its {name} holds {low:g} to {high:g}; copy or download it again")


def file_stamp(path: str | os.PathLike) -> tuple[int, ...]:
    """Device, inode, size and time of the last change: another one, another content."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _find_state(content: Mapping[str, Any], network: str, path: Path, say: Callable[[str], None]) -> Any:
    average = content.get(f"{network}_ema")
    if isinstance(average, Mapping) and "weights" in average:
        say(f"{path}: took the average of the weights over the training")
        return average["weights"]
    if network in content:
        return content[network]
    nest = next((name for name in NESTS if isinstance(content.get(name), Mapping)), None)
    if nest is None:
        return content
    say(f"{path}: took the weights under '{nest}'")
    return content[nest]


def _without_prefix(state: Any, path: Path, say: Callable[[str], None]) -> Any:
    if not _is_state_dict(state) or not all(name.startswith(PREFIX) for name in state):
        return state
    say(f"{path}: left out the prefix '{PREFIX}' of the weights' names")
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def _is_state_dict(state: Any) -> bool:
    if not isinstance(state, Mapping) or not state:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())


def encoder_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of what an autoencoder's latents depend on: the weights of its encoder, in hexadecimal.

    The file's format, names and order of the weights do not change it, nor does rounding to float16 as in files that
    ship, nor a decoder that was trained on.

    Args:
        state: of an `AutoencoderKL`, of MONAI core or of monai-generative. Of a network without such parts, all counts.
    """
    parts = [tensor for name, tensor in state.items() if name.startswith(ENCODER)] or list(state.values())
    digests = [hashlib.sha256(part.detach().cpu().half().contiguous().numpy().tobytes()).digest() for part in parts]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _read_safetensors(path: Path, check: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            stated = file.metadata() or {}
            facts = parse_json(stated.get(FACTS, "{}"))
            content = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"{path} is damaged or no safetensors file ({error}): copy or download it again") from error
    if check and CHECKSUM in stated and stated[CHECKSUM] != _tensors_sha256(content):
        raise BundleError(f"{path} is damaged: its weights have another checksum than it states; copy it again")
    return content, facts


def _tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)  # not copied
    return digest.hexdigest()


def check_zip(path: Path) -> None:
    """Compare the checksums of the parts of a file that `torch.save` wrote, which PyTorch does not do.

    Raises:
        BundleError: if one is another.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except Exception as error:  # damaged bytes can fail anywhere in zipfile
        raise BundleError(f"{path} is damaged or cut short: copy or download it again") from error
    if bad is not None:
        raise BundleError(f"{path} is damaged: the checksum of its part {bad} is wrong; copy or download it again")


def _read_torch(path: Path, check: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    if check:
        check_zip(path)
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            raise BundleError(
                f"{path} holds Python code besides weights, which could do anything when run, so it was not "
                f"loaded: ask for a plain state dict or a safetensors file"
            ) from error
        raise BundleError(f"{path} is damaged or no PyTorch file: copy or download it again") from error
    except Exception as error:  # bytes that are no checkpoint can fail anywhere in PyTorch's reader
        raise BundleError(f"{path} is damaged or cut short: copy or download it again") from error
    if not isinstance(content, Mapping):
        raise BundleError(f"{path} holds a {type(content).__name__}, not a state dict")
    return dict(content), {}


def write_safetensors(
    path: str | os.PathLike, checkpoint: str | os.PathLike, network: str, dtype: str = "float16"
) -> None:
    """Take one network out of a training checkpoint, small enough to ship; its facts go into the metadata.

    Args:
        path: the safetensors file to write.
        checkpoint: what `train_autoencoder` or `train_diffusion` saved.
        network: `autoencoder`, `diffusion` or `generator`.
        dtype: of the stored weights, `float16` or `float32`.

    Raises:
        BundleError: as `read_checkpoint`, or if the file cannot be written.
    """
    source = read_checkpoint(checkpoint, network)
    state = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in source.state.items()}
    with replacing(path) as temporary:
        save_file(state, temporary, {FACTS: json.dumps(source.facts), CHECKSUM: _tensors_sha256(state)})


def load_network(
    network: nn.Module,
    checkpoint: Checkpoint,
    load_old: Any = 0,
    device: torch.device | str = "cpu",
    conditions: Conditions | None = None,
    take: bool = False,
) -> nn.Module:
    """Put a checkpoint's weights into a network, every one of them, and set it to evaluation mode.

    Args:
        network: MONAI core's `AutoencoderKL` or `DiffusionModelUNet`, or any module where `load_old` is 0.
        checkpoint: from `read_checkpoint`.
        load_old: 1 if the file has the names of the separate monai-generative package (as the released
            weights do), 0 if it has the names of MONAI core. A file of MONAI core's names is taken with 1 too.
        device: where to move the network.
        conditions: what the network is going to be conditioned on; compared with what the checkpoint
            says it was trained with, where it says so.
        take: let the network have the checkpoint's tensors themselves, where that makes no difference to its output,
            in the place of copies; nothing is left in the checkpoint's `state`.

    Returns:
        The same network.

    Raises:
        BundleError: if any weight is missing, left over, or of another shape, or the conditions differ.
    """
    check_conditions(checkpoint, conditions)
    wanted = network.state_dict()
    if yes_or_no(load_old, "load_old") and set(checkpoint.state) != set(wanted):
        given = _renamed(network, checkpoint, wanted)
    else:
        given = _of_same_names(checkpoint, wanted, hasattr(network, "load_old_state_dict"))
    _check_shapes(checkpoint, given, wanted)
    if take:
        checkpoint.state.clear()
        given = {name: _taken(tensor, wanted[name]) for name, tensor in given.items()}
    network.load_state_dict(given, strict=True, assign=take)
    return network.to(device).eval()


@torch.no_grad()
def _taken(given: Tensor, own: Tensor) -> Tensor:
    same = (given.dtype, given.device) == (own.dtype, own.device) and given.is_contiguous()
    reordered = given.dim() > 2 and given.nbytes >= LARGE
    return given if same and (reordered or is_aligned(given)) else own.copy_(given)


def is_aligned(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory as PyTorch's own do."""
    return tensor.data_ptr() % ALIGNMENT == 0


def check_family(path: Path, facts: Mapping[str, Any], family: str) -> None:
    """Refuse weights of another family. Those whose facts state none are of latent diffusion.

    Of a file without any facts, such as released weights, nothing is known: names and shapes of its weights decide.

    Raises:
        BundleError: naming the flag to give.
    """
    if not facts:
        return
    stated = facts.get("family", LATENT_DIFFUSION)
    if stated != family:
        raise BundleError(f"{path} is of the family {stated}, not {family}: give --family {stated}")


def check_conditions(checkpoint: Checkpoint, conditions: Conditions | None) -> None:
    """Refuse weights whose facts say that they were trained with other conditions.

    Raises:
        BundleError: naming what differs: names, order or ranges; or if the facts are damaged.
    """
    trained = checkpoint.facts.get("conditions")
    if conditions is None or trained is None:
        return
    entries = trained.values() if isinstance(trained, Mapping) else [trained]
    if not all(isinstance(entry, Mapping) and {"minimum", "maximum"} <= set(entry) for entry in entries):
        raise BundleError(f"{checkpoint.path} states its conditions as {trained}, not as ranges: it is damaged")
    configured = conditions.as_dict()
    if list(trained.items()) != list(configured.items()):
        difference = _other_names(list(trained), list(configured)) or _other_entries(trained, configured)
        raise BundleError(f"{checkpoint.path} was trained with {difference}")


def _other_names(trained: Sequence[str], configured: Sequence[str]) -> str:
    """How the names of conditions, or their order, differ, and what to do; empty if they do not."""
    new = ", ".join(name for name in configured if name not in trained)
    gone = ", ".join(name for name in trained if name not in configured)
    found = [f"{verb} {names}" for verb, names in (("is also", new), ("lacks", gone)) if names]
    ways = [f"{verb} {names}" for verb, names in (("leave out", new), ("give", gone)) if names]
    if not found and list(trained) != list(configured):
        found, ways = [f"in the order {', '.join(configured)}"], ["give them in the first order"]
    names = ", ".join(trained) or "no conditions"
    told = f"{names}; configured {' and '.join(found)}: {' and '.join(ways)} in `conditions`"
    return told + (", or fine-tune with --with finetune" if trained and configured else "") if found else ""


def _other_entries(trained: Mapping[str, Any], configured: Mapping[str, Any]) -> str:
    """How entries of the same names differ, and what to do."""
    differing = [name for name in configured if trained[name] != configured[name]]
    were, are = (", ".join(f"{name} ({_entry(of[name])})" for name in differing) for of in (trained, configured))
    ranges_alone = all({**trained[name], **_ends(configured[name])} == configured[name] for name in differing)
    hint = "; ranges that were learned from a dataset are in its conditions.json, for --with" if ranges_alone else ""
    return f"{were}; configured is {are}: give them as they were{hint}"


def _ends(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {end: entry[end] for end in ("minimum", "maximum")}


def _entry(entry: Mapping[str, Any]) -> str:
    return f"{entry.get('raw')}, {range_in_words(entry['minimum'], entry['maximum'], entry.get('unit', ''))}"


def _of_same_names(checkpoint: Checkpoint, wanted: Mapping[str, Tensor], has_old: bool) -> dict[str, Tensor]:
    missing = sorted(set(wanted) - set(checkpoint.state))
    unexpected = sorted(set(checkpoint.state) - set(wanted))
    if missing or unexpected:
        hint = "; if it comes from the monai-generative package, use --load_old 1" if has_old else ""
        _refuse(checkpoint, missing, unexpected, hint)
    return dict(checkpoint.state)


class _Renaming:
    """Stands in for a network in MONAI's conversion of old names: keeps what it would load."""

    def __init__(self, own: Mapping[str, Tensor]) -> None:
        self.own, self.given = own, dict(own)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.own)

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        self.given.update(state)


def _renamed(network: nn.Module, checkpoint: Checkpoint, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # MONAI's conversion drops projections, and leaves weights as they were, without an error. What it leaves in the
    # dict was dropped; what is the network's own afterwards was not loaded.
    left, renaming = dict(checkpoint.state), _Renaming(wanted)
    try:
        with redirect_stdout(StringIO()):
            type(network).load_old_state_dict(renaming, left)  # type: ignore[attr-defined]
    except KeyError as error:
        _refuse(checkpoint, [str(error.args[0])], [])
    given = renaming.given
    missing = [name for name in wanted if given[name] is wanted[name]]
    unexpected = [name for name in left if left[name] is not given.get(name)] + list(set(given) - set(wanted))
    if missing or unexpected:
        _refuse(checkpoint, missing, sorted(unexpected))
    return given


def _check_shapes(checkpoint: Checkpoint, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in given.items():
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise BundleError(
                f"{checkpoint.path} is damaged or of another model: its {name} is {tensor.dtype}, the configured "
                f"network's is {wanted[name].dtype}"
            )
        if tensor.shape != wanted[name].shape:
            raise BundleError(
                f"{checkpoint.path} is of another model: its {name} is {tuple(tensor.shape)}, "
                f"the configured network's is {tuple(wanted[name].shape)}"
            )


def _refuse(checkpoint: Checkpoint, missing: list[str], unexpected: list[str], hint: str = "") -> None:
    counts = [
        f"{len(names)} {kind} ({names[0]} ...)"
        for names, kind in ((missing, "weights missing"), (unexpected, "not in the network"))
        if names
    ]
    raise BundleError(f"{checkpoint.path} is of another model than the configured one: {', '.join(counts)}{hint}")
