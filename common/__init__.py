"""Shared by everything: command lines, files, plots, pictures, comparisons of methods."""
