"""``python -m relexio`` is ``relexio``."""

from relexio.cli.main import main

main()
