# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.tools.released_weights`: the weights that the method's authors released, into models/.

Two public places have them, 2.3 GB in all: the folder at Google Drive that large_files.yml names, and the repository of
MONAI's Model Zoo at Hugging Face. One that fails is followed by the other. A download that breaks off goes on where it
was, in the same command or the next; what arrives is compared with the checksums of large_files.yml.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import logging
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.core.errors import BundleError
from scripts.core.files import make_folder
from scripts.core.paths import HERE, ROOT
from scripts.core.programs import errors_in_one_line
from scripts.core.verbs import load_config

logger = logging.getLogger(__name__)

VARIABLE = "BRAIN_LDM_WEIGHTS_URL"
SOURCES = {
    "huggingface": "https://huggingface.co/MONAI/brain_image_synthesis_latent_diffusion_model/resolve/main/{path}",
    "google": "https://drive.usercontent.google.com/download?id={drive}&export=download&confirm=t",
}
TRIES, TIMEOUT_S, PAUSE_S, BLOCK = 5, 60.0, 1.0, 1 << 20
DRIVE_ID = re.compile(r"[?&]id=([\w-]+)")
PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
RANGE = re.compile(r"bytes (\d+)-")
OTHER = "it is another file than the one that was released"
FOR_GOOD = (400, 401, 403, 404, 410, 451)
"""Answers that another try would get again."""


@dataclass(frozen=True)
class LargeFile:
    """One of large_files.yml: where it goes in the bundle, its number at Google Drive, and its MD5 sum."""

    path: str
    drive: str
    md5: str


def large_files(table: Path = ROOT / "large_files.yml") -> list[LargeFile]:
    """The released weights."""
    entries: Sequence[Mapping[str, Any]] = load_config(table)["large_files"]
    found = []
    for entry in entries:
        number = DRIVE_ID.search(str(entry["url"]))
        found.append(LargeFile(str(entry["path"]), number[1] if number else "", str(entry["hash_val"])))
    return found


@dataclass
class Download:
    """One file on its way: what has arrived lies beside it, under a name that ends in `.part`.

    Attributes:
        target: where it goes.
        md5: of the whole.
        timeout: seconds without a byte after which a server counts as gone.
    """

    target: Path
    md5: str
    timeout: float = TIMEOUT_S

    @property
    def part(self) -> Path:
        """What has arrived."""
        return self.target.with_name(f".{self.target.name}.part")

    def fetch(self, url: str) -> None:
        """Get what is missing from one place, and give the file its name.

        Raises:
            BundleError: if the place does not have it, has another, or cannot be reached; what has arrived is kept,
                unless it is of another file.
        """
        from_before, ended, idle, fault = self._size() > 0, False, 0, ""
        while idle < TRIES:
            before = self._size()
            ended, fault = self._attempt(url, before, ended)
            if self._is_whole():
                os.replace(self.part, self.target)
                return
            idle = 0 if self._size() > before else idle + 1
            if idle and (ended or (idle == TRIES and from_before and not fault)):
                self.part.unlink(missing_ok=True)
                if not from_before:
                    raise BundleError(OTHER)
                from_before, ended, idle = False, False, 0
            time.sleep(PAUSE_S * min(idle, 3))
        raise BundleError(fault or "it broke off")

    def _attempt(self, url: str, start: int, ended: bool) -> tuple[bool, str]:
        """One request: whether the server says that nothing comes after it, and if not, why it stopped."""
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return self._receive(answer, self._begin(answer, start, ended)), ""
        except urllib.error.HTTPError as error:
            if error.code in FOR_GOOD:
                raise BundleError(f"the server answers {error.code} {error.reason}") from error
            return error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE, f"the server answers {error.code}"
        except (http.client.HTTPException, OSError) as error:
            return False, _reason(error)

    def _begin(self, answer: Any, start: int, ended: bool) -> int:
        """Where the answer begins; what has arrived is dropped where that is at the beginning."""
        found = RANGE.match(answer.headers.get("Content-Range") or "")
        begins = int(found[1]) if found and answer.status == http.client.PARTIAL_CONTENT else 0
        if begins not in (0, start):
            raise BundleError("the server sends another part of the file than was asked for")
        if begins == 0 and ended:
            raise BundleError(OTHER)
        if begins == 0:
            self.part.unlink(missing_ok=True)
        return begins

    def _receive(self, answer: Any, start: int) -> bool:
        """Append what comes; whether it is as much as the server has said."""
        length = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=start + length or None, initial=start, unit="B", unit_scale=True, disable=None) as bar:
            got = 0
            while block := answer.read1(BLOCK):
                if start + got == 0 and PAGE.match(block):
                    raise BundleError("a web page came in place of the file")
                self._append(block)
                got += len(block)
                bar.update(len(block))
        return got >= length

    def _append(self, block: bytes) -> None:
        try:
            with open(self.part, "ab") as file:
                file.write(block)
        except OSError as error:
            raise BundleError(f"cannot write {self.part}: {error.strerror}") from error

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _is_whole(self) -> bool:
        return self.part.is_file() and has_md5(self.part, self.md5)


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", error)
    if isinstance(inner, socket.gaierror):
        return "no network, or no such host"
    if isinstance(inner, (TimeoutError, ConnectionError)):
        return f"no answer: {str(inner) or 'the connection broke off'}"
    return f"{type(error).__name__}: {error}"


def has_md5(path: Path, md5: str) -> bool:
    """Whether a file's bytes have this MD5 sum."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest() == md5


def urls(file: LargeFile, source: str) -> dict[str, str]:
    """Name of the place -> address of a file there, in the order in which they are tried.

    Args:
        file: which.
        source: `auto`, a name of `SOURCES`, or an address that stands before the file's path.

    Raises:
        BundleError: for another source.
    """
    known = {name: url.format(path=file.path, drive=file.drive) for name, url in SOURCES.items()}
    if source == "auto":
        return known
    if "://" in source:
        return {source: f"{source.rstrip('/')}/{file.path}"}
    if source not in known:
        raise BundleError(f"--source must be auto, {', '.join(known)} or an address, got '{source}'")
    return {source: known[source]}


def fetch(file: LargeFile, folder: Path, source: str = "auto", timeout: float = TIMEOUT_S) -> Path:
    """A released file in a folder of weights: what is there already, if it is whole, or else downloaded.

    Args:
        file: which.
        folder: the bundle's or the current one, which has or gets `models/`.
        source: see `urls`.
        timeout: see `Download`.

    Raises:
        BundleError: if no place gives it: what each of them did, and what to do without a network.
    """
    target = folder / file.path
    if target.is_file() and has_md5(target, file.md5):
        logger.info(f"{target} is there")
        return target
    make_folder(target.parent)
    faults, addresses = [], urls(file, source)
    for name, url in addresses.items():
        logger.info(f"{target} from {url}")
        try:
            Download(target, file.md5, timeout).fetch(url)
        except BundleError as error:
            faults.append(f"{name}: {error}")
        else:
            return target
    raise BundleError(
        f"cannot download {file.path} ({'; '.join(faults)}): the same command goes on from what has arrived. Without a "
        f"network here, fetch {' or '.join(addresses.values())} elsewhere and put it at {target}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts weights",
        description=str(__doc__).split(": ", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=HERE, help="the folder whose models/ gets them")
    said = "auto, huggingface, google, or an address of your own that stands before models/"
    parser.add_argument("--source", default=os.environ.get(VARIABLE) or "auto", help=f"{said} (also {VARIABLE})")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds without a byte, before another try")
    flags = parser.parse_args()
    for file in large_files():
        print(fetch(file, flags.output_dir, flags.source, flags.timeout))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with errors_in_one_line():
        main()
