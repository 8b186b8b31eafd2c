"""The command line, `sdd`."""
