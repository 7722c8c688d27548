"""`linvit bench`: time models side by side in one process, after checking that they compute Linformer attention.

`options` selects the models, `plan` builds each of them without memory, `check` compares attention with the
reference, `run` measures, `rows` holds the numbers, and `output` shows them.
"""
