"""A real, tiny RLVR trajectory that ships with the package, and what it takes to try the method on it."""
