# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Starting a training from the weights of another: other conditions, and parts that stay as they are."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.networks.blocks.crossattention import CrossAttentionBlock
from torch import Tensor, nn

from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.paths import CONFIGS
from scripts.networks.weights import Checkpoint, load_network, read_checkpoint

logger = logging.getLogger(__name__)


def read_pretrained(path: str | None, stage: str) -> Checkpoint | None:
    """The weights to start a training from; None where it starts from random ones.

    Args:
        path: file that `scripts.networks.weights.read_checkpoint` reads, or None.
        stage: which network of a training checkpoint to take: `autoencoder` or `diffusion`.

    Raises:
        BundleError: if there is no such file, naming the nearest one beside it, or it is damaged.
    """
    if path is None:
        return None
    file = Path(str(path))
    if not file.is_file() and file.parent.is_dir():
        near = difflib.get_close_matches(file.name, [other.name for other in file.parent.iterdir()], 1)
        if near:
            raise BundleError(f"--pretrained {file}: there is no such file: did you mean {file.parent / near[0]}?")
    return read_checkpoint(file, stage)


def network_to_train(
    network: nn.Module,
    checkpoint: Checkpoint | None = None,
    load_old: Any = 0,
    device: torch.device | str = "cpu",
    frozen: Any = (),
    conditions: Conditions | None = None,
    trained_conditions: Any = None,
) -> nn.Module:
    """A network to train, on its device: as initialised, or fine-tuned from a checkpoint.

    Args:
        network: what to train, freshly built.
        checkpoint: weights to start from, or None.
        load_old: whether the file has the monai-generative package's names.
        device: where to move the network.
        frozen: patterns of the parts that keep their weights; see `freeze`.
        conditions: what a diffusion UNet is going to be conditioned on; None for an autoencoder.
        trained_conditions: what the checkpoint was conditioned on; see `fit_conditions`.

    Raises:
        BundleError: as `fit_conditions` and `freeze`, or if a new condition could not be learnt.
    """
    if checkpoint is not None and conditions is not None:
        fit_conditions(network, checkpoint, conditions, load_old, trained_conditions)
    elif checkpoint is not None:
        load_network(network, checkpoint, load_old)
    freeze(network, frozen)
    if checkpoint is not None and conditions:
        _check_reachable(network, conditions)
    return network.to(device).train()


# Conditions.


def fit_conditions(
    network: nn.Module, checkpoint: Checkpoint, conditions: Conditions, load_old: Any = 0, trained: Any = None
) -> nn.Module:
    """Load a diffusion UNet whose list of conditions differs from the one that its weights were trained with.

    Conditions enter the network of hybrid conditioning (Rombach et al. 2022) linearly: by one input channel each
    of the first convolution, and by one input each of the key and value projections of every cross-attention.
    Those columns of the weights are matched to the conditions by name:

    - a condition that both lists have keeps its columns, wherever it stands;
    - a new one has columns of zeros: at first the output is the old network's, whatever its value, as where
      InstructPix2Pix (Brooks et al. 2023) adds input channels. Gradients reach the convolution and the values;
      with one context token the keys of cross-attention have no effect, trained or not;
    - one that is no longer there loses its columns: the output is the old network's at the condition's minimum
      (0 normalised), and what the network knew of its effect is lost.

    Args:
        network: MONAI's `DiffusionModelUNet` for the new list: input channels are the latent's and then one a
            condition, `cross_attention_dim` is the number of conditions. Its weights are replaced.
        checkpoint: from `read_checkpoint`; its facts say what it was trained with, in order.
        conditions: the new list.
        load_old: whether the file has the monai-generative package's names.
        trained: the conditions of a file that says nothing of them, in the order of its channels: their names,
            or a map as `conditions` in the base configuration; None for those of the base configuration, which
            are the released weights'.

    Returns:
        The same network, in evaluation mode.

    Raises:
        BundleError: if the weights are of another model or number of conditions, or a condition's range differs:
            0 to 1 would then mean other raw values than the network has learnt. Also if either list is empty and the
            other is not: a network without conditions attends by other layers.
    """
    unstated = checkpoint.facts.get("conditions") is None and trained is None
    old = {} if unstated and not conditions else trained_with(checkpoint, trained)
    if bool(old) != bool(conditions):
        was, now = (", ".join(names) or "no conditions" for names in (list(old), [c.name for c in conditions]))
        raise BundleError(
            f"{checkpoint.path} was trained with {was}, now the model has {now}: a network without conditions has "
            "other layers, so that neither can start from the other's weights"
        )
    if not old:
        return load_network(network, checkpoint, load_old)
    _check_ranges(checkpoint, old, conditions)
    _check_number(checkpoint, list(old))
    layers = condition_layers(network, len(conditions))
    for layer, others in layers:
        layer.weight = nn.Parameter(_resized(layer.weight, others + len(old)))
    load_network(network, checkpoint, load_old)
    names, before = [condition.name for condition in conditions], list(old)
    with torch.no_grad():
        for layer, others in layers:
            layer.weight = nn.Parameter(_matched(layer.weight, others, before, names))
    _report(before, names)
    return network


def trained_with(checkpoint: Checkpoint, given: Any = None) -> dict[str, Mapping[str, Any]]:
    """The conditions that weights were trained with, in order: name -> range, as far as it is known.

    Args:
        checkpoint: its own facts come first.
        given: names or a map for a file that says nothing; None for the conditions of the base configuration.

    Raises:
        BundleError: if `given` is neither, or the file names others.
    """
    stated = checkpoint.facts.get("conditions")
    if stated is not None and not isinstance(stated, Mapping):
        raise BundleError(f"{checkpoint.path} names its conditions as {stated}, not as a map: it is damaged")
    if stated is None:
        return base_conditions() if given is None else _named(given)
    if given is not None and list(_named(given)) != list(stated):
        raise BundleError(
            f"{checkpoint.path} states that it was trained with {', '.join(stated)}: leave out --trained_conditions"
        )
    return dict(stated)


def base_conditions() -> dict[str, Mapping[str, Any]]:
    """The conditions of the base configuration as its file has them, before overlays and flags change them."""
    return _named(ConfigParser.load_config_file(CONFIGS / "inference.json")["conditions"])


def condition_layers(network: nn.Module, number: int) -> list[tuple[Any, int]]:
    """The layers whose last input columns are the conditions, each with the number of its other inputs.

    Raises:
        BundleError: if the network does not have hybrid conditioning on that number of conditions.
    """
    attentions = [module for module in network.modules() if isinstance(module, CrossAttentionBlock)]
    projections = [layer for attention in attentions for layer in (attention.to_k, attention.to_v)]
    first = getattr(getattr(network, "conv_in", None), "conv", None)
    if first is None or not projections or not number or {layer.in_features for layer in projections} != {number}:
        raise BundleError(
            f"only a UNet that is conditioned by concatenation and cross-attention can be fine-tuned to other "
            f"conditions, with cross_attention_dim {number} for {number} conditions, at least 1"
        )
    return [(first, first.in_channels - number), *((layer, 0) for layer in projections)]


def _named(given: Any) -> dict[str, Mapping[str, Any]]:
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",") if name.strip()]
    if isinstance(given, Mapping) and all(isinstance(v, Mapping) for k, v in given.items() if k != "_target_"):
        return {str(name): entry for name, entry in given.items() if name != "_target_"}
    if isinstance(given, Sequence) and given and all(isinstance(name, str) for name in given):
        return {name: {} for name in given}
    raise BundleError(f"--trained_conditions must be names, such as \"['sex','age']\", or a map of them, got {given}")


def _check_ranges(checkpoint: Checkpoint, old: Mapping[str, Mapping[str, Any]], conditions: Conditions) -> None:
    for c in conditions:
        entry = old.get(c.name, {})
        was = entry.get("minimum", c.minimum), entry.get("maximum", c.maximum)
        if was != (c.minimum, c.maximum):
            raise BundleError(
                f"{checkpoint.path} was trained with {c.name} from {was[0]:g} to {was[1]:g}, now it is {c.in_words()}: "
                f"keep the range (values outside it are allowed), or rename the condition to learn it anew"
            )


def _check_number(checkpoint: Checkpoint, old: Sequence[str]) -> None:
    widths = {tensor.shape[-1] for name, tensor in checkpoint.state.items() if name.endswith("attn2.to_v.weight")}
    if len(widths) == 1 and widths != {len(old)}:
        raise BundleError(
            f"{checkpoint.path} has {widths.pop()} conditions, but is taken to be trained with {len(old)} "
            f"({', '.join(old)}): say which they are, in order: --trained_conditions \"['sex','age']\""
        )


def _resized(weight: Tensor, inputs: int) -> Tensor:
    return weight.new_zeros(weight.shape[0], inputs, *weight.shape[2:])


def _matched(weight: Tensor, others: int, old: Sequence[str], new: Sequence[str]) -> Tensor:
    """Weights (outputs, others + conditions, ...) for the new list of conditions from those for the old."""
    matched = _resized(weight, others + len(new))
    matched[:, :others] = weight[:, :others]
    for column, name in enumerate(new, others):
        if name in old:
            matched[:, column] = weight[:, others + old.index(name)]
    return matched


def _report(old: Sequence[str], new: Sequence[str]) -> None:
    for name in new:
        if name not in old:
            logger.info(f"the condition '{name}' is new: the network starts out without any effect of it")
    for name in old:
        if name not in new:
            logger.warning(
                f"the condition '{name}' is dropped and what was learnt of it is lost: "
                "the network starts out as if it always were at its minimum"
            )


def _check_reachable(network: nn.Module, conditions: Conditions) -> None:
    layers = [layer for layer, _ in condition_layers(network, len(conditions))]
    if any(layer.weight.requires_grad for layer in layers):
        return
    effects = torch.stack(
        [layer.weight[:, -len(conditions) :].abs().transpose(0, 1).flatten(1).amax(1) for layer in layers]
    )
    silent = [c.name for c, effect in zip(conditions, effects.amax(0).tolist(), strict=True) if effect == 0.0]
    if silent:
        raise BundleError(
            f"--freeze holds all layers that see the new condition {', '.join(silent)}, which could not be learnt: "
            "leave conv_in or *.attn2.to_v.* out of it"
        )


# Parts that stay as they are.


def freeze(network: nn.Module, patterns: Any = ()) -> nn.Module:
    """Let the parameters that match a pattern keep their values in training.

    Args:
        network: whose parameters; `requires_grad` is set to False.
        patterns: one or a list, or text with commas between them, as in file names (`*`, `?`): of names of
            parameters, such as `*.attn1.*`, or of modules with all that they hold, such as `encoder`.

    Returns:
        The same network.

    Raises:
        BundleError: if a pattern matches nothing, or all would be frozen.
    """
    names = [name for name, _ in network.named_parameters()]
    chosen: set[str] = set()
    for pattern in _patterns(patterns):
        matching = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not matching:
            raise BundleError(f"--freeze '{pattern}' matches no weight of the network{_near(pattern, network)}")
        chosen.update(matching)
    if chosen and chosen == set(names):
        raise BundleError("--freeze matches every weight of the network: nothing would be left to train")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in chosen)
    return network


def trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network that are not frozen, for its optimiser; logs how many weights they are."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    counts = [sum(parameter.numel() for parameter in some) for some in (trained, network.parameters())]
    logger.info(f"training {counts[0]:,} of {counts[1]:,} weights of the {type(network).__name__}")
    return trained


def _patterns(given: Any) -> list[str]:
    given = given.split(",") if isinstance(given, str) else given or []
    if not isinstance(given, Sequence) or not all(isinstance(pattern, str) for pattern in given):
        raise BundleError(f"--freeze must be a pattern or a list of them, such as \"['encoder.*']\", got {given}")
    return [pattern.strip() for pattern in given if pattern.strip()]


def _near(pattern: str, network: nn.Module) -> str:
    names = [name for name, _ in (*network.named_modules(), *network.named_parameters()) if name]
    near = difflib.get_close_matches(pattern.rstrip("*").rstrip("."), names, 2)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"{hint}; its parts are {', '.join(name for name, _ in network.named_children())}"
