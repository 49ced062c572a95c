"""The 2-D experiment: data, small batched networks, students, evaluation, pictures."""
