"""The command line: parses and prints; turns errors into exit codes. Nothing else imports click."""
