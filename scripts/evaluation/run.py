# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The verb `evaluate`: measures of real and synthetic volumes, and their report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from scripts.compute.devices import process_rank
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, write_text
from scripts.core.inputs import Input
from scripts.evaluation.measures import Measure, check_entries
from scripts.evaluation.metrics.features import FeatureSet
from scripts.evaluation.overlap import check_overlap
from scripts.evaluation.page import PAGE, html
from scripts.evaluation.report import Measured, Report, left_by_earlier, remove, write_report
from scripts.evaluation.samples import Samples

logger = logging.getLogger(__name__)


def evaluate(
    metrics: Mapping[str, Measure | Callable[..., Measure]],
    samples: Samples,
    output_dir: str,
    flags: Mapping[str, Any] | None = None,
) -> None:
    """Compute the measures whose inputs were given, and write the report when all are done.

    Writes `evaluation.json`, `evaluation.tsv` with one row a metric, `evaluation.html`, `table_1.tsv` with one row a
    model, and the tables and pictures of the single measures. A measure that lacks an input is in the report as not
    requested. Tables and pictures that an earlier evaluation has left in the folder, and that this one does not make,
    are removed. Under torchrun all processes share what measures prepare; the first one does the rest.

    Args:
        metrics: name -> measure, or a function (also a subclass of `Measure`) that makes one of the `synthetic`
            volumes: this is measured for each model.
        samples: the models' volumes.
        output_dir: where to write.
        flags: what was asked for, for the report.

    Raises:
        BundleError: if no measure has its inputs, or what a measure raises.
    """
    if not metrics:
        raise BundleError("--metrics has no entries: leave it out, or give it some")
    check_entries("metrics", metrics)
    measures = _for_each_model(metrics, samples)
    wanted = [entry for entry in measures.values() if not entry.measure.missing_flags()]
    if not wanted:
        raise BundleError(f"there is nothing to evaluate: give {_simplest(measures.values())}")
    folder = make_folder(output_dir)
    with _warnings() as warnings:
        warnings += _warned_before(measures)
        _check(wanted)
        check_overlap([entry.measure for entry in wanted], samples)
        for entry in wanted:
            with _timed(entry):
                entry.measure.update()
        if process_rank()[0] == 0:
            for entry in wanted:
                with _timed(entry):
                    entry.result = entry.measure.compute()
            report = Report(measures, samples, dict(flags or {}), warnings)
            page = html(report)
            stale = left_by_earlier(folder, report)
            write_report(folder, report)
            write_text(folder / PAGE, page)
            remove(stale)
            logger.info(f"wrote {folder / PAGE}, evaluation.json and evaluation.tsv")


def _for_each_model(metrics: Mapping[str, Measure | Callable[..., Measure]], samples: Samples) -> dict[str, Measured]:
    found = {}
    for name, entry in metrics.items():
        if callable(entry):
            for model, features in samples.sets.items():
                measure = _checked(name, _measure_of(name, entry, features))
                found[f"{name}_{model}" if model else name] = Measured(name, measure, model)
        else:
            found[name] = Measured(name, _checked(name, entry))
    for one in found.values():
        target = one.measure.target
        if target is not None and target not in found:
            raise BundleError(f"--metrics::{one.name}::target: there is no '{target}'; there are {', '.join(found)}")
    return found


def _checked(name: str, measure: Any) -> Measure:
    if not isinstance(measure, Measure):
        raise BundleError(
            f"--metrics::{name} is a {type(measure).__name__}, which is no Measure of scripts.evaluation.measures"
        )
    return measure


def _measure_of(name: str, entry: Callable[..., Measure], features: FeatureSet) -> Measure:
    try:
        return entry(synthetic=features)
    except TypeError as error:
        raise BundleError(f"--metrics::{name} cannot be made with these options: {error}") from error


def _check(wanted: Iterable[Measured]) -> None:
    """Let each measure and each input see at once whether it can be used."""
    things: list[Input | Measure] = []
    for entry in wanted:
        things += [*entry.measure.inputs, entry.measure]
    for thing in {id(thing): thing for thing in things}.values():
        thing.check()


def _warned_before(measures: Mapping[str, Measured]) -> list[str]:
    """What was warned of when the folders were looked at."""
    told = (text for entry in measures.values() for needed in entry.measure.inputs for text in needed.warnings)
    return list(dict.fromkeys(told))


def _simplest(measures: Iterable[Measured]) -> str:
    missing = [entry.measure.missing_flags() for entry in measures]
    fewest = min(map(len, missing))
    flags = {f"--{flag} FOLDER" for lacking in missing if len(lacking) == fewest for flag in lacking}
    return " or ".join(sorted(flags))


@contextmanager
def _timed(entry: Measured) -> Iterator[None]:
    start = time.perf_counter()
    yield
    entry.seconds += time.perf_counter() - start


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """The bundle's warnings within the block, each once."""
    handler = _Collector(logging.WARNING)
    bundle = logging.getLogger("scripts")
    bundle.addHandler(handler)
    try:
        yield handler.messages
    finally:
        bundle.removeHandler(handler)


class _Collector(logging.Handler):
    """Keeps messages, each once."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's message."""
        if record.getMessage() not in self.messages:
            self.messages.append(record.getMessage())
