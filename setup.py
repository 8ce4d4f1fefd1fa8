# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What a wheel holds: the bundle as it is, within one package, `brain_ldm`. All else is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ["configs", "docs", "models/demo", "models/heads", "models/segmenter", "models/template"]
DOCS = ["configuration.md", "data_license.txt", "example_data.tsv"]
PAGES = [f"**/*.{ending}" for ending in ("html", "css", "js", "txt")]

rooms = find_packages(include=["scripts", "scripts.*"])
inner = {f"brain_ldm.{name.replace('/', '.')}": name.replace(".", "/") for name in [*rooms, *FOLDERS]}
data = {package: ["*"] for package, folder in inner.items() if folder in FOLDERS}
setup(
    packages=["brain_ldm", *inner],
    package_dir={"brain_ldm": "brain_ldm", **inner},
    package_data={**data, "brain_ldm": ["*.yml"], "brain_ldm.docs": DOCS, "brain_ldm.scripts": PAGES},
)
