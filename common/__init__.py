"""What experiments and scripts share: command lines, files, plots, comparisons."""
