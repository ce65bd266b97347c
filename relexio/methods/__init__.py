"""T-space: methods that see Gram matrices and step numbers, never a tensor; and their backtest.

Importing this package fills the table of methods.
"""

from relexio.methods import formulas as _formulas  # noqa: F401  its decorators fill the table
from relexio.methods.recipe import OPTIONS, Recipe
from relexio.methods.registry import AUTO, METHODS, Method, Window, directions

__all__ = ["AUTO", "METHODS", "OPTIONS", "Method", "Recipe", "Window", "directions"]
