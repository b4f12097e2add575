"""Proof that what the kernels execute does not depend on the values they compute with."""
