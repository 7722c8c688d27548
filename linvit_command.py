"""The console script `linvit`.

In a process that starts here, `import linvit` registers no models: that loads torch, and `--help` must not wait for
it. A command that needs the models registers them itself.
"""


def main() -> int:
    """Run the command that the command line names, and return its exit status."""
    from linvit.cli import main as run_command

    return run_command()
