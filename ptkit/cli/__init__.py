"""The command line: one file per command, nothing heavy imported until a command runs."""
