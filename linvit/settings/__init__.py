"""Options: pydantic fields as command-line flags and YAML files."""
