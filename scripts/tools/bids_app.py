# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.tools.bids_app`: preparation and evaluation by the command line that all BIDS Apps have.

At the level `participant`, scans are prepared into output_dir, a BIDS derivative. At the level `group`, its tables are
written from all scans that are prepared, and synthetic volumes, where --synthetic-dir has some, are compared with them.
What this program does not know is handed on: any option of `prepare`, or at the second step of the group of `evaluate`
behind a lone `--`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.compute.provenance import bundle_version
from scripts.core.command_line import main as run_verb

EVALUATION = Path("derivatives", "evaluation")
"""Within the prepared dataset, where BIDS has what was made of one."""


def parser() -> argparse.ArgumentParser:
    """The options of BIDS Apps, with dashes or underscores."""
    found = argparse.ArgumentParser(
        prog="python -m scripts bids_app",
        description=str(__doc__).split(": ", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("input_dir", help="a BIDS dataset of raw scans")
    found.add_argument("output_dir", help="where the prepared dataset goes")
    found.add_argument("level", choices=("participant", "group"), help="of the analysis")
    _add(found, "participant-label", nargs="+", help="only these, with or without sub-")
    _add(found, "session-label", nargs="+", help="only these, with or without ses-")
    _add(found, "bids-filter-file", help="JSON as fMRIPrep's, of which t1w counts")
    _add(found, "n-cpus", type=int, default=0, help="processes; 0 works in this one")
    _add(found, "work-dir", help="for temporary files, in place of TMPDIR")
    _add(found, "synthetic-dir", help="at the level group: folders of samples to evaluate, separated by commas")
    _add(found, "evaluation-dir", help=f"where their evaluation goes (default {EVALUATION.as_posix()} in output_dir)")
    _add(found, "skip-bids-validation", action="store_true", help="nothing is validated; for scripts that give it")
    found.add_argument("--version", action="version", version=bundle_version())
    return found


def _add(to: argparse.ArgumentParser, name: str, **more: object) -> None:
    to.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}")), **more)  # type: ignore[arg-type]


def commands(arguments: Sequence[str]) -> list[list[str]]:
    """The verbs, each with its options, that a command line comes to.

    Raises:
        SystemExit: with status 2, where it is not understood.
    """
    place = list(arguments).index("--") if "--" in arguments else len(arguments)
    of_evaluation = list(arguments[place + 1 :])
    given, further = parser().parse_known_args(arguments[:place])
    selected = {
        "--participant_label": ",".join(given.participant_label or []),
        "--session_label": ",".join(given.session_label or []),
        "--bids_filter_file": given.bids_filter_file,
    }
    chosen = [word for flag, value in selected.items() if value for word in (flag, value)]
    if given.work_dir:
        os.environ["TMPDIR"] = str(given.work_dir)
    prepare = ["prepare", "--input_dir", given.input_dir, "--dataset_dir", given.output_dir, *chosen]
    prepare += ["--num_workers", str(given.n_cpus), *further]
    if given.level == "participant":
        return [prepare]
    found = [[*prepare, "--assemble", "1"]]
    if given.synthetic_dir:
        folder = given.evaluation_dir or str(Path(given.output_dir) / EVALUATION)
        found.append(
            ["evaluate", "--synthetic_dir", given.synthetic_dir, "--real_dir", given.output_dir]
            + ["--output_dir", folder, *of_evaluation]
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verbs one after the other; the first that does not succeed ends it."""
    for command in commands(sys.argv[1:] if arguments is None else arguments):
        if status := run_verb(command):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
