"""A soak: very many calls across the border, with faults among them, beneath which memory, arrays,
file descriptors and threads have to stay flat, and every number right: `python -m tests.soak`."""
