"""The control plane: identity, compute, scheduler, conductor, image, network and volume."""
