"""The commands of `sagan-fast`, one file each: `run(args)` parses the options and does the work."""
