# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle as a package: what the Model Zoo asks of its files, and that all configurations fit together."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import packages_distributions
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import yaml
from conftest import ROOT
from monai.bundle import ConfigParser, download_large_files
from monai.bundle.config_item import ConfigComponent, ConfigExpression
from monai.bundle.reference_resolver import ReferenceResolver
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import run_python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = ROOT / "configs"
METADATA = json.loads((CONFIGS / "metadata.json").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LICENCE = "# SPDX-FileCopyrightText: Brain LDM contributors\n# SPDX-License-Identifier: Apache-2.0\n"

OVERLAYS = sorted(file.name for file in CONFIGS.glob("*.yaml"))
MODELS = ["demo.yaml", "tiny.yaml"]
AFTER_TRAININGS = ["finetune.yaml", "muon.yaml"]  # which come after a training's overlay
NEXT = "demo_next.yaml"  # which no other overlay fits yet
PIXEL, MINIMAL, UNCONDITIONAL = "pixel.yaml", "minimal.yaml", "unconditional.yaml"  # see the combinations
NO_VERBS = (*MODELS, *AFTER_TRAININGS, NEXT, MINIMAL, UNCONDITIONAL)
VERBS = [[], *([name] for name in OVERLAYS if name not in NO_VERBS)]
COMBINATIONS = [[*verb, *model] for verb in VERBS for model in ([], *([name] for name in MODELS))]
COMBINATIONS += [["prepare.yaml", PIXEL, MINIMAL], [UNCONDITIONAL], ["train_diffusion.yaml", PIXEL, UNCONDITIONAL]]
COMBINATIONS += [["train_diffusion.yaml", "few_steps.yaml"]]
TRAININGS = [names for names in COMBINATIONS if names and names[0].startswith("train_")]
COMBINATIONS += [[*names, last] for names in TRAININGS for last in AFTER_TRAININGS]


def tracked(*patterns: str) -> list[Path]:
    """The files that git tracks, or skip where there is no git (a bundle unpacked from an archive)."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    names = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in names.stdout.split("\0") if name and (ROOT / name).is_file()]


def locked(python: str, file: str = "requirements.lock") -> dict[str, str]:
    """Distribution -> version in a lock for one version of Python on Linux."""
    environment = {"python_version": python, "python_full_version": f"{python}.7", "sys_platform": "linux"}
    versions: dict[str, str] = {}
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith("#"):
            entry = Requirement(line)
            if entry.marker is None or entry.marker.evaluate(environment):
                versions[canonicalize_name(entry.name)] = next(iter(entry.specifier)).version
    return versions


def declared(extra: str | None = None) -> dict[str, Requirement]:
    """Distribution -> range in pyproject.toml, of the bundle itself or of one extra."""
    entries = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(entry).name): Requirement(entry) for entry in entries}


def merged(overlays: list[str]) -> ConfigParser:
    """The base with overlays, parsed; a `+key` that extends nothing is an error."""
    parser = ConfigParser()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parser.read_config([str(CONFIGS / name) for name in ("inference.json", *overlays)])
        parser.parse()
    return parser


def test_metadata_passes_monais_check(tmp_path: Path) -> None:
    schema = shutil.copy(ROOT / "tests" / "data" / "meta_schema.json", tmp_path / "schema.json")
    command = ("-m", "monai.bundle", "verify_metadata", "--meta_file", "configs/metadata.json")
    done = run_python(*command, "--filepath", schema, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "verified with no error" in done.stdout


def test_metadata_has_what_the_zoo_asks_for() -> None:
    texts = ["name", "task", "description", "authors", "copyright", "intended_use", "data_source", "data_type"]
    assert all(METADATA[key].strip() for key in texts)
    assert METADATA["references"] and {"eval_metrics", "supported_apps"} <= METADATA.keys()
    keys = {"type", "format", "modality", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data"}
    for tensors in METADATA["network_data_format"].values():
        assert all(keys | {"channel_def"} <= tensor.keys() for tensor in tensors.values())


def test_metadata_states_the_shapes_of_the_base_config() -> None:
    parser = merged([])
    latent = METADATA["network_data_format"]["inputs"]["image"]
    volume = METADATA["network_data_format"]["outputs"]["pred"]
    assert [latent["num_channels"], *latent["spatial_shape"]] == list(parser.get_parsed_content("latent_shape"))
    assert volume["spatial_shape"] == parser["grid"]["shape"]
    noisy = METADATA["diffusion_data_format"]["inputs"]["x"]
    assert noisy["num_channels"] == parser["latent_channels"] + len(parser.get_parsed_content("conditions"))


def test_version_is_the_same_everywhere() -> None:
    version = METADATA["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert version in METADATA["changelog"]
    assert version == PROJECT["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_metadata_file_at_the_top_is_the_one_in_configs() -> None:
    assert json.loads((ROOT / "metadata.json").read_text()) == METADATA


def test_metadata_names_the_locked_versions() -> None:
    lock = locked("3.11")
    stated = {"monai": METADATA["monai_version"], "torch": METADATA["pytorch_version"]}
    stated |= {"numpy": METADATA["numpy_version"], **METADATA["required_packages_version"]}
    assert {name: lock[canonicalize_name(name)] for name in stated} == stated
    assert {canonicalize_name(name) for name in stated} == declared().keys() | declared("preparation").keys()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_lock_lies_within_the_declared_ranges(python: str) -> None:
    further = (locked(python, f"requirements-{extra}.lock") for extra in ("tracking", "docs"))
    lock = {name: version for found in (*further, locked(python)) for name, version in found.items()}
    extras = ("preparation", "download", "export", "page", "collection", "tracking", "docs", "test", "dev")
    for name, entry in {**declared(), **{k: v for extra in extras for k, v in declared(extra).items()}}.items():
        if entry.marker is None or entry.marker.evaluate({"python_version": python}):
            assert entry.specifier.contains(lock[name]), f"{entry} does not admit the locked {lock[name]}"


def test_ranges_admit_older_and_newer_releases_of_torch() -> None:
    for version in ("2.11.0", "2.13.0", "2.14.0"):
        assert declared()["torch"].specifier.contains(version)


def test_large_files_are_read_by_monai(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("monai.bundle.scripts.download_url", lambda **request: asked.append(request))
    download_large_files(bundle_path=str(ROOT))
    assert [Path(request["filepath"]).relative_to(ROOT) for request in asked] == [
        Path("models/autoencoder.pt"),
        Path("models/model.pt"),
    ]
    for request in asked:
        assert request["url"].startswith("https://")
        assert request["hash_type"] == "md5" and re.fullmatch("[0-9a-f]{32}", request["hash_val"])


def test_tracked_files_are_small() -> None:
    assert {f.name: f.stat().st_size for f in tracked() if f.stat().st_size > 25e6} == {}


def test_python_files_open_with_the_licence() -> None:
    assert [f for f in tracked("*.py") if not f.read_text().startswith(LICENCE)] == []


def test_text_files_end_in_one_newline() -> None:
    texts = tracked("*.py", "*.md", "*.json", "*.yaml", "*.yml", "*.toml", "*.txt", "*.conf", "Makefile", "LICENSE")
    assert [f for f in texts if not re.search(r"[^\n]\n\Z", f.read_text())] == []


def test_json_is_pretty_printed() -> None:
    for file in tracked("configs/*.json"):
        assert file.read_text() == json.dumps(json.loads(file.read_text()), indent=4) + "\n", file


def test_documents_that_are_referred_to_exist() -> None:
    for file in tracked("scripts/*.py", "configs/*.yaml", "README.md", "docs/*.md"):
        text = file.read_text()
        named = {ROOT / name for name in re.findall(r"\bdocs/\w+\.(?:md|tsv|txt)", text)}
        linked = {file.parent / name for name in re.findall(r"\]\(([\w./]+)\)", text) if file.suffix == ".md"}
        assert [path for path in named | linked if not path.exists()] == [], file


def test_no_paths_of_a_machine() -> None:
    files = tracked("scripts/*.py", "configs/*", "docs/*", "README.md", "Makefile")
    homes = re.compile(r"(?<![\w.])/(home|root|Users)/")
    assert [f for f in files if homes.search(f.read_text(errors="replace"))] == []


def test_imports_of_scripts_are_declared() -> None:
    distributions = packages_distributions()
    for file in tracked("scripts/*.py"):
        for module in third_party_imports(file):
            names = {canonicalize_name(name) for name in distributions.get(module, [])}
            known = {*declared(), *declared("page"), *declared("preparation")}
            assert names & known, f"{file.name} imports {module}, which pyproject.toml does not declare"


def third_party_imports(file: Path) -> set[str]:
    """Top-level names of the modules that a Python file imports, less the standard library's and our own."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"scripts"}


def test_weights_are_never_loaded_as_code() -> None:
    for file in tracked("scripts/*.py", "benchmarks/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True" and "map_location" in options, f"{file}:{node.lineno}"


def test_configs_hold_no_lambdas() -> None:
    assert [f for f in tracked("configs/*") if "lambda" in f.read_text()] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_opens_with_its_command(overlay: str) -> None:
    opening = re.match(r"(#.*\n)+", (CONFIGS / overlay).read_text())
    assert opening and "python -m monai.bundle run" in opening[0] and overlay in opening[0]


def test_numbers_in_overlays_are_numbers() -> None:
    for file in CONFIGS.glob("*.yaml"):
        for value in leaves(yaml.safe_load(file.read_text())):
            assert not (isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value)), (file, value)


def test_trainings_repeat_nothing_of_the_base() -> None:
    base = json.loads((CONFIGS / "inference.json").read_text())
    for file in CONFIGS.glob("train_*.yaml"):
        repeated = [name for name, value in yaml.safe_load(file.read_text()).items() if base.get(name, "") == value]
        assert repeated == [], file


def test_options_of_the_trainings_are_documented() -> None:
    """Each option of the base that a training reads has a row, with its default."""
    base = json.loads((CONFIGS / "inference.json").read_text())
    names = list(base)
    others = {"stage", "stage_weights", "participants", "facts", "run_training"}
    options = {n for n in names[names.index("run") + 1 :] if not isinstance(base[n], dict)} - others
    table = (ROOT / "docs" / "configuration.md").read_text().split("## Options of all trainings")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `--")]
    documented = {name: default for flags, _, default in rows for name in re.findall(r"--(\w+)", flags)}
    assert documented.keys() == options
    for name, default in documented.items():
        if re.fullmatch(r"`[^`]*`", default):
            assert yaml.safe_load(default.strip("`")) == base[name], name


def leaves(config: Any) -> list[Any]:
    """All values of a nested config that are neither dict nor list."""
    if isinstance(config, dict | list):
        return [leaf for value in (config.values() if isinstance(config, dict) else config) for leaf in leaves(value)]
    return [config]


@pytest.mark.parametrize("overlays", COMBINATIONS, ids="+".join)
def test_combination_fits_together(overlays: list[str]) -> None:
    items = merged(overlays).ref_resolver.items
    for name, item in items.items():
        config = item.get_config()
        if isinstance(config, str):
            check_text(name, config, set(items))
        elif isinstance(item, ConfigComponent):
            check_target(name, item)


def check_text(name: str, text: str, known: set[str]) -> None:
    """Fail if a value refers to an id that is not there, or is an expression that does not compile."""
    references = ReferenceResolver.match_refs_pattern(text)
    assert references.keys() <= known, f"{name} refers to {sorted(references.keys() - known)}"
    if ConfigExpression.is_expression(text):
        code = ReferenceResolver.update_refs_pattern(text, dict.fromkeys(references))
        compile(code[1:], name, "exec")


def check_target(name: str, item: ConfigComponent) -> None:
    """Fail if the `_target_` of a component names nothing."""
    target = item.resolve_module_name()
    if isinstance(target, str) and not target.startswith(("$", "@")):
        assert locate(target) is not None, f"the _target_ of {name}, {target}, does not exist"
