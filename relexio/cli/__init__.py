"""The command line: parses and prints; turns errors into exit codes. Nothing else imports click."""

INTERRUPTED = "interrupted: nothing half-written has a final name; run the same command again to go on"
