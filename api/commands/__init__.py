"""The command line: what each command of `headrace` does. `api.cli` is the entry point."""
