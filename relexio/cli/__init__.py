"""The command line: parses and prints; turns errors into exit codes. Nothing else imports click."""

INTERRUPTED = "interrupted: no unfinished output has its final name; run the same command again to continue"
#: Where click's context has the words that were typed after ``relexio``.
WORDS = "relexio.words"
