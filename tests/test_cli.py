"""The `linvit` command and train_imagenet.py: fast help, one-sentence errors, exit statuses."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import linvit
from linvit import cli
from linvit.settings import process
from linvit.training.command import load_loop

REPOSITORY = Path(__file__).parent.parent
CONSOLE_SCRIPT = "import sys, linvit_command; sys.argv[0] = 'linvit'; sys.exit(linvit_command.main())"


def run_python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=REPOSITORY, **options)


# Each of these packages takes longer to import than all of --help.
HEAVY = {
    "albumentations",
    "cv2",
    "matplotlib",
    "numpy",
    "pandas",
    "PIL",
    "rich",
    "scipy",
    "timm",
    "torch",
    "torchvision",
}


@pytest.mark.parametrize(
    "command", [["-c", CONSOLE_SCRIPT], ["train_imagenet.py"]], ids=["linvit", "train_imagenet.py"]
)
@pytest.mark.parametrize(
    ("flag", "status", "words"),
    [("--help", 0, ""), ("--modle", 2, "error: unknown ")],
)
def test_help_and_wrong_usage_import_no_heavy_package(command, flag, status, words):
    done = run_python("-X", "importtime", *command, flag)
    times, others = [], []
    for line in done.stderr.splitlines():
        (times if line.startswith("import time:") else others).append(line)
    assert done.returncode == status
    assert done.stdout.startswith("usage: ") == (status == 0)
    assert "\n".join(others).startswith(words)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in times}
    assert "linvit" in imported
    assert not imported & HEAVY


def test_no_command_imports_a_heavy_package_for_its_help():
    # One process for all, each named with what its help imported.
    program = f"""
import contextlib, io, sys
import linvit_command
from linvit import cli
for name in cli.MODULES:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main([name, "--help"])
    print(name, sorted(sys.modules.keys() & {HEAVY}))
"""
    done = run_python("-c", program)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{name} []" for name in cli.MODULES]


def test_importing_registers_the_models_whatever_the_command_line():
    # train_imagenet imports the package.
    program = "import sys; sys.argv = ['linvit', 'train', '-h', '--help']; import train_imagenet, timm; "
    program += "print(timm.is_model('linvit_small_patch16_512'))"
    assert run_python("-c", program).stdout == "True\n"


def test_help_lists_every_command_in_its_group(capsys):
    assert cli.main(["--help"]) == 0
    sections = [section.splitlines() for section in capsys.readouterr().out.split("\n\n")]
    listed = {lines[0]: [line.split()[0] for line in lines[1:]] for lines in sections if lines[0].endswith(":")}
    assert listed == {f"{heading}:": list(group) for heading, group in cli.COMMANDS.items()}
    columns = {
        line.index(cli.load(line.split()[0]).SUMMARY) for lines in sections for line in lines if line[:2] == "  "
    }
    assert len(columns) == 1


@pytest.mark.parametrize("name", cli.MODULES)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: linvit {name} " in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"linvit {linvit.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [],
            "no command given: choose one of 'train', 'probe', 'lr-find', 'average', 'check', 'data', 'eval', "
            "'predict', 'report', 'models', 'convert', 'export', 'push', 'explain', 'bench', 'spectrum' "
            "(see linvit --help)",
        ),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["eval"], "the following arguments are required: SOURCE, DATA"),
        (["eval", "run", "data", "--img-sizes", "3"], "unknown option '--img-sizes'; did you mean '--img-size'?"),
        (["eval", "run", "data", "--img-size", "2y3"], "image size '2y3' is neither a number nor HEIGHTxWIDTH"),
        (["eval", "run", "data", "-b", "x"], "--batch-size takes a whole number greater than 0, or none, not 'x'"),
        (["data", "elpw", "folder"], "SET takes 'elpv', not 'elpw' (did you mean 'elpv'?)"),
        (["train", "data", "--epochs", "x"], "--epochs takes a whole number of at least 1, not 'x'"),
        (["models", "--jsno", "x"], "unknown option '--jsno'; did you mean '--json'?"),
    ],
)
def test_wrong_usage_prints_one_sentence_and_exits_with_2(argv, message, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_failed_work_prints_one_sentence_and_exits_with_1(capsys):
    assert cli.main(["models", "linvit_smal_patch16_224"]) == 1
    message = "error: unknown model 'linvit_smal_patch16_224'; did you mean 'linvit_small_patch16_224'?\n"
    assert capsys.readouterr().err == message


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("broken"), 1, "error: broken\n"),
        (OSError("no space"), 1, "error: no space\n"),
        (process.UsageError("wrong"), 2, "error: wrong\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_become_exit_statuses(error, status, words, capsys):
    assert process.run(lambda: fail(error)) == status
    assert capsys.readouterr().err == words


def test_bugs_and_debug_mode_keep_the_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        process.run(lambda: 1 // 0)
    monkeypatch.setenv("LINVIT_DEBUG", "1")
    with pytest.raises(ValueError, match="broken"):
        process.run(lambda: fail(ValueError("broken")))


def test_a_closed_pipe_does_not_print_a_traceback():
    program = "import linvit_command; from linvit.cli import run; run(lambda: print('x' * 10**6))"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_eval_passes_its_options_on(monkeypatch):
    seen = []
    monkeypatch.setattr("linvit.evaluation.command.evaluate_command", lambda options, _: seen.append(options) or 0)
    sizes = ["--img-size", "224", "384x256"]
    others = ["--split", "test", "-b", "8", "-j", "0", "--amp", "--json", "out.json"]
    assert cli.main(["eval", "run", "DATA", *sizes, *others]) == 0
    (options,) = seen
    assert (options.source, options.data_dir, options.split) == ("run", Path("DATA"), "test")
    assert options.img_size == (224, (384, 256))
    assert (options.batch_size, options.workers, options.amp, options.json_file) == (8, 0, True, Path("out.json"))


def test_train_runs_the_loop_next_to_the_package_not_a_file_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "train_imagenet.py").write_text("print('not ours')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "train_imagenet", raising=False)
    assert load_loop().__file__ == str(REPOSITORY / "train_imagenet.py")


def test_linvit_train_runs_train_imagenet(monkeypatch):
    seen = []
    loop = SimpleNamespace(train=lambda config: seen.append(config) or 3)
    monkeypatch.setattr("linvit.training.command.load_loop", lambda: loop)
    assert cli.main(["train", "DATA", "--lr", "0.5"]) == 3
    assert (seen[0].data_dir, seen[0].lr) == (Path("DATA"), 0.5)


@pytest.mark.parametrize("command", ["explain", "export", "predict", "push"])
def test_options_of_the_one_source_are_among_the_commands_own(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    own, others = capsys.readouterr().out.split("\nmodel and preprocessing:\n")
    assert "--class-map PATH" in own
    assert "--use-ema" in others
