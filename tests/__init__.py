"""A test file for each module; closed forms in helpers.py, reference libraries in oracles.py."""
