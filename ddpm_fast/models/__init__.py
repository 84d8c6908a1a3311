"""Networks: the UNet and its layers, the moving average of its weights, named configurations."""
