"""The specification in NumPy float64, one file an operator; called by name, never imported by the package."""
