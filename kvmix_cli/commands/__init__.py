"""The commands: parse, call, show. Importing one loads no torch; its body imports what it needs."""
