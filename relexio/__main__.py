"""``python -m relexio`` is ``relexio``."""

from relexio.cli.entry import main

main()
