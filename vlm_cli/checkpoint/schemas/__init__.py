"""What each JSON file of a model must hold: tables for `vlm_cli.schema`, a module for each kind of file.

Each function checks what was read from one kind of file. Its message names the file, the key, what the key holds and
what it must hold.
"""
