# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts`: its verbs, help, refusals, and that it is MONAI's command in short."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BASE, ROOT, TINY, RunBundle, RunHere
from heads import refused as refused_here
from monai.bundle import ConfigParser

from scripts.core.command_help import (
    Option,
    as_configured,
    first_sentence,
    opening,
    option_tables,
    parse_comment,
    programs,
    tools,
)
from scripts.core.command_line import main
from scripts.core.errors import BundleError
from scripts.core.flags import read_flags, refuse_foreign_flags, used_by
from scripts.core.quiet import hide_foreign_warnings
from scripts.core.verbs import OF_OVERLAYS, additions, merge, verbs

VERBS = list(verbs())
Shown = Callable[..., str]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shown:
    """`shown("sample", "--help")` runs a command line from the bundle's folder and returns what it printed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: str) -> str:
        assert main(words) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shown:
    """`refused("smaple")` returns the line in which a command line is refused."""
    monkeypatch.chdir(ROOT)

    def run(*words: str) -> str:
        assert main(words) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("error: ")
        return printed.err

    return run


@pytest.mark.parametrize("verb", VERBS)
def test_files_are_merged_as_monai_merges_them(verb: str) -> None:
    files = [*verbs()[verb], *additions().values()]
    assert merge(files) == ConfigParser.load_config_files([str(file) for file in files])


def test_list_has_every_configuration_and_program(shown: Shown) -> None:
    text = shown()
    assert {"sample", "encode_latents", "train diffusion", "train brain_age", "evaluate"} <= set(VERBS)
    for name in (*VERBS, *additions(), "curves", "example_data"):
        assert re.search(rf"^  {name} {{2,}}\w", text, re.MULTILINE), name
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", tools())
def test_program_says_how_it_is_called(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0 and f"usage: python -m scripts {name}" in capsys.readouterr().out


def test_every_program_is_importable_under_its_name() -> None:
    assert "example_data" in tools()
    for name in programs():
        assert (ROOT / "scripts" / f"{name.replace('.', '/')}.py").is_file(), name


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, shown: Shown) -> None:
    text = shown(*verb.split(), "--help")
    flat = " ".join(text.split())
    assert first_sentence(opening(verbs()[verb][-1])) in flat
    assert f"python -m scripts {verb}" in text and "monai.bundle" not in text
    assert "--bundle_root" in text and "--print" in text
    assert max(map(len, text.splitlines())) <= 100
    assert text == shown(*verb.split(), "-h", "--print")


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_no_option_twice_and_none_without_use(verb: str, shown: Shown) -> None:
    heads = re.findall(r"^  (--[^ ].*?)(?:  .*)?$", shown(*verb.split(), "--help"), re.MULTILINE)
    names = [name for head in heads for name in re.findall(r"--(\w+)", head)]
    for name in set(names) - {"with", "print", "help", "device", "steps", "tracking"}:
        assert names.count(name) == 1, name
        config = merge(verbs()[verb])
        assert name in config or name in used_by(verb), name


def test_defaults_are_those_that_hold(shown: Shown) -> None:
    assert "(default 2.5e-05)" in shown("train", "diffusion", "--help")
    tiny = shown("train", "diffusion", "--with", "tiny", "--help")
    assert re.search(r"--lr +highest learning rate \(default 0\.001\)", tiny)
    assert re.search(r"--target[^-]*\(default velocity\)", shown("sample", "--with", "demo", "--help"))


def test_help_follows_the_maps_of_the_configuration(shown: Shown, tmp_path: Path) -> None:
    overlay = tmp_path / "own.yaml"
    overlay.write_text(
        "+conditions:\n  education: {raw: education_years, unit: years, minimum: 7, maximum: 20, default: 0.3}\n"
        "+samplers: {renoising: {_target_: own.Sampler, num_inference_steps: 4}}\n"
        "+families: {average: {_target_: own.Family}}\n"
    )
    own = " ".join(shown("sample", "--with", "demo", str(overlay), "--help").split())
    assert "--brain_vol, --education conditions" in own and "(default 0.5, 0.3 of --education)" in own
    assert "--brain_vol_mm3, --education_years the same in raw units" in own
    assert "--sex female or male, --age_years 44 to 82 years" in own and "--education_years 7 to 20 years" in own
    assert "--brain_vol_mm3 1150000 to 1550000 mm3" in own
    assert "(one of: ddim, ddpm, dpm, unipc, flow, midpoint, few, renoising)" in own
    assert "(one of: latent_diffusion, lsgan, vae_gan, pixel_diffusion, average)" in own
    assert "50, 1000, 20, 20, 30, 10, 4, renoising 4)" in own
    base = " ".join(shown("sample", "--help").split())
    assert "education" not in base and "--brain_vol_mm3 1144240 to 1793910 mm3" in base


def test_help_has_conditions_that_the_tables_lack() -> None:
    base = merge(verbs()["sample"])
    for head, flags in (("--gender, --age", "--ventricular_vol, --brain_vol"), ("--sex", "--age_years")):
        assert flags in as_configured(Option(head, "them"), base).head


def test_help_of_a_training_resolves_what_is_said_elsewhere(shown: Shown) -> None:
    text = shown("train", "diffusion", "--help")
    assert re.search(r"--trained_conditions +conditions of a file", text)
    assert re.search(r"--freeze +parts that keep their weights", text)


def test_default_called_default_is_no_stutter(shown: Shown) -> None:
    assert "(default 'default')" in " ".join(shown("encode_latents", "--help").split())


def test_parts_of_a_comment() -> None:
    options = "  --one     first\n            of --two\n  --three, --four 1  last (default 2)"
    text = f"Does it:\n\n  python -m x --a 1\n\n{options}"
    assert list(parse_comment(text)) == [
        "Does it:",
        ("python -m x --a 1",),
        Option("--one", "first of --two"),
        Option("--three, --four 1", "last (default 2)"),
    ]


def plain_options() -> list[str]:
    """The base's ids that are one value and no expression over others."""
    base = merge(verbs()["sample"])
    plain = {name: value for name, value in base.items() if not isinstance(value, (dict, list))}
    return [name for name, value in plain.items() if not str(value).startswith("$") or "@bundle_root" in str(value)]


def test_tables_describe_every_plain_option_of_the_base() -> None:
    described = {name for options in option_tables().values() for option in options for name in option.names}
    assert set(plain_options()) - described == OF_OVERLAYS


def test_stated_defaults_are_those_of_the_configuration() -> None:
    base = merge(verbs()["sample"])
    for option in (option for options in option_tables().values() for option in options):
        value = base.get(option.names[0])
        if len(option.names) == 1 and re.fullmatch(r"[\d.]+|\w+", option.default) and isinstance(value, (int, str)):
            stated = value if isinstance(value, str) else str(int(value))
            assert option.default == stated or stated.startswith(("$", "@")), option.head


@pytest.mark.parametrize("verb", VERBS[1:])
def test_defaults_in_a_comment_are_those_of_the_configuration(verb: str) -> None:
    config = merge(verbs()[verb])
    for part in parse_comment(opening(verbs()[verb][-1])):
        if isinstance(part, Option) and len(part.names) == 1:
            stated = re.search(r"\(default ([\d.e-]+)[);]", part.text.split("; --")[0])
            value = config.get(part.names[0])
            if stated and isinstance(value, (bool, int, float)):
                assert float(stated[1]) == float(value), part.head


OF_NO_USE = [
    ("sample --gendr 1", "unknown flag --gendr: did you mean --gender?"),
    ("sample --samples 2", "--num_samples? it is an option of `evaluate`"),
    ("sample --samplers::foo 2", "unknown flag --samplers::foo: samplers has ddim, ddpm"),
    ("sample --samplers::dim 2", "unknown flag --samplers::dim: did you mean --samplers::ddim?"),
    ("train diffusion --train::batch_sise 3", "unknown flag --train::batch_sise: did you mean --batch_size?"),
    ("sample --conditions 1", "that is a section of the configuration: give a map, or a part of it"),
    ("sample --network_def abc", "such as --network_def::spatial_dims"),
    ("sample --inferer::guidance 2", "it is --families::latent_diffusion::guidance now"),
    ("train diffusion --latents x", "it is --participants now"),
]
"""Flags that MONAI takes, and what is told of them, by either command."""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("smaple", "there is no verb 'smaple': did you mean sample?"),
        ("train difusion", "did you mean train diffusion?"),
        ("train", "`train diffusion`"),
        ("demo", "--with demo"),
        ("sample demo", "--with demo adds it"),
        ("sample --seed 1 2", "'2' belongs to no option"),
        ("sample --with dmeo", "did you mean demo?"),
        ("sample --with xyzzy", "there are coarse, demo"),
        ("sample --with", "--with what?"),
        ("sample --with=", "--with what?"),
        ("sample --with demo,,tiny", "--with what?"),
        ("sample --with demo tiny demo", "demo is given twice"),
        ("sample --with demo configs/demo.yaml", "configs/demo.yaml is given twice"),
        ("sample --with configs", "that is no .yaml or .json file"),
        ("sample --with elsewhere/demo.yaml", "did you mean demo?"),
        ("sample --with configs/train_diffusion.yaml", "`python -m scripts train diffusion`"),
        ("sample --with configs/inference.json", "`python -m scripts sample`"),
        ("sample --config_file configs/demo.yaml", "--with adds configurations"),
        ("sample --args_file no.yaml", "--args_file no.yaml: there is no such file"),
        ("sample --output_dir --seed 1", "--output_dir what?"),
        ("sample --seed 1 --conditions_table", "--conditions_table what?"),
        ("sample --output_dir - --seed 1", "a lone - is no value"),
        ("sample --output_dir -- --seed 1", "a lone -- is no value"),
        ("sample --with train_diffusion", "a verb of its own"),
        ("sample --with finetune", "finetune has no effect on `sample`"),
        ("sample --xyzzy 1", "unknown flag --xyzzy: --help lists them"),
        ("sample --max_epochs 3", "--max_epochs has no effect here: it is an option of `train autoencoder`"),
        ("sample --with tiny --max_epochs 3", "it is an option of `train autoencoder`"),
        ("train diffusion --num_samples=3", "it is an option of `sample`, `figures`"),
        ("train diffusion --age 0.5", "it is an option of `sample`"),
        *OF_NO_USE,
        ("sample --workflow_type foo", "--workflow_type must be one of train, training, infer"),
        ("sample --run 1", "--run 1 does nothing"),
        ("sample --output_dir %x", "the configuration has no x"),
        ("sample --age @nobody::age", "the configuration has no nobody::age"),
        ("sample --conditions::agee::maximum 90", "did you mean --conditions::age?"),
        ("sample --gender::x 1", "unknown flag --gender::x"),
        ("train diffusion --train::handlers::99::x 1", "unknown flag --train::handlers::99"),
        ("train diffusion --train_diffusion::conditions 3", "it is --trained::conditions now"),
        ("train autoencoder --validate::reconstruction::every 2", "it is --validate::held_out::every now"),
        ("--seed 1", "a verb comes before --seed"),
        ("completion", "completion of what?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: str, told: str, refused: Shown) -> None:
    assert told in refused(*words.split())


@pytest.mark.parametrize(
    ("words", "files", "flags"),
    [
        ("sample", ["inference.json"], ""),
        ("sample --with demo --age 0.7", ["inference.json", "demo.yaml"], "--age 0.7"),
        ("train_diffusion --lr 1e-4 --with tiny", ["inference.json", "train_diffusion.yaml", "tiny.yaml"], "--lr 1e-4"),
        ("train diffusion --with demo,finetune --target=flow", None, "--target=flow"),
        ("encode latents --with demo tiny --flip 0", None, "--flip 0"),
        ("encode-latents", ["inference.json", "encode_latents.yaml"], ""),
        ("side by side --count 2", ["inference.json", "side_by_side.yaml"], "--count 2"),
        ("phantoms --intracranial_mm3 1500000", ["inference.json", "phantoms.yaml"], "--intracranial_mm3 1500000"),
        ("train diffusion --tracking mlflow --run_name x", None, "--tracking mlflow --run_name x"),
        ("sample --network_def::num_res_blocks 1", ["inference.json"], "--network_def::num_res_blocks 1"),
        ("sample --age -0.5 --num-samples 2", ["inference.json"], "--age -0.5 --num-samples 2"),
    ],
)
def test_printed_command_is_the_same_in_long(words: str, files: list[str] | None, flags: str, shown: Shown) -> None:
    command = shlex.split(shown(*words.split(), "--print"))
    beginning, rest = command[:5], command[5:]
    assert beginning == ["python", "-m", "monai.bundle", "run", "--config_file"]
    named = [Path(name).name for name in yaml.safe_load(rest[0])]
    assert files is None or named == files
    assert all((ROOT / "configs" / name).is_file() for name in named)
    assert rest[1:] == flags.split()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("1: 2", "is no map of ids to values"),
        ("+num_samples: 3", "+num_samples fits nothing"),
        ("num_samples::b: 1", "num_samples::b fits nothing"),
        ("train_diffusion::lr: 1", "train_diffusion::lr fits nothing"),
        ("conditions: 3", "conditions must be a map"),
    ],
)
def test_own_file_that_fits_nothing_is_refused(
    content: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(content)
    try:
        assert main(["sample", "--with", str(tmp_path / "own.yaml"), "--print"]) == 2
        said = capsys.readouterr().err
    except BundleError as error:
        said = str(error)
    assert told in said


def test_flags_in_a_file_are_checked_as_those_on_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "flags.yaml").write_text("max_epochs: 3\n")
    assert main(["sample", "--args_file", str(tmp_path / "flags.yaml")]) == 2
    assert "--max_epochs has no effect here" in capsys.readouterr().err


def test_list_says_whole_sentences(shown: Shown) -> None:
    assert "carried back to the raw scan" in " ".join(shown().split())
    assert shown("train", "--help") == shown()


def test_printed_command_quotes_what_a_shell_would_take_apart(shown: Shown) -> None:
    given = ["figures", "--rows", "[{'age_years': 50}, {'age_years': 70}]", "--output_dir", "my $folder", "--print"]
    assert shlex.split(shown(*given))[-4:] == given[1:5]


def test_own_files_and_other_folders(shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text("num_samples: 2\n")
    assert f"'{(tmp_path / 'own.yaml').as_posix()}'" in shown("sample", "--with", str(tmp_path / "own.yaml"), "--print")
    monkeypatch.chdir(tmp_path)
    command = shlex.split(shown("sample", "--with", "own.yaml", "--print"))
    assert yaml.safe_load(command[5]) == [(ROOT / BASE).as_posix(), "own.yaml"]
    assert command[6:] == ["--bundle_root", str(ROOT)]
    assert "bundle_root x" in shown("sample", "--bundle_root", "x", "--print")


def test_what_is_printed_is_what_is_run(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("monai.bundle.run", lambda **flags: asked.update(flags))
    assert main(["train", "diffusion", "--with", "tiny", "--lr", "1e-4", "--freeze", "['a','b']", "--amp"]) == 0
    files = ["configs/inference.json", "configs/train_diffusion.yaml", "configs/tiny.yaml"]
    assert asked == {"config_file": files, "lr": 1.0e-4, "freeze": ["a", "b"], "amp": True}


def test_completion(shown: Shown) -> None:
    def words(*given: str) -> list[str]:
        return shown("completion", "words", *given).split()

    assert "train" in words("") and words("eval") == ["evaluate"]
    assert words("train", "d") == ["diffusion"]
    assert words("sample", "--num_s") == ["--num_samples"] and words("sample", "--max") == []
    assert words("train", "diffusion", "--max_e") == words("train_diffusion", "--max_e") == ["--max_epochs"]
    assert words("sample", "--with", "d") == ["demo", "demo_next"]
    assert words("sample", "--with", "demo", "--pr") == ["--print"]
    assert "complete -o default" in shown("completion", "zsh")


@pytest.mark.parametrize(("shell", "mode"), [("bash", "true"), ("zsh", "emulate sh")])  # as bashcompinit calls it
def test_shell_completes(shell: str, mode: str, shown: Shown) -> None:
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    typed = f"COMP_WORDS=({sys.executable} -m scripts train d); COMP_CWORD=4; _brain_images; echo ${{COMPREPLY[@]}}"
    script = f"{shown('completion', shell)}{mode}; {typed}"
    done = subprocess.run([shell, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "diffusion", done.stderr


def commands_in(text: str) -> Iterator[str]:
    """The commands of MONAI that a text shows, each in one line."""
    for line in re.sub(r" *\\\n(# *)?\s*", " ", text).splitlines():
        if (found := re.search(r"python -m monai\.bundle run (.*)", line)) and not found[1].startswith("..."):
            yield found[1].split(" #")[0].strip("`. ")


@pytest.mark.parametrize("file", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda f: f.name)
def test_commands_of_the_documentation_have_no_flag_without_use(file: Path) -> None:
    for command in commands_in(file.read_text()):
        if "`" in command or "..." in command:
            continue
        flags = read_flags(shlex.split(command))
        names = [Path(name) for name in (flags["config_file"] or "").strip("[]").replace("'", "").split(",")]
        if all((ROOT / name).is_file() for name in names):
            files = [ROOT / name for name in names]
            refuse_foreign_flags(flags, files, merge(files))


def test_unknown_run_id_is_where_reading_starts() -> None:
    files = verbs()["sample"]
    config = {**merge(files), "other": "$@max_epochs"}
    refuse_foreign_flags({"max_epochs": "3", "run_id": "other"}, files, config)
    with pytest.raises(BundleError, match="max_epochs has no effect"):
        refuse_foreign_flags({"max_epochs": "3"}, files, config)


def test_monais_command_refuses_a_flag_of_another_verb(run_bundle: RunBundle, output_dir: Path) -> None:
    done = run_bundle([BASE, TINY], "--output_dir", output_dir, "--max_epochs", 3)
    assert done.returncode == 1 and "--max_epochs has no effect here" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


@pytest.fixture
def as_monai(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`as_monai("sample", "--age", "1")` has a verb's flags checked in this process as MONAI's command has them."""
    monkeypatch.chdir(ROOT)

    def run(verb: str, *flags: str) -> Any:
        files = [path.relative_to(ROOT).as_posix() for path in verbs()[verb]]
        monkeypatch.setattr(sys, "argv", ["monai/bundle/__main__.py", "run", "--config_file", str(files), *flags])
        given = {name: value for name, value in read_flags(flags).items() if name != "help"}
        return run_here(files, run=["$@check_flags()"], **given)

    return run


@pytest.mark.parametrize(("words", "told"), OF_NO_USE)
def test_monais_command_refuses_the_same(words: str, told: str, as_monai: Callable[..., Any]) -> None:
    verb, flag, value = words.rsplit(" ", 2)
    assert told in refused_here(as_monai, verb, flag, value)


def test_monais_command_has_the_help_of_the_verb(
    as_monai: Callable[..., Any], shown: Shown, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = shown("train", "diffusion", "--help")
    with pytest.raises(SystemExit) as left:
        as_monai("train diffusion", "--help")
    assert not left.value.code and expected in capsys.readouterr().out


def test_what_is_new_in_a_map_is_taken(shown: Shown) -> None:
    sampler = "{'_target_': 'scripts.diffusion.samplers.DDIMSampler', '_mode_': 'callable', 'schedule': '@schedule'}"
    flags = ["--samplers::quick", sampler, "--sampler", "quick", "--samplers::quick::num_inference_steps", "4"]
    assert shlex.split(shown("sample", *flags, "--print"))[-6:] == flags
    flags = ["--network_def::dropout_cattn", "0.1", "--conditions::age::maximum", "90", "--run", "['$@dataset']"]
    assert shlex.split(shown("sample", *flags, "--print"))[-6:] == flags


def test_what_opens_every_command_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/__main__.py"])
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hide_foreign_warnings()
        warnings.warn("parsing config_file configs/inference.json", UserWarning, stacklevel=1)
        with pytest.raises(UserWarning):
            warnings.warn("This DataLoader will create 4 worker processes", UserWarning, stacklevel=1)


def test_command_is_quiet_and_ends_in_one_line(tmp_path: Path) -> None:
    """Even where warnings are errors: what opens every command is hidden."""
    command = [
        sys.executable,
        "-W",
        "error::UserWarning",
        "-m",
        "scripts",
        "sample",
        "--with",
        "tiny",
        "--diffusion_path",
        "no.pt",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Warning" not in done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "no weights of the" in done.stderr


def test_help_needs_no_pytorch() -> None:
    code = (
        "import sys; from scripts.core.command_line import main; "
        "main(['sample', '-h']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120).returncode == 0
