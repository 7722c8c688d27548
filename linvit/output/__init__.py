"""Output of commands: files that are never half written, tables, plots."""
