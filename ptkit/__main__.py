"""`python -m ptkit` is `ptkit`."""

from ptkit.cli.main import run

run()
