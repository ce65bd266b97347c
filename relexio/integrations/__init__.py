"""Recording from within training frameworks, which are imported only by the module of their name."""
