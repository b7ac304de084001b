"""Train a model on records, from files to a directory that `vlm_cli.load` reads."""
