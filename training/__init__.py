"""The training of SDXL and CIFAR-10 students: data, steps, the loop, several processes."""
