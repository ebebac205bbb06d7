"""One module per command of `python -m verify`; `verify.cli.COMMANDS` lists them."""
