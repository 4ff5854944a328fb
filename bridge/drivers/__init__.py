"""Other codes that drive a potential of either bank, by its ASE calculator."""
