"""The commands of `sagan-fast`, a file each: `run(args)` parses and calls."""
