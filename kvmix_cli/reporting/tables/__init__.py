"""What a command shows: one file for each kind of result, as tables or sentences, and as plain data for `--json`."""
