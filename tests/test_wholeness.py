# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What is finished is looked at before it is kept, and a full disk or a dead process ends in one line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from ignite.engine import Engine
from monai.bundle import ConfigParser
from processes import run_ranks

from scripts.autoencoder.latents import array_sha256, read_encoding
from scripts.compute import processes
from scripts.conditions.conditions import Conditions
from scripts.core import errors
from scripts.core.errors import BundleError, explain
from scripts.core.files import are_whole, fingerprints, read_json
from scripts.phantoms.dataset import PhantomFolder
from scripts.sampling.saving import SampleSaver
from scripts.training.checkpointing import Progress
from scripts.volumes.grid import Grid
from scripts.volumes.pictures import figures_of

GRID = Grid((8, 8, 8), (-1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
NESTED = "[" * 100_000


@pytest.fixture
def saved(tmp_path: Path, conditions: Conditions) -> tuple[SampleSaver, torch.Tensor]:
    """A saver that has written one sample, and its conditions."""
    saver, vector = SampleSaver(str(tmp_path), GRID, conditions, {"family": "x"}), torch.full((4,), 0.5)
    saver.save(np.random.default_rng(0).random(GRID.shape, np.float32), 1, 0, vector)
    return saver, vector


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [_cut, _flipped, _emptied, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ending", ["nii.gz", "png"])
@pytest.mark.parametrize("noted", [True, False])
def test_a_damaged_sample_is_made_again(
    damage: Callable[[Path], None], ending: str, noted: bool, saved: tuple[SampleSaver, torch.Tensor], tmp_path: Path
) -> None:
    saver, vector = saved
    assert saver.is_done(1, 0, vector)
    sidecar = Path(f"{saver.stem(1, 0)}.json")
    if not noted:  # by a version that wrote no hashes
        sidecar.write_text(json.dumps({k: v for k, v in json.loads(sidecar.read_text()).items() if k != "files"}))
        assert saver.is_done(1, 0, vector)
    damage(Path(f"{saver.stem(1, 0)}.{ending}"))
    untold = not noted and (damage is Path.unlink or damage is _flipped) and ending == "png"
    assert saver.is_done(1, 0, vector) == untold or damage is _flipped


@pytest.mark.parametrize("text", ["{", NESTED, "\udcff"])
def test_a_damaged_sidecar_of_a_sample_is_one_line(text: str, saved: tuple[SampleSaver, torch.Tensor]) -> None:
    saver, vector = saved
    Path(f"{saver.stem(1, 0)}.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleError, match="is damaged .*: remove it, and its sample is made again"):
        saver.is_done(1, 0, vector)


@pytest.mark.parametrize("text", ["[]", "null", NESTED, "{", '{"made_by": {}}', '{"row": []}'])
def test_a_damaged_phantom_is_made_again(text: str, tmp_path: Path, conditions: Conditions) -> None:
    requests = SimpleNamespace(seed=1, fixed=[{}])
    folder = PhantomFolder(SimpleNamespace(settings=dict), conditions, requests, tmp_path)  # type: ignore[arg-type]
    sidecar = tmp_path / "sub-000000" / "anat" / "sub-000000_space-MNI152_T1w.json"
    sidecar.parent.mkdir(parents=True)
    sidecar.write_text(text)
    assert folder._row(0) is None
    for path in folder._paths(0):
        path.write_bytes(b"volume")
    known = {"made_by": folder._made_by(0), "row": {"age": 1}, "files": fingerprints(folder._paths(0))}
    sidecar.write_text(json.dumps(known))
    assert folder._row(0) == {"age": 1}
    folder.whole.clear()
    folder._paths(0)[0].write_bytes(b"volumE")
    assert folder._row(0) is None


@pytest.mark.parametrize("files", [None, [], {"x": 3}, {"x": {}}, {"x": {"bytes": 1}}, {"../y": {"bytes": 1}}])
def test_what_no_sidecar_says_is_not_whole(files: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    assert not are_whole(tmp_path, files) and are_whole(tmp_path, fingerprints([tmp_path / "x"]))
    assert read_json(tmp_path / "x") == {} == read_json(tmp_path / "not there")


@pytest.mark.parametrize(
    "moments", [None, {}, {"mean": 0}, {"mean": "x", "square": 1}, {"mean": 0, "square": float("nan")}, [1, 2]]
)
def test_an_encoding_without_moments_is_not_finished(moments: Any, tmp_path: Path) -> None:
    encoded = np.zeros((1, 2, 32), np.uint8)
    np.save(tmp_path / "encoded.npy", encoded)
    known = {"encoded_sha256": array_sha256(encoded), "rows": 1, "moments": {"mean": 0.0, "square": 1.0}}
    path = tmp_path / "encoding.json"
    path.write_text(json.dumps(known))
    assert read_encoding(tmp_path) == known
    for text in (json.dumps({**known, "moments": moments}), json.dumps({**known, "rows": None}), NESTED, "null"):
        path.write_text(text)
        with pytest.raises(BundleError, match="is not finished"):
            read_encoding(tmp_path)


@pytest.mark.parametrize("done", [-5, None, "3", 2.5])
def test_a_checkpoint_of_minus_five_iterations_is_one_line(done: Any) -> None:
    with pytest.raises(BundleError, match="iterations are done: remove it"):
        Progress(Engine(lambda *_: None), 1).load_state_dict({"iteration": done})


def test_half_written_pictures_are_none(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / ".0123456789ab-samples_iteration-000004.png").write_bytes(b"half")
    (tmp_path / "figures" / "samples_iteration-000004.png").write_bytes(b"whole")
    assert list(figures_of(tmp_path, 4)) == ["samples"]


def test_a_full_disk_names_the_folder_wherever_it_is_met(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(errors, "working_in", [tmp_path])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wrapped = RuntimeError("failed to evaluate")
    wrapped.__cause__ = full
    for error in (full, wrapped):
        assert f"cannot write {tmp_path}: No space left on device: make room" in str(explain(error))
    named = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/data/x.png")
    assert "cannot write /data/x.png: " in str(explain(named))
    assert explain(OSError(errno.ECONNREFUSED, "refused")) is None and explain(KeyError("a bug")) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_training_on_a_full_disk_is_one_line() -> None:
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401 (imported here as the handlers do)

    with pytest.raises(OSError) as caught, open("/dev/full", "w") as file:
        file.write("x")
        file.flush()
    assert "No space left on device" in str(explain(caught.value))


def test_no_barrier_has_a_limit_in_minutes(config: ConfigParser) -> None:
    """The group waits for days: gloo notices a process that has died by its connections."""
    assert processes.PATIENCE.days >= 1
    script = (
        "import os, sys, time, torch, torch.distributed as dist\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from scripts.compute import processes\n"
        "processes.start(torch.device('cpu'))\n"
        "group = dist.distributed_c10d._get_default_group()\n"
        "limit = group._get_backend(torch.device('cpu')).options._timeout\n"
        "assert limit == processes.PATIENCE, limit\n"
        "rank = dist.get_rank()\n"
        "time.sleep(2.0 * rank)\n"
        "processes.wait_for_all_processes()\n"  # the slow one is waited for
        "if rank: os._exit(9)\n"
        "processes.wait_for_all_processes()\n"  # and the dead one is not
    )
    slow, dead = run_ranks(2, "-c", script, timeout=120)
    assert dead.returncode == 9
    assert slow.returncode == 1 and "Connection" in slow.stderr
    assert dist.is_available()
