"""The commands: how they start, their help, and what they do with errors of users and with bugs."""

import importlib
import runpy
import subprocess
import sys

import pytest
from helpers import EXAMPLES, environment, run_command

from co2s_hf import __version__
from co2s_hf.cli import COMMANDS, pretrain
from co2s_hf.utils.errors import UserValueError


WIDTH = {"COLUMNS": "100"}  # of the help texts
# `co2s pretrain` has two kinds, each with its flags.
FLAGS = {name: importlib.import_module(f"co2s_hf.cli.{name}").COMMAND for name in COMMANDS if name != "pretrain"}
FLAGS |= {f"pretrain {kind}": command for kind, command in pretrain.COMMANDS.items()}
SCRIPTS = {
    "app": "demo",
    "evaluate": "evaluate",
    "finetune_lora": "finetune",
    "predict": "predict",
    "prepare_dataset": "prepare",
    "push_to_hub": "push",
    "train_semi": "train",
}
# Command -> its words, and a function that it calls early.
EARLY = {
    "train": ((), "co2s_hf.training.loop.setup"),
    "pretrain": (("dinov3", "--images", "."), "co2s_hf.training.pretraining.loop.start"),
    "finetune": (("--checkpoint", "user/x", "--data_dir", "x"), "co2s_hf.training.models.open_base"),
    "evaluate": ((), "co2s_hf.utils.devices.make_accelerator"),
    "predict": (("scene.tif",), "co2s_hf.geo.scene_files.plan_maps"),
    "prepare": (("--data_dir", "x", "--report", "x.png"), "co2s_hf.data.listings.list_samples"),
    "push": (("--hub_model_id", "user/x"), "co2s_hf.hub.publishing.check_publishable"),
    "convert": (
        ("--clip_checkpoint", "a", "--dinov3_checkpoint", "b", "--dataset", "gid", "--output_dir", "x"),
        "co2s_hf.hub.convert_co2s_to_hf.convert",
    ),
    "demo": ((), "co2s_hf.cli.demo_page.load_for_prediction"),
}


@pytest.fixture(autouse=True)
def width(monkeypatch):
    for name, value in WIDTH.items():
        monkeypatch.setenv(name, value)


def help_of(command: str) -> str:
    shown = run_command(*command.split(), "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    return shown.stdout


def test_every_command_starts_in_a_python_of_its_own():
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "co2s_hf", name, "--help"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | WIDTH,
        )
        for name in COMMANDS
    }
    shown = {name: process.communicate(timeout=300) for name, process in processes.items()}
    for name, process in processes.items():
        assert (process.returncode, shown[name]) == (0, (help_of(name), "")), name


@pytest.mark.parametrize("name", FLAGS)
def test_the_help_of_a_command_has_examples_and_each_flag_once(name):
    shown, command = help_of(name), FLAGS[name]
    assert shown.startswith(f"usage: co2s {name} ") and f"\n  co2s {name} " in shown
    flags = [flag for group in command.groups for flag in group.flags]
    assert len(flags) == len(set(flags)) and set(command.first) <= set(flags)
    for flag in [*flags, "config"]:
        lines = [line for line in shown.splitlines() if line.startswith(f"  --{flag} ")]
        assert len(lines) == 1, flag
    assert command.name == name


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_without_a_command_all_commands_are_listed(words):
    shown = run_command(*words)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: co2s COMMAND [--flag value ...]\n")
    lines = shown.stdout.splitlines()
    for name, text in COMMANDS.items():
        assert f"  {name:10}{text}" in lines


def test_an_unknown_command_is_an_error():
    run = run_command("trian", "--seed", 1)
    assert run.returncode == 1 and run.stdout == ""
    assert (
        run.stderr.endswith("\nerror: there is no command 'trian'; did you mean 'train'?\n")
        and "\n  train     Train both" in run.stderr
    )


def test_the_version_is_that_of_the_package():
    assert run_command("--version").stdout == f"co2s_hf {__version__}\n"


@pytest.mark.parametrize("command", EARLY)
def test_user_errors_have_no_traceback_and_bugs_keep_theirs(command, monkeypatch, tmp_path):
    assert EARLY.keys() == COMMANDS.keys()
    words, function = EARLY[command]
    monkeypatch.chdir(tmp_path)
    name = "output_dir" if command not in ("demo", "push") else "checkpoint"
    failure: Exception

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(function, fail)
    failure = UserValueError(f"Choose another `{name}='there'`.")
    run = run_command(command, *words)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", f"error: Choose another --{name} there.\n")
    for failure in (ValueError("a bug"), OSError("a bug"), ImportError("a bug")):
        with pytest.raises(type(failure), match=r"^a bug$"):
            run_command(command, *words)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_the_commands(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out == help_of(SCRIPTS[script])
