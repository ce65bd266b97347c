"""A real, tiny RLVR trajectory that ships with the package, and the code to try the method on it."""
