"""Options as pydantic models, filled from command lines and YAML files."""
