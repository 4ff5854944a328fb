"""The one room that imports both sides: calls.py bridges functions, modules and arrays,
potentials.py bridges potentials of the contract."""
