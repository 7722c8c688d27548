"""The console script `linvit`.

If a process starts here, `import linvit` does not register the models, because that imports torch and `--help` must
not wait for it. Commands register the models when they need them.
"""


def main() -> int:
    """Run the command given on the command line; returns its exit status."""
    from linvit.cli import main as run_command

    return run_command()
