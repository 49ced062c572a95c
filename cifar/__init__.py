"""CIFAR-10 through SDXL's code: data, classifier, training, evaluation, pictures."""
