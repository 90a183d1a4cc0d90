"""Plain functions of tensors: no config, no registry, any device, any float dtype."""
