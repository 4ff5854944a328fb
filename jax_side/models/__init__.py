"""JAX potentials as models of the contract: thin adapters, one file for each model family."""
